"""ONNX Runtime, on the CPU or on CUDA."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from handlers.errors import BadArchive, BadSettings
from handlers.runtimes.exported import INPUTS, ExportedNetwork
from handlers.settings import Settings

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def load(folder: Path, settings: Settings, num_labels: int, device: torch.device) -> ExportedNetwork:
    """The network of an extracted archive. Raises BadSettings or BadArchive, one line that names the cause."""
    del num_labels  # stands in the file
    return load_with(CPU if device.type == "cpu" else CUDA, {}, folder, settings, device)


def load_with(
    provider: str, provider_options: dict[str, Any], folder: Path, settings: Settings, device: torch.device
) -> ExportedNetwork:
    """provider: which of ONNX Runtime's engines has to run it. Raises BadSettings or BadArchive."""
    assert settings.exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait spin otherwise, and take the cores from the other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != CPU:
        provider_options = {"device_id": device.index or 0} | provider_options
    session = None
    if provider in onnxruntime.get_available_providers():
        try:
            session = onnxruntime.InferenceSession(
                folder / settings.weights, options, providers=[(provider, provider_options)]
            )
        except Exception as error:  # its own classes, one for each status
            reason = str(error).strip().partition("\n")[0]
            raise BadArchive(f"{settings.weights} cannot be loaded by ONNX Runtime ({reason})") from error
    # It goes on without a provider whose libraries it does not find.
    if session is None or provider not in session.get_providers():
        raise BadSettings(
            f"this onnxruntime cannot run on {device.type} (no {provider}); install onnxruntime-gpu and what it needs,"
            " or build the archive with serving.device: cpu"
        )

    def run(*given: Tensor) -> list:
        return session.run(None, {name: value.numpy() for name, value in zip(INPUTS, given, strict=True)})

    return ExportedNetwork(settings.exported, run)
