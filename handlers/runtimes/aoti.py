"""AOTInductor: compiled when the archive was built, so that no worker compiles."""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from handlers.errors import BadArchive
from handlers.runtimes.exported import ExportedNetwork
from handlers.settings import Settings


def machine() -> str:
    """What the compiled code depends on."""
    version = torch.__version__.partition("+")[0]
    return f"torch {version}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def load(folder: Path, settings: Settings, num_labels: int, device: torch.device) -> ExportedNetwork:
    """The network of an extracted archive. Raises BadArchive, one line that names the cause."""
    del num_labels, device  # both stand in the file
    assert settings.exported is not None
    if settings.exported.machine != machine():
        raise BadArchive(
            f"{settings.weights} was compiled for {settings.exported.machine}, but this is {machine()}; build the"
            " archive on such a machine, or with another backend"
        )
    try:
        # What torch.export.pt2_archive wraps. The wrapper first compiles test programs to learn what the processor can.
        compiled = AOTIModelPackageLoader(str(folder / settings.weights), "model", False, 1, -1)
    except RuntimeError as error:
        raise BadArchive(f"{settings.weights} cannot be loaded ({str(error).partition(chr(10))[0]})") from error

    def run(images: Tensor, threshold: Tensor) -> Sequence[Tensor]:
        return compiled.run([images, threshold])

    return ExportedNetwork(settings.exported, run)
