"""One line on the terminal for work that takes long; elsewhere, as in a log, a plain line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

REDRAW_S = 0.1
LINE_S = 10.0


class Progress:
    """Bytes or things done of those in all; redrawn ten times a second, or without a terminal a line in ten seconds.

    unit: what is counted; bytes, the default, are shown in MB. Things are shown with their rate and the time left.
    began: when the work did, seconds since 1970, where that was not now.
    """

    def __init__(self, what: str, total: int | None, unit: str = "bytes", began: float | None = None):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._drawn = time.monotonic()
        self._started = self._drawn - (time.time() - began if began else 0)
        self._visible = sys.stderr.isatty()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self._drawn > (REDRAW_S if self._visible else LINE_S):
            self.show()

    def show(self) -> None:
        """Now: for work whose first part already takes long."""
        self._drawn = time.monotonic()
        share = f" {self.done * 100 // self.total:3d} %" if self.total else ""
        if self.unit == "bytes":
            text = f"{self.done / 1e6:.1f} MB"
        else:
            text = f"{self.done}{f' of {self.total}' if self.total else ''} {self.unit}"
            if self.done:
                rate = self.done / max(self._drawn - self._started, 1e-9)
                text += f", {rate:.1f} a second"
                if self.total:
                    text += f", {(self.total - self.done) / rate:.0f} s left"
        line = f"{self.what}: {text}{share}"
        sys.stderr.write(f"\r{line}\x1b[K" if self._visible else f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
