"""What a YOLOv5 checkpoint says about itself: size, classes, strides, anchors."""

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.checkpoint.tensors import LazyTensor
from tools.checkpoint.unpickle import Module, Name
from tools.errors import ToolError

# (depth multiple, width multiple) and heads, the architecture's published table; model_defs.yolov5 has the same one,
# but importing it would import torch.
MULTIPLES = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.00, 1.00), "x": (1.33, 1.25)}
SUFFIX_OF_HEADS = {3: "", 4: "6"}
FIRST_STRIDE = 8
BATCH_NORM_EPS = 1e-3
MAX_ANCHOR_PIXELS = 4096

MODEL_CLASSES = ("models.yolo.Model", "models.yolo.DetectionModel")
MAX_MODULES = 20_000
MAX_TENSORS = 100_000
MAX_MODULE_DEPTH = 32


@dataclass(frozen=True)
class Geometry:
    """size: n ... x6. anchors: `[level][anchor] = (width, height)` in pixels. strides: pixels a cell, a level."""

    size: str
    num_classes: int
    strides: list[int]
    anchors: list[list[tuple[float, float]]]


def geometry_of(tensors: dict[str, LazyTensor]) -> Geometry | None:
    """Read from a state dict; None if it is not one of the ten sizes of YOLOv5.

    Raises ToolError if it is one, but its anchors cannot be.
    """
    head = _find_head(tensors)
    size = _size_from_shapes(tensors)
    if head is None or size is None:
        return None
    index, levels = head
    units = tensors[f"model.{index}.anchors"]
    outputs = tensors[f"model.{index}.m.0.weight"].shape[0]
    if len(units.shape) != 3 or units.shape[0] != levels or units.shape[2] != 2 or not 1 <= units.shape[1] <= 16:
        raise ToolError(f"its anchors have shape {units.shape} where ({levels}, anchors, 2) belongs")
    if outputs % units.shape[1] or outputs // units.shape[1] <= 5:
        raise ToolError(f"its head has {outputs} outputs, which {units.shape[1]} anchors do not share in classes + 5")
    strides = [FIRST_STRIDE * 2**level for level in range(levels)]
    pixels = units.numbers() * np.array(strides).reshape(-1, 1, 1)
    if not (np.isfinite(pixels).all() and pixels.min() > 0 and pixels.max() <= MAX_ANCHOR_PIXELS):
        raise ToolError(
            f"its anchors x strides lie in {pixels.min():g}..{pixels.max():g} pixels, which cannot be (they are stored "
            "in cells); the file is damaged or of another release"
        )
    areas = pixels.prod(axis=2).mean(axis=1)
    if (np.diff(areas) <= 0).any():
        raise ToolError(f"its anchors do not grow with the strides {strides}: mean areas {areas.round().tolist()}")
    anchors = [[(float(w), float(h)) for w, h in level] for level in pixels]
    return Geometry(size, outputs // units.shape[1] - 5, strides, anchors)


def _find_head(tensors: dict[str, LazyTensor]) -> tuple[int, int] | None:
    """Index of the head in the layer list, and its number of levels."""
    indices = [int(match[1]) for name in tensors if (match := re.fullmatch(r"model\.(\d{1,3})\.anchors", name))]
    if len(indices) != 1:
        return None
    levels = sum(bool(re.fullmatch(rf"model\.{indices[0]}\.m\.\d\.weight", name)) for name in tensors)
    return (indices[0], levels) if f"model.{indices[0]}.m.0.weight" in tensors else None


def _size_from_shapes(tensors: dict[str, LazyTensor]) -> str | None:
    """The stem gives the width, the bottlenecks of the second block the depth, the head the levels."""
    stem, head = tensors.get("model.0.conv.weight"), _find_head(tensors)
    depth = sum(bool(re.fullmatch(r"model\.4\.m\.\d+\.cv1\.conv\.weight", name)) for name in tensors)
    for size, (depth_multiple, width_multiple) in MULTIPLES.items():
        shape = (math.ceil(64 * width_multiple / 8) * 8, 3, 6, 6)
        if head and stem and stem.shape == shape and depth == round(6 * depth_multiple) and head[1] in SUFFIX_OF_HEADS:
            return size + SUFFIX_OF_HEADS[head[1]]
    return None


def state_dict_of(model: Module) -> dict[str, Any]:
    """Parameters and buffers of a pickled network, named and ordered as torch's `state_dict()` does."""
    state: dict[str, Any] = {}
    for prefix, module in _walk(model):
        transient = module.state.get("_non_persistent_buffers_set", set())
        if not isinstance(transient, set):
            raise ToolError(f"its layer {prefix} has a {_kind(transient)} of transient buffers; the file is damaged")
        for name, value in _members(module, "_parameters").items():
            if value is not None:
                state[prefix + name] = value
        for name, value in _members(module, "_buffers").items():
            if value is not None and name not in transient:
                state[prefix + name] = value
        if len(state) > MAX_TENSORS:
            raise ToolError(f"has more than {MAX_TENSORS} tensors, beyond any network of YOLOv5")
    return state


def check_model(model: Module, geometry: Geometry | None) -> list[str]:
    """Compare what the pickled network says about itself with its tensors, and return the class names.

    Raises ToolError for a network that `model_defs.yolov5` would answer differently from, or that contradicts itself.
    """
    if model.path not in MODEL_CLASSES:
        raise ToolError(f"holds a {model.path}, not a YOLOv5 detector; save its state_dict() instead")
    config = model.state.get("yaml")
    config = config if isinstance(config, dict) else {}
    multiples = (config.get("depth_multiple"), config.get("width_multiple"))
    if geometry is None or MULTIPLES[geometry.size[0]] != multiples:
        seen = geometry.size if geometry else "none of ours"
        raise ToolError(
            f"its depth and width multiples are {reprlib.repr(multiples)} and the shapes of its tensors those of size "
            f"{seen}; use one of the ten sizes n s m l x n6 s6 m6 l6 x6 of release 6 or 7"
        )
    for prefix, module in _walk(model):
        _check_layer(prefix.rstrip("."), module, geometry)
    return _class_names(model.state.get("names"), geometry.num_classes)


def _check_layer(name: str, module: Module, geometry: Geometry) -> None:
    if module.path == "models.common.Conv":
        activation = _members(module, "_modules").get("act")
        if not (isinstance(activation, Module) and activation.path == "torch.nn.modules.activation.SiLU"):
            path = activation.path if isinstance(activation, Module) else type(activation).__name__
            raise ToolError(
                f"its layer {name} has activation {path}; only SiLU, that of the official weights, is known"
            )
    elif module.path == "torch.nn.modules.batchnorm.BatchNorm2d" and module.state.get("eps") != BATCH_NORM_EPS:
        raise ToolError(
            f"its layer {name} has eps {reprlib.repr(module.state.get('eps'))}; YOLOv5 has {BATCH_NORM_EPS}"
        )
    elif module.path == "models.yolo.Detect":
        stride = module.state.get("stride")
        if not isinstance(stride, LazyTensor) or stride.shape != (len(geometry.strides),):
            raise ToolError(f"its head {name} has no strides for its {len(geometry.strides)} levels")
        if (values := stride.numbers().tolist()) != geometry.strides:
            raise ToolError(f"its strides are {values}; only {geometry.strides} are known for {geometry.size}")


def _class_names(names: Any, num_classes: int) -> list[str]:
    """From a list (release 6.1 and older) or a dict of index to name (newer)."""
    if isinstance(names, dict):
        if any(type(index) is not int for index in names) or sorted(names) != list(range(len(names))):
            raise ToolError("its class names are not numbered 0, 1, 2 ... without a gap")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise ToolError(f"its class names are a {_kind(names)} where a list or a dict belongs")
    return check_names(names, num_classes)


def check_names(names: list[Any], num_classes: int | None) -> list[str]:
    """`names` if they are printable texts, as many as classes."""
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.isprintable():
            raise ToolError(f"its class {index} is named {reprlib.repr(name)!a}, which is no printable text")
    if num_classes is not None and len(names) != num_classes:
        raise ToolError(f"names {len(names)} classes, but its head has {num_classes}; the file contradicts itself")
    return names


def _kind(value: Any) -> str:
    return value.path if isinstance(value, Module | Name) else type(value).__name__


def _members(module: Module, kind: str) -> dict[str, Any]:
    members = module.state.get(kind)
    if not isinstance(members, dict) or not all(isinstance(name, str) for name in members):
        raise ToolError(f"its {module.path} has no proper {kind}; the file is damaged")
    return members


def _walk(model: Module) -> list[tuple[str, Module]]:
    """Every layer with the prefix of its names, in torch's order: a layer before its members."""
    found: list[tuple[str, Module]] = []
    waiting: list[tuple[str, int, Module]] = [("", 0, model)]
    while waiting:
        prefix, depth, module = waiting.pop()
        found.append((prefix, module))
        # A pickle can make a layer its own member, or share it so often that walking would never end.
        if depth > MAX_MODULE_DEPTH or len(found) + len(waiting) > MAX_MODULES:
            raise ToolError(f"its layers are nested or shared beyond any network: more than {MAX_MODULES} or in a loop")
        for name, member in reversed(_members(module, "_modules").items()):
            if isinstance(member, Module):
                waiting.append((f"{prefix}{name}.", depth + 1, member))
            elif member is not None:
                raise ToolError(f"its layer {prefix}{name} is a {_kind(member)}; the file is damaged")
    return found
