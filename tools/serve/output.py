"""Reads what the JVM prints: keeps it in the log, hands on what matters, remembers how workers fare."""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from tools.serve.lines import SETTLE_S, ServerOutput
from tools.serve.log import Record, java_error, parse, python_error
from tools.serve.store import Served

# How lines begin that tell nothing of a JVM's end: what it says at every start, and the last part of a thread dump.
CHATTER = (
    "Model server started.",
    "WARNING: sun.reflect.",
    "nvidia-smi not available",
    "xpu-smi not available",
    "Heap",
)
# The first line after the threads in a dump of Java 11 to 21.
DUMP_END = "JNI global ref"


class Output(ServerOutput):
    """The lines of a JVM. Reported are the records of workers and the warnings of TorchServe."""

    def __init__(self, stream: IO[str], log_file: Path, report: Callable[[str], None], verbose: bool):
        # Guards what follows, written by the reading thread.
        self._lock = threading.Lock()
        self._plain: deque[str] = deque(maxlen=2000)
        self._printed: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=500))
        self._pids: dict[int, str] = {}
        self._failed: set[str] = set()
        self._unloadable: set[str] = set()
        self._dump: list[str] | None = None
        self._dumped = threading.Event()
        super().__init__(stream, log_file, report, verbose)

    def last_error(self) -> str:
        # The JVM has ended, and so has its stream where nobody else holds it.
        self._thread.join(SETTLE_S)
        with self._lock:
            plain = [line for line in self._plain if line.strip() and not line.startswith((" ", "\t", *CHATTER))]
        return java_error(plain) or (plain[-1] if plain else "it gives no reason")

    def thread_dump(self, ask: Callable[[], None], timeout: float) -> list[str] | None:
        """The lines of the dump that the JVM prints after `ask`; None when it does not within `timeout` seconds."""
        with self._lock:
            self._dump = []
        self._dumped.clear()
        ask()
        complete = self._dumped.wait(timeout)
        with self._lock:
            dump, self._dump = self._dump, None
        return dump if complete else None

    def dead_workers(self) -> list[tuple[int, str]]:
        """Process id and `<model>_<version>` of the workers that ended since the last call."""
        with self._lock:
            dead = [(pid, worker) for pid, worker in self._pids.items() if not _runs(pid)]
            for pid, _ in dead:
                del self._pids[pid]
        return dead

    def failure(self, archives: Mapping[str, Served]) -> str | None:
        """What kept one of `archives` from loading, as one line; None while there is nothing to say. archives: by the
        name of the file that TorchServe was told to load."""
        failed = {worker for _, worker in self.dead_workers()}
        with self._lock:
            failed |= self._failed
            unloadable = set(self._unloadable)
        if not failed and not unloadable:
            return None
        time.sleep(SETTLE_S)
        with self._lock:
            plain = list(self._plain)
            for file_name, served in archives.items():
                if file_name in unloadable:
                    return f"{served}: TorchServe cannot load {served.path}: {java_error(plain) or 'no reason given'}"
                if served.key in failed:
                    return f"{served}: its worker failed to start: {self._death(served.key, plain)}"
        return f"a worker failed to start: {', '.join(sorted(failed | unloadable))}"

    def worker_error(self, worker: str) -> str | None:
        """The last exception that the workers of `<model>_<version>` printed."""
        with self._lock:
            return python_error(self._printed[worker])

    def _death(self, worker: str, plain: list[str]) -> str:
        printed = self._printed[worker]
        error = python_error(printed)
        if error:
            return error
        last = printed[-1] if printed else "nothing"
        return f"no error was printed ({java_error(plain) or 'TorchServe gives no reason'}); its last line: {last}"

    def _take(self, line: str) -> str | None:
        record = parse(line)
        with self._lock:
            if record is None:
                self._take_plain(line)
                return None
            self._remember(record)
        return None if record.is_greeting else f"{record.worker or record.logger}: {record.message}"

    def _take_plain(self, line: str) -> None:
        if self._dump is None:
            self._plain.append(line)
        elif line.startswith(DUMP_END):
            self._dumped.set()
        else:
            self._dump.append(line)

    def _remember(self, record: Record) -> None:
        if record.worker and record.from_worker:
            self._printed[record.worker].append(record.message)
        if record.worker and record.pid:
            self._pids[record.pid] = record.worker
        if record.worker and record.worker_failed:
            self._failed.add(record.worker)
        if record.unloadable_file:
            self._unloadable.add(Path(record.unloadable_file).name)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
