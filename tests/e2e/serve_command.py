"""`marina serve` in a process of its own."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

# A folder in which nobody can create a file, root included.
READ_ONLY = Path("/proc") if sys.platform == "linux" else Path("/System")


class Command:
    """`marina serve` in a process of its own, and what it prints."""

    def __init__(self, repository: Path, temporary: Path, *arguments: str):
        temporary.mkdir()
        self.temporary = temporary
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=READ_ONLY,
            env=os.environ | {"PYTHONPATH": str(repository), "TMPDIR": str(temporary)},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def await_line(self, pattern: str, timeout: float = 180) -> re.Match[str]:
        """The first line in which `pattern` is found."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = not self._reader.is_alive()
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            assert not ended, f"ended without {pattern!r}: {self.lines}"
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in {self.lines}")

    def family(self) -> list[psutil.Process]:
        """The JVM and its workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, timeout: float = 120) -> int:
        """The exit code, when all output is read."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def kill(self) -> None:
        """For teardown: leaves nothing, whatever state a failed test left it in."""
        if self.process.poll() is None:
            family = self.family()
            self.process.kill()
            for process in family:
                if process.is_running():
                    process.kill()
            self.end()
