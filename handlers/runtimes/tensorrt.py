"""TensorRT on a GPU, by way of ONNX Runtime."""

from pathlib import Path

import torch

from handlers.errors import BadSettings
from handlers.runtimes.exported import ExportedNetwork
from handlers.runtimes.onnx import load_with
from handlers.settings import Settings


def load(folder: Path, settings: Settings, num_labels: int, device: torch.device) -> ExportedNetwork:
    """The network of an extracted archive. Raises BadSettings or BadArchive, one line that names the cause."""
    del num_labels  # stands in the file
    if device.type == "cpu":
        raise BadSettings("runtime.backend is tensorrt, which runs on NVIDIA's GPUs alone, and torch finds none here")
    # What it compiles stays beside the network, so that a worker that starts again finds it.
    options = {
        "trt_fp16_enable": settings.runtime.precision == "fp16",
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
    }
    return load_with("TensorrtExecutionProvider", options, folder, settings, device)
