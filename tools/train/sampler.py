"""The order of the pictures in training: a function of seed and epoch alone."""

from collections.abc import Iterator

import numpy as np
from numpy.random import default_rng
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of keys (epoch, index): every picture once an epoch, shuffled anew in each.

    batch: pictures a process. With `world` processes a global batch has batch x world pictures, of which process
    `rank` takes every world-th one: two processes see together what one with twice the batch sees. The
    last global batch of an epoch may be smaller. Where it has fewer pictures than there are processes, pictures of
    the epoch's beginning fill it up to one a process, and only then is a picture seen twice.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.count = count
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // (self.batch * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = default_rng([self.seed, self.epoch]).permutation(self.count)
        size = self.batch * self.world
        for start in range(0, self.count, size):
            together = order[start : start + size]
            if len(together) < self.world:
                together = np.concatenate((together, np.resize(order, self.world - len(together))))
            yield [(self.epoch, int(index)) for index in together[self.rank :: self.world]]
