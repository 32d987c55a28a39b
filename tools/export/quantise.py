"""Int8 by NNCF: ranges of every layer measured on pictures, weights and activations rounded to 256 steps."""

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from handlers.runtimes.exported import INPUTS

if TYPE_CHECKING:
    from tools.export.network import Pictures

# NNCF tells its makers of every use unless it takes itself to be under test.
os.environ["NNCF_CI"] = "1"


def quantise(model: Any, pictures: "Pictures") -> Any:
    """An OpenVINO model in int8, fitted to `pictures`; what follows the last convolutions stays in float.

    There boxes are decoded: 256 steps over a whole picture would be several pixels each.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    import nncf

    # Its own set_log_level sets the handlers too, which may be those of the whole process.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # It draws its progress on stdout, where the command's result goes.
    with contextlib.redirect_stdout(sys.stderr):
        return nncf.quantize(
            model,
            nncf.Dataset(pictures, _inputs),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(pictures),
            ignored_scope=nncf.IgnoredScope(names=behind_convolutions(model)),
        )


def _inputs(picture: Tensor) -> dict[str, Any]:
    # What the threshold leaves over is not quantised, so that any will do.
    return dict(zip(INPUTS, ((picture[None] / 255).numpy(), np.float32(0.5)), strict=True))


def behind_convolutions(model: Any) -> list[str]:
    """Names of the operations that no convolution follows."""
    seen: dict[str, str] = {}
    waiting = list(model.get_results())
    while waiting:
        operation = waiting.pop()
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name in seen or kind == "Convolution":
            continue
        seen[name] = kind
        waiting += [source.get_node() for source in operation.input_values()]
    return sorted(name for name, kind in seen.items() if kind not in ("Constant", "Parameter", "Result"))
