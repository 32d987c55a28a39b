"""Open any checkpoint that we take, whatever its suffix says."""

import contextlib
import json
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tools.checkpoint import yolov5
from tools.checkpoint.safetensors_format import read_safetensors
from tools.checkpoint.tensors import LazyTensor
from tools.checkpoint.torch_format import TorchFile
from tools.checkpoint.unpickle import Module
from tools.errors import ToolError

Kind = Literal["safetensors", "state_dict", "lightning", "yolov5"]

METADATA_PREFIX = "marina."
# Tied weights and views may use the bytes of the file more than once, but not without end.
MAX_EXPANSION = 8
LEGACY_TORCH = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
RESAVE = "torch.save(torch.load(FILE, weights_only=True), NEW)"
# What other files begin with, and what to do about them.
OTHER_FILES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<": "is a web page or XML, not weights; the download failed: download it again",
    b"\x89HDF": "is an HDF5 file (Keras); give a PyTorch checkpoint or .safetensors",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\x80": "is a bare pickle, not written by torch.save; save the state_dict with torch.save or as safetensors",
}


@dataclass
class Checkpoint:
    """Weights, and what the file tells about them. Close it (or use `with`) after the tensors are read.

    tensors: in the order of the state dict. names: the classes, first class first. strides: pixels a cell, a level.
    anchors: `[level][anchor] = (width, height)` in pixels. size: of YOLOv5. metadata: what a safetensors file
    made from this says in its header, so that it can be read back. Absent knowledge is None.
    """

    path: Path
    kind: Kind
    tensors: dict[str, LazyTensor]
    names: list[str] | None = None
    anchors: list[list[tuple[float, float]]] | None = None
    strides: list[int] | None = None
    size: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    file: BinaryIO | None = field(default=None, repr=False)

    def close(self) -> None:
        if self.file:
            self.file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read everything but the tensors' bytes.

    Takes safetensors, and of torch.save: a state dict, a Lightning checkpoint, an official YOLOv5 checkpoint of
    release 6 or 7. Raises UnsafePickle for a pickle that names what no checkpoint needs (nothing of it is run), and
    ToolError for any other file, damaged or contradictory.
    """
    with contextlib.ExitStack() as on_error:
        try:
            file = on_error.enter_context(path.open("rb"))
            checkpoint = _read(path, file)
        except OSError as error:
            raise ToolError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ToolError as error:
            raise type(error)(f"{path}: {error}") from error
        on_error.pop_all()
    return checkpoint


def _read(path: Path, file: BinaryIO) -> Checkpoint:
    beginning = file.read(64)
    if beginning.startswith(b"PK\x03\x04"):
        checkpoint = _from_torch(path, TorchFile(file).load())
    elif beginning[8:9] == b"{":
        tensors, metadata = read_safetensors(file)
        checkpoint = Checkpoint(path, "safetensors", _check_tensors(tensors), metadata=metadata)
        checkpoint.names = _names_from(metadata)
    else:
        raise ToolError(_what_it_is(path, beginning))
    checkpoint.file = file

    total, size = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), file.seek(0, 2)
    if total > MAX_EXPANSION * size:
        raise ToolError(f"its tensors would take {total} bytes, more than {MAX_EXPANSION} times the file's {size}")
    _describe(checkpoint)
    return checkpoint


def _what_it_is(path: Path, beginning: bytes) -> str:
    if not beginning:
        return "is empty; copy or download it again"
    if beginning[2:].startswith(LEGACY_TORCH):
        return f"is in the format that torch wrote before 1.6; bring it up to date with {RESAVE}"
    for start, advice in OTHER_FILES.items():
        if beginning.lstrip().startswith(start):
            return advice
    if path.suffix == ".onnx":
        return "is an ONNX network; give the checkpoint that it was exported from"
    return (
        f"is no checkpoint that we know (it begins with {beginning[:8]!r}); give .safetensors, a state dict or a "
        "Lightning checkpoint of torch.save, or an official YOLOv5 .pt"
    )


def _from_torch(path: Path, content: Any) -> Checkpoint:
    if isinstance(content, Module):
        return Checkpoint(path, "yolov5", *_from_yolov5(content))
    if not isinstance(content, dict):
        raise ToolError(f"holds a {type(content).__name__} where a state dict belongs; save model.state_dict()")
    # A training run keeps the averaged weights as `ema` beside the raw ones; the official programs use the former.
    for member in ("ema", "model"):
        if isinstance(content.get(member), Module):
            return Checkpoint(path, "yolov5", *_from_yolov5(content[member]))
    if isinstance(content.get("state_dict"), dict):
        return Checkpoint(path, "lightning", _strip_prefix(_check_tensors(content["state_dict"]), "model."))
    for member in ("model", "model_state_dict"):
        if isinstance(content.get(member), dict):
            return Checkpoint(path, "state_dict", _strip_prefix(_check_tensors(content[member])))
    return Checkpoint(path, "state_dict", _strip_prefix(_check_tensors(content)))


def _from_yolov5(model: Module) -> tuple[dict[str, LazyTensor], list[str]]:
    tensors = _check_tensors(yolov5.state_dict_of(model))
    return tensors, yolov5.check_model(model, yolov5.geometry_of(tensors))


def _check_tensors(state: dict[Any, Any]) -> dict[str, LazyTensor]:
    if not state:
        raise ToolError("holds no tensor at all; save the state_dict of a model that has weights")
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ToolError(f"its state dict has the key {reprlib.repr(name)}, which is no tensor's name")
        if not isinstance(value, LazyTensor):
            raise ToolError(
                f"its entry {name[:80]!r} is a {type(value).__name__}, not a tensor; save model.state_dict() alone"
            )
    return state


def _strip_prefix(tensors: dict[str, LazyTensor], wrapper: str | None = None) -> dict[str, LazyTensor]:
    """Take away `module.` (DataParallel) and `wrapper` (the attribute of a Lightning module) where all names have it.

    A network that is itself a numbered list, such as YOLOv5's `model.0`, keeps its `model.`.
    """
    for prefix in filter(None, ("module.", wrapper, "module.")):
        bare = [name.removeprefix(prefix) for name in tensors]
        if all(name.startswith(prefix) for name in tensors) and not any(name[:1].isdigit() for name in bare):
            tensors = dict(zip(bare, tensors.values(), strict=True))
    return tensors


def _names_from(metadata: dict[str, str]) -> list[str] | None:
    text = metadata.get(f"{METADATA_PREFIX}names")
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"its metadata {METADATA_PREFIX}names is not JSON ({error}); import it again") from error
    if not isinstance(names, list):
        raise ToolError(f"its metadata {METADATA_PREFIX}names is a {type(names).__name__} where a list belongs")
    return yolov5.check_names(names, None)


def _describe(checkpoint: Checkpoint) -> None:
    """Fill in what the tensors tell, and the metadata that carries it on."""
    geometry = yolov5.geometry_of(checkpoint.tensors)
    if geometry:
        checkpoint.size, checkpoint.strides, checkpoint.anchors = geometry.size, geometry.strides, geometry.anchors
        if checkpoint.names is not None:
            yolov5.check_names(checkpoint.names, geometry.num_classes)
    known = {
        "names": checkpoint.names,
        "anchors": checkpoint.anchors,
        "strides": checkpoint.strides,
        "size": checkpoint.size,
    }
    checkpoint.metadata |= {"format": "pt"}
    checkpoint.metadata |= {
        METADATA_PREFIX + key: json.dumps(value, separators=(",", ":"))
        for key, value in known.items()
        if value is not None
    }
