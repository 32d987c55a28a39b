"""What the driver and the workers tell each other. Light: the driver needs no torch."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

from handlers.options import Options
from tools.bulk.plan import Manifest


@dataclass(frozen=True)
class Job:
    """What all workers of a run have in common. target: a folder or prefix. batch: pictures that go through the model
    together, where their shapes allow it."""

    manifest: Manifest
    target: str
    options: Options
    batch: int


@dataclass(frozen=True)
class Done:
    """began, ended: seconds since 1970."""

    pictures: int
    failed: int
    began: float
    ended: float


class Ledger:
    """Remembers where a worker was when it died, so that the picture that killed it does not kill all others.

    A shard that is begun again is done picture by picture; one at which the worker then dies once more is left out.
    """

    def __init__(self) -> None:
        self._begun: set[int] = set()
        self._current: dict[int, int] = {}
        self._deadly: dict[int, set[int]] = defaultdict(set)

    def begin(self, shard: int) -> tuple[bool, set[int]]:
        """Whether it was begun before, and the ids of the pictures to leave out."""
        again = shard in self._begun
        self._begun.add(shard)
        if shard in self._current:
            self._deadly[shard].add(self._current.pop(shard))
        return again, self._deadly[shard]

    def at(self, shard: int, picture: int) -> None:
        """The picture of this id is next."""
        self._current[shard] = picture

    def passed(self, shard: int) -> None:
        """The worker has survived all of it."""
        self._current.pop(shard, None)


class Witness(Protocol):
    """A `Ledger`, here or in another process."""

    def begin(self, shard: int) -> tuple[bool, set[int]]: ...
    def at(self, shard: int, picture: int) -> None: ...
    def passed(self, shard: int) -> None: ...
