"""One line on the terminal for work that takes long; silent where nobody looks."""

import sys
import time
from types import TracebackType
from typing import Self


class Progress:
    """Bytes or things done of those in all, redrawn at most ten times a second.

    unit: what is counted; bytes, the default, are shown in MB. Things are shown with their rate and the time left.
    """

    def __init__(self, what: str, total: int | None, unit: str = "bytes"):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._started = time.monotonic()
        self._drawn = 0.0
        self._visible = sys.stderr.isatty()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._visible and time.monotonic() - self._drawn > 0.1:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        share = f" {self.done * 100 // self.total:3d} %" if self.total else ""
        if self.unit == "bytes":
            text = f"{self.done / 1e6:.1f} MB"
        else:
            rate = self.done / max(self._drawn - self._started, 1e-9)
            text = f"{self.done}{f' of {self.total}' if self.total else ''} {self.unit}, {rate:.1f} a second"
            if self.total and self.done:
                text += f", {(self.total - self.done) / rate:.0f} s left"
        sys.stderr.write(f"\r{self.what}: {text}{share}\x1b[K")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
