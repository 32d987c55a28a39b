"""Runs an extracted archive in a process that sees nothing but it and the installed libraries.

The process starts and imports torch while the archive is still being written; `run` tells it to go on.
"""

import json
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
import json, os, sys
folder, *libraries = json.loads(sys.argv[1])
sys.path[:0] = [folder]
sys.path += libraries
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.chdir(folder)
from handlers.torchvision_import import import_torchvision
import_torchvision()
from handlers.errors import MarinaError
from handlers.pipeline import dry_run
config = sys.stdin.readline()
try:
    result = dry_run(folder, json.loads(config)) if config else None
except MarinaError as error:
    result = {"error": str(error)}
json.dump(result, answer)
"""


@dataclass(frozen=True)
class DryLoad:
    """answers: for each golden picture, in order, an answer of format `detections` without its timing.
    versions: of Python, torch and torchvision that it ran with."""

    answers: list[dict[str, Any]]
    versions: dict[str, str]


class CleanProcess:
    """A process that waits for an archive to be complete under `folder`; its code must be there already."""

    def __init__(self, folder: Path):
        libraries = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        arguments = json.dumps([str(folder), *dict.fromkeys(libraries)])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed together with the process
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", RUNNER, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
        )

    def run(self, config: dict[str, Any]) -> DryLoad:
        """Load the archive and answer its golden pictures. config: its parsed model-config.yaml.

        Raises BadArchive with the cause in one line.
        """
        output, _ = self._process.communicate(json.dumps(config).encode() + b"\n")
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
        archive.extract(Path(folder))
        with CleanProcess(Path(folder)) as process:
            return process.run(archive.config)
