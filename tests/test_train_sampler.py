import pytest

from tools.train.sampler import EpochBatches


def epoch_of(sampler: EpochBatches, epoch: int) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_picture_once_in_a_new_order_each_epoch() -> None:
    sampler = EpochBatches(count=21, batch=4, seed=3)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 1]
    assert len(first) == len(sampler)
    for epoch, batches in enumerate((first, second)):
        assert sorted(key for batch in batches for key in batch) == [(epoch, index) for index in range(21)]
    assert [index for batch in first for _, index in batch] != [index for batch in second for _, index in batch]
    assert first == epoch_of(EpochBatches(21, 4, 3), 0)
    assert first != epoch_of(EpochBatches(21, 4, 4), 0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 17, 23])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_together_what_one_sees(count: int, world: int) -> None:
    ranks = [epoch_of(EpochBatches(count, 4, 5, rank, world), 2) for rank in range(world)]
    alone = epoch_of(EpochBatches(count, 4 * world, 5), 2)
    assert {len(batches) for batches in ranks} == {len(alone)}
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert all(parts)
        together = [key for part in parts for key in part]
        assert set(whole) <= set(together)
        # Only a batch too small for one picture a process is filled up.
        assert len(together) == max(len(whole), world)
        assert {index for _, index in together} <= set(range(count))
