"""When a server that has ended is started again, and when no more. Pure arithmetic."""

# A server that has answered for so long was in order: the next start is the first again.
UP_S = 10
MOST_STARTS = 10
LONGEST_PAUSE_S = 15


class Restarts:
    """Counts the starts in a row of a server that does not stay up."""

    def __init__(self) -> None:
        self._starts = 0

    def pause(self, up_s: float) -> float | None:
        """How many seconds to wait before the next start of a server that ended after it had answered for `up_s`
        seconds; none after one that stayed up. None: it was started often enough."""
        self._starts = 1 if up_s >= UP_S else self._starts + 1
        if self._starts > MOST_STARTS:
            return None
        return 0 if self._starts == 1 else min(2.0 ** (self._starts - 2), LONGEST_PAUSE_S)
