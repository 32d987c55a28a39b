"""An archive in a process of its own, without a server around it: what its engine can do, and what it takes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from handlers.errors import BadArchive
from tools.archive.reader import open_archive

CHILD = Path(__file__).with_name("engine_child.py")


class Engine:
    """A loaded archive that has answered its first picture. Close it, or use it in a `with` block.

    workers: how many such processes share the cores, which says how many threads each takes. cores: to keep it on,
    None for all. first_answer_s: from the start of the process to its first answer. Raises BadArchive with one line.
    """

    def __init__(self, archive: Path, bodies: Sequence[bytes], workers: int, cores: Sequence[int] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="marina-")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed together with the process
        folder = Path(self._folder.name)
        with open_archive(archive) as opened:
            opened.extract(folder)
            config = opened.config | {"minWorkers": workers, "maxWorkers": workers}
        pictures = []
        for number, body in enumerate(bodies):
            pictures.append(str(folder / f".picture-{number}"))
            Path(pictures[-1]).write_bytes(body)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            if cores is not None:
                os.sched_setaffinity(self._process.pid, cores)
            self.tell({"folder": str(folder), "config": config, "pictures": pictures})
            self.first_answer_s: float = self.hear()["first_answer_s"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> Any:
        """What a method of `engine_child.Timed` returns."""
        self.tell({"do": do, **arguments})
        return self.hear()

    def tell(self, order: dict[str, Any]) -> None:
        """Half of `ask`, for several engines at once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BadArchive(self._death()) from None

    def hear(self) -> Any:
        """The other half."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BadArchive(self._death())
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise BadArchive(answer["error"])
        return answer

    def memory(self) -> tuple[int, int]:
        """Bytes, RSS and USS."""
        taken = psutil.Process(self._process.pid).memory_full_info()
        return taken.rss, taken.uss

    def _death(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the archive's process ended with exit code {status}: {lines[-1].strip() if lines else 'no word why'}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


def bare_loop(engines: Sequence[Engine], seconds: float) -> float:
    """Pictures a second that all of them go through together, each in a plain loop."""
    for engine in engines:
        engine.tell({"do": "loop", "seconds": seconds})
    return sum(engine.hear() for engine in engines)
