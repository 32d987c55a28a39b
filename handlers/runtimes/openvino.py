"""OpenVINO, on the CPU: fp32, bf16, or int8 as the file has been quantised."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor

from handlers.errors import BadArchive
from handlers.runtimes.exported import INPUTS, ExportedNetwork
from handlers.settings import Settings

logger = logging.getLogger(__name__)

# Instructions that multiply 8-bit numbers, as torch names them: VNNI and AMX of x86, dot products of ARM.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "dot", "i8mm")


def load(folder: Path, settings: Settings, num_labels: int, device: torch.device) -> ExportedNetwork:
    """The network of an extracted archive. Raises BadArchive, one line that names the cause."""
    del num_labels, device  # the one stands in the file, the other is the CPU
    assert settings.exported is not None
    outputs = settings.exported.outputs
    if settings.runtime.precision == "int8" and not has_int8(torch.cpu.get_capabilities()):
        logger.warning(
            "%s is int8, but this processor has no VNNI or AMX instructions: it works, slowly; fp32 may be faster",
            settings.weights,
        )
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # It takes bf16 by itself where the processor has it: fp32 means fp32 here.
        "INFERENCE_PRECISION_HINT": "bf16" if settings.runtime.precision == "bf16" else "f32",
        # Workers are bound to no cores, and would all choose the same ones.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        request = _core().compile_model(folder / settings.weights, "CPU", options).create_infer_request()
    except RuntimeError as error:
        line = str(error).strip().rpartition("\n")[2]
        raise BadArchive(f"{settings.weights} cannot be loaded by OpenVINO ({line})") from error

    def run(*given: Tensor) -> list:
        tensors = {name: value.numpy() for name, value in zip(INPUTS, given, strict=True)}
        # What comes out is copied: the memory of this picture's answer is that of the next one's.
        found = request.infer(tensors, share_inputs=True)
        return [found[output] for output in outputs]

    return ExportedNetwork(settings.exported, run)


@cache
def _core() -> openvino.Core:
    """The only one of the process.

    Each core's plugin brings an alternate signal stack and puts back the one before it at its end. Of two whose times
    overlap, the later one would put back memory that the earlier one gave away, and the next signal that Python
    handles would kill the process (seen with OpenVINO 2026.4).
    """
    return openvino.Core()


def has_int8(capabilities: Mapping[str, Any]) -> bool:
    """capabilities: of the processor, as `torch.cpu.get_capabilities` gives them."""
    return any(capabilities.get(name) for name in INT8_INSTRUCTIONS)
