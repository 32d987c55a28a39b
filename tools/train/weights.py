"""The weights that a run leaves."""

import json
from pathlib import Path

from torch import Tensor

from model_defs.contract import Detector
from tools.checkpoint.reader import METADATA_PREFIX
from tools.checkpoint.safetensors_format import write_safetensors
from tools.checkpoint.tensors import LazyTensor
from tools.train.run import writing


def save_weights(detector: Detector, path: Path, labels: list[str]) -> None:
    """The state dict as safetensors, in half precision where that holds the values, with the labels' names.

    Raises ToolError for a disk that is full; the file that was there is intact.
    """
    tensors = {key: _lazy(_half(value)) for key, value in detector.state_dict().items()}
    with writing(path):
        write_safetensors(path, tensors, {"format": "pt", f"{METADATA_PREFIX}names": json.dumps(labels)})


def _lazy(value: Tensor) -> LazyTensor:
    array = value.cpu().numpy()
    return LazyTensor(str(array.dtype), array.shape, array.tobytes)


def _half(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if half.isfinite().all() else value
