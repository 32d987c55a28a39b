"""Weights of an archive: the safetensors file, and how it gets into a network.

Written here, in the few lines that reading takes, because a stock TorchServe has no safetensors package.
Format: 8 bytes little-endian length, a JSON header of dtype, shape and offsets, then the raw tensors
(https://github.com/huggingface/safetensors, README, "Format").
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from handlers.errors import BadArchive
from model_defs.contract import Detector

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHOWN = 3  # names of keys in a message


class Uninitialised(TorchFunctionMode):
    """A network that is built in this context has no random start, which `load_state` replaces anyhow."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.uniform_, Tensor.normal_) or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, mapped into memory copy-on-write: workers share what they do not change.

    Each has a mapping of its own, which goes when the network puts another tensor in its place.
    Raises BadArchive when the file is missing, cut short or inconsistent.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise BadArchive(f"weights {path.name}: no safetensors file ({size} bytes, header of {length})")
            header = json.loads(file.read(length))
    except OSError as error:
        raise BadArchive(f"weights {path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadArchive(f"weights {path.name}: the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise BadArchive(f"weights {path.name}: the header is a JSON {type(header).__name__}, not an object")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length or end - begin != prod(shape) * dtype.itemsize:
                raise ValueError(f"{shape} of {dtype} does not fit bytes {begin} to {end}")
            mapped = torch.from_file(str(path), shared=False, size=8 + length + end, dtype=torch.uint8)
            tensors[name] = mapped[8 + length + begin :].view(dtype).view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadArchive(f"weights {path.name}: tensor {name!r} is inconsistent ({error!r})") from error
    return tensors


def load_state(detector: Detector, state: dict[str, Tensor]) -> None:
    """Put `state` into the network, every key and shape accounted for; floats become float32.

    Raises BadArchive naming the first keys that are missing, left over or of another shape.
    """
    classes = detector.classes_in(state)
    if classes is not None and classes != detector.num_classes:
        background = " (background counted)" if detector.has_background else ""
        raise BadArchive(
            f"the weights are for {classes} classes{background}, but the labels name {detector.num_classes};"
            " take the weights that belong to these labels, or give index_to_name.json one name a class"
        )
    state = detector.prepare_state(dict(state))
    expected = detector.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    surplus = [name for name in state if name not in expected and not name.endswith("num_batches_tracked")]
    reshaped = [
        f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    retyped = [
        f"{name} {state[name].dtype} for {expected[name].dtype}"
        for name in expected
        if name in state and state[name].is_floating_point() != expected[name].is_floating_point()
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (
            ("missing", missing),
            ("left over", surplus),
            ("of another shape", reshaped),
            ("of another type", retyped),
        )
        if names
    ]
    if problems:
        raise BadArchive(
            f"the weights do not fit the model: {'; '.join(problems)}; check model.definition and model.args"
        )
    loaded = {
        name: state[name].float() if state[name].is_floating_point() else state[name]
        for name in expected
        if name in state
    }
    # What only training counts may be absent from weights that were saved frozen.
    loaded |= {
        name: torch.zeros(expected[name].shape, dtype=expected[name].dtype) for name in expected if name not in loaded
    }
    detector.load_state_dict(loaded, assign=True)
