"""One line on the terminal for work that takes long; silent where nobody looks."""

import sys
import time
from types import TracebackType
from typing import Self


class Progress:
    """Bytes done of bytes in all, redrawn at most ten times a second."""

    def __init__(self, what: str, total: int | None):
        self.what = what
        self.total = total
        self.done = 0
        self._drawn = 0.0
        self._visible = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self.done += count
        if self._visible and time.monotonic() - self._drawn > 0.1:
            self._draw()

    def _draw(self) -> None:
        share = f" {self.done * 100 // self.total:3d} %" if self.total else ""
        sys.stderr.write(f"\r{self.what}: {self.done / 1e6:.1f} MB{share}\x1b[K")
        self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
