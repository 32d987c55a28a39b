"""What executes an archive's network: one module a backend, each with a function `load`. An archive holds its own."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from handlers.errors import BadSettings
from handlers.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model_defs.contract import Detections

PACKAGE = "handlers.runtimes"
# What a backend runs on, beside torch.
ENGINES = {"onnx": "onnxruntime", "tensorrt": "onnxruntime", "openvino": "openvino"}


class Network(Protocol):
    """A loaded network, whatever executes it. The attributes are those of `model_defs.contract.Detector`."""

    has_background: bool
    letterbox: bool
    stride: int

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for a picture of a size that the network cannot take."""

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        """As `Detector.candidates`, but of pictures as they are: `[B, 3, H, W]` uint8, RGB, on the CPU."""

    def rows(self, images: Tensor) -> Tensor:
        """As `Detector.rows`, both on the CPU."""


def load_network(folder: Path, settings: Settings, num_labels: int, device: torch.device) -> Network:
    """The network of an extracted archive, ready to answer.

    num_labels: how many labels it answers with, `__background__` counted.
    Raises BadSettings or BadArchive, one line that names the cause.
    """
    backend = settings.runtime.backend
    try:
        module = import_module(f"{PACKAGE}.{backend}")
    except ModuleNotFoundError as error:
        raise BadSettings(
            f"runtime.backend is {backend}, but this server has no {error.name}; install it there, or build the archive"
            " with another backend"
        ) from error
    return module.load(folder, settings, num_labels, device)
