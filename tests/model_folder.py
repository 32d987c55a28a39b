"""A model folder as TorchServe extracts one, without trained weights; pictures and requests for it."""

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from handlers.pipeline import Answer, Pipeline
from model_defs import build

LABELS = ["cat", "dog", "salt, pepper", "person", "traffic light"]


def yolov5_weights(state: Mapping[str, Tensor], gain: float) -> dict[str, Tensor]:
    """Weights by the rule of `real/README.md`, so that every machine has the same ones."""
    made = {}
    for name, old in state.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        shape = tuple(old.shape)
        if name.endswith(("num_batches_tracked", "anchors")):
            made[name] = old
            continue
        if name.endswith("running_var"):
            values = 0.5 + generator.random(shape, dtype=np.float32)
        else:
            values = generator.standard_normal(shape, dtype=np.float32)
            if len(shape) == 4:
                values *= np.sqrt(gain / np.prod(shape[1:]), dtype=np.float32)
            elif name.endswith("bn.weight"):
                values = 1 + np.float32(0.1) * values
            else:
                values *= np.float32(0.2 if name.endswith(("bn.bias", "running_mean")) else 0.5)
        made[name] = torch.from_numpy(values)
    return made


def write_model(folder: Path, labels: list[str] = LABELS, **settings: Any) -> dict[str, Any]:
    """Fill `folder` with a YOLOv5n and return the parsed model-config.yaml. settings: of the handler, over these."""
    detector = build("yolov5", len(labels), size="n")
    state = yolov5_weights(detector.state_dict(), gain=2.5)
    head = f"model.{len(detector.model) - 1}.m"
    for level in range(3):  # scores well between 0 and 1, above the threshold in a few cells
        state[f"{head}.{level}.weight"] *= 0.15
        state[f"{head}.{level}.bias"].view(3, -1)[:, 4] -= 4
    save_file(state, folder / "model.safetensors")
    write_labels(folder, labels)
    handler = {
        "name": "small",
        "version": "1.0",
        "model": {"definition": "yolov5", "args": {"size": "n"}},
        "weights": "model.safetensors",
        "labels": "index_to_name.json",
        "preprocess": {"size": 320, "shape": "rect"},
        "postprocess": {},
        "limits": {},
        "response": {},
        "runtime": {},
        "device": "cpu",
        "golden": [],
    }
    # More workers than cores: one thread each.
    return {"minWorkers": 1, "maxWorkers": 64, "batchSize": 8, "handler": handler | settings}


def write_labels(folder: Path, labels: list[str]) -> None:
    table = {str(index): name for index, name in enumerate(labels)}
    (folder / "index_to_name.json").write_text(json.dumps(table))


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with something in it: coloured rectangles before a gradient, `[height, width, 3]` uint8."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack((rows * 255 // height, columns * 255 // width, (rows + columns) % 256), axis=-1).astype(np.uint8)
    for _ in range(12):
        top, left = generator.integers(height), generator.integers(width)
        bottom, right = top + 1 + generator.integers(height), left + 1 + generator.integers(width)
        pixels[top:bottom, left:right] = generator.integers(256, size=3)
    return pixels


def encode(picture: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """As close to lossless as the format can."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    faithful = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
    image.save(buffer, form, **faithful.get(form, {}) | options)
    return buffer.getvalue()


def oriented(pixels: np.ndarray, orientation: int, form: str = "PNG") -> bytes:
    """`pixels` as a camera held in another way stores them: lying, with the EXIF tag that turns them upright."""
    rows_then_columns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(np.ascontiguousarray(rows_then_columns[orientation]), form, exif=exif)


def assert_one_line(error: Exception, longest: int = 500) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) <= longest


def ask(pipeline: Pipeline, *requests: bytes | tuple[Any, Mapping[str, Any]]) -> list[Answer]:
    """The answers to one batch. A request is a raw body, or a row and its headers."""
    rows = [({"body": request}, {}) if isinstance(request, bytes) else request for request in requests]
    jobs = [pipeline.read(row, headers) for row, headers in rows]
    pipeline.infer(jobs)
    return [pipeline.respond(job) for job in jobs]
