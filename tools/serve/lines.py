"""What the processes of a server print: kept in the log, reported as far as it matters."""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from logging import Formatter, LogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

LOG_BYTES = 50_000_000
# Long enough for the lines that follow the first sign of a failure: the traceback, the server's own word.
SETTLE_S = 0.5


class ServerOutput(ABC):
    """The lines of one start, read in a thread of their own until the stream ends. Reading begins at once.

    reporting: whether `report` gets what `_take` makes of each line. verbose: it gets every line as it is, always.
    """

    def __init__(self, stream: IO[str], log_file: Path, report: Callable[[str], None], verbose: bool):
        self.reporting = False
        self._stream = stream
        self._report = report
        self._verbose = verbose
        self._log = RotatingFileHandler(log_file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
        self._log.setFormatter(Formatter("%(message)s"))
        self._thread = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Call it when the processes are gone."""
        self._thread.join(timeout=10)
        self._log.close()

    @abstractmethod
    def worker_error(self, worker: str) -> str | None:
        """Why a worker of `<model>_<version>` failed, as far as it said so."""

    @abstractmethod
    def last_error(self) -> str:
        """Why the server ended, as far as it said so."""

    @abstractmethod
    def _take(self, line: str) -> str | None:
        """Remember what matters of a line; what there is to report of it. Called by the reading thread."""

    def _read(self) -> None:
        for line in self._stream:
            line = line.rstrip("\n")
            self._log.emit(LogRecord("server", 0, "", 0, line, None, None))
            said = self._take(line)
            if self._verbose:
                self._say(line)
            elif said is not None and self.reporting:
                self._say(said)

    def _say(self, line: str) -> None:
        # Reading goes on where nobody listens any more: a full pipe would stop the server.
        with contextlib.suppress(OSError):
            self._report(line)
