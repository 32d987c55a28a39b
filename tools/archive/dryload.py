"""Runs an extracted archive in a process that sees nothing but it and the installed libraries.

The process imports torch while the archive is still being written.
"""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from handlers.errors import BadArchive
from tools.archive.reader import open_archive

# -I and -S keep the environment, the current folder and every path file of an installation out, so that
# neither a checkout nor an installed Marina can stand in for a module that the archive lacks.
RUNNER = """
import gc, json, os, sys
gc.disable()  # it takes a third of the time in which torch is imported, and finds nothing
sys.path += json.loads(sys.argv[1])
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch
folder = json.loads(sys.stdin.readline() or os._exit(0))
os.chdir(folder)
sys.path[:0] = [folder]
from handlers.lean_import import import_torchvision
import_torchvision()
from handlers.errors import MarinaError
from handlers.pipeline import dry_run
gc.enable()
config = sys.stdin.readline()
try:
    result = dry_run(folder, json.loads(config or os._exit(0)))
except MarinaError as error:
    result = {"error": str(error)}
json.dump(result, answer)
answer.flush()
os._exit(0)  # torch takes half a second to end in order
"""

ENVIRONMENT = {
    # The memory of a feature map goes back to the system with it, and comes in large pages.
    "MALLOC_MMAP_THRESHOLD_": "1000000",
    "THP_MEM_ALLOC_ENABLE": "1",
    # torch's threads wait asleep: the builder needs the cores too.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class DryLoad:
    """answers: for each golden picture, in order, an answer of format `detections` without its timing.
    versions: of Python, torch, torchvision and the engine that it ran with."""

    answers: list[dict[str, Any]]
    versions: dict[str, str]


class CleanProcess:
    """A process that gets ready as far as it can: as it starts, with the code of an archive, with all of it."""

    def __init__(self) -> None:
        libraries = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed together with the process
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", RUNNER, json.dumps(list(libraries))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | ENVIRONMENT,
        )

    def import_code(self, folder: Path) -> None:
        """Import the handler of the archive that is extracted, or will be, under `folder`; its code is there."""
        self._tell(str(folder))

    def load(self, config: dict[str, Any]) -> None:
        """Load the archive and answer its golden pictures. config: its parsed model-config.yaml."""
        self._tell(config)

    def _tell(self, value: Any) -> None:
        assert self._process.stdin is not None
        # If it is dead already, `result` tells why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def result(self) -> DryLoad:
        """Wait for the answers. Raises BadArchive with the cause in one line."""
        output, _ = self._process.communicate()
        try:
            result = json.loads(output)
        except ValueError:
            raise BadArchive(f"the archive does not load in a clean process: {self._last_error()}") from None
        if "error" in result:
            raise BadArchive(result["error"])
        return DryLoad(**result)

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"it ended with exit code {self._process.returncode}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()


def dry_load(path: Path) -> DryLoad:
    """Extract a built archive and answer its golden pictures in a clean process.

    Raises BadArchive for one that Marina did not build, is damaged, or does not give its golden answers.
    """
    with open_archive(path) as archive, tempfile.TemporaryDirectory(prefix="marina-") as folder:
        if archive.settings is None:
            raise BadArchive(
                f"{path}: Marina did not build it, and only what it built can be run apart from TorchServe"
            )
        with CleanProcess() as process:
            archive.extract(Path(folder))
            process.import_code(Path(folder))
            process.load(archive.config)
            return process.result()
