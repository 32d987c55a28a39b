"""How many pictures are kept, and which are too like one that was."""

from collections import deque

HOUR_S = 3600.0
# Two pictures look alike that differ in at most so many of the 64 places; how many are remembered.
ALIKE = 4
REMEMBERED = 1000


class Hourly:
    """At most so many in any hour."""

    def __init__(self, most: int):
        self._times: deque[float] = deque(maxlen=most)

    def left(self, now: float) -> bool:
        return len(self._times) < (self._times.maxlen or 0) or now - self._times[0] >= HOUR_S

    def take(self, now: float) -> None:
        self._times.append(now)


class Memory:
    """The last pictures kept. One is like another that looks so and shows the same classes: to a fixed camera, all look
    alike."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, frozenset[int]]] = deque(maxlen=REMEMBERED)

    def has_like(self, look: int, classes: frozenset[int]) -> bool:
        return any(classes == others and (look ^ other).bit_count() <= ALIKE for other, others in self._seen)

    def add(self, look: int, classes: frozenset[int]) -> None:
        self._seen.append((look, classes))
