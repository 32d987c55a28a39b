"""PyTorch, eager: the network as `model_defs` writes it, from its weights."""

from pathlib import Path

import torch
from torch import Tensor

from handlers.errors import BadSettings
from handlers.settings import Settings
from handlers.weights import Uninitialised, load_state, read_safetensors
from model_defs import build
from model_defs.contract import Detections, Detector

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchNetwork:
    def __init__(self, detector: Detector, device: torch.device, dtype: torch.dtype):
        self.detector = detector.requires_grad_(False).eval()
        self.detector.optimise()
        # Channels that lie together make convolutions a quarter faster.
        self.detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs lack it
        self.device = device
        self.dtype = dtype
        self.has_background, self.letterbox, self.stride = detector.has_background, detector.letterbox, detector.stride

    def check_size(self, height: int, width: int) -> None:
        self.detector.check_size(height, width)

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        scaled = images.to(torch.float32).div_(255)
        with self._autocast():
            return self.detector.candidates(scaled, score_threshold, multi_label)

    def rows(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.detector.rows(images.to(self.device).contiguous(memory_format=torch.channels_last)).cpu()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def load(folder: Path, settings: Settings, num_labels: int, device: torch.device) -> TorchNetwork:
    """The network of an extracted archive. Raises BadSettings or BadArchive, one line that names the cause."""
    try:
        with Uninitialised():
            detector = build(settings.model.definition, num_labels, **settings.model.args)
    except ValueError as error:
        raise BadSettings(str(error)) from error
    load_state(detector, read_safetensors(folder / settings.weights))
    # TorchServe lets matrices multiply with less precision (TF32) on GPUs; fp32 means fp32 here.
    torch.set_float32_matmul_precision("highest")
    return TorchNetwork(detector, device, DTYPES[settings.runtime.precision])
