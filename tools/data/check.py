"""One picture of a source: decoded, its boxes put into pixels and checked, and stored.

It runs in a process of its own, so nothing here imports torch.
"""

import hashlib
import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.errors import RequestError
from handlers.image import decode, sniff
from handlers.settings import Limits
from tools.data.formats.source import Label, Problem, SourcePicture

LIMITS = Limits(max_bytes=100_000_000)
MOST_FRACTION = 2.0  # beyond, a number is no fraction of a picture but pixels
LEAST_SIDE = 0.1  # of a box, in pixels: below, it has no area that anyone could have drawn
SILENT_CLIP = 0.5  # pixels that a box may stick out, by rounding, without a word
JPEG_QUALITY = 95
SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",)}


@dataclass(frozen=True, slots=True)
class CheckedBox:
    """x1 y1 x2 y2 in pixels of the stored picture, upright."""

    name: str
    xyxy: tuple[float, float, float, float]
    crowd: bool


@dataclass(frozen=True, slots=True)
class CheckedPicture:
    """file: the stored bytes. name: of the source, with the suffix of what is stored.

    content: hash of the upright pixels of the source. A picture saved twice with other metadata is the same one;
    compressed anew, it is another.
    """

    file: Path
    name: str
    split: str | None
    width: int
    height: int
    content: str
    boxes: tuple[CheckedBox, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """target: where to store the picture. max_side: the longest side to store, or None for as it is."""

    source: SourcePicture
    target: Path
    max_side: int | None = None


def check(job: Job) -> tuple[CheckedPicture | None, list[Problem]]:
    """None for a picture that cannot be used. Raises OSError when the picture cannot be stored."""
    source = job.source
    try:
        if source.file.stat().st_size > LIMITS.max_bytes:
            raise OSError(f"more than {LIMITS.max_bytes:,} bytes")
        body = source.file.read_bytes()
        if not body:
            raise OSError("the file is empty")
        pixels = decode(body, LIMITS)
    except (OSError, RequestError) as error:
        return None, [Problem("dropped", source.name, f"picture cannot be read ({error})", 1, len(source.labels))]
    height, width, _ = pixels.shape
    problems = _size_problem(source, width, height)
    boxes = []
    for label in source.labels:
        box, problem = _to_pixels(label, width, height)
        problems += [problem] if problem else []
        if box:
            boxes.append(CheckedBox(label.name, box, label.crowd))
    if not boxes and (bad := len(source.labels) + source.unreadable):
        # Objects are on it, so as background it would teach that there are none.
        return None, [*problems, Problem("dropped", source.name, f"none of its {bad} boxes can be used", pictures=1)]
    content = hashlib.sha256(f"{width}x{height}:".encode())
    content.update(pixels.data)
    name = source.name
    if job.max_side and max(width, height) > job.max_side:
        body, suffix, (new_width, new_height) = _downscaled(body, pixels, job.max_side)
        boxes = [_scaled(box, new_width / width, new_height / height) for box in boxes]
        width, height = new_width, new_height
        if Path(name).suffix.lower() not in suffix:
            name = str(Path(name).with_suffix(suffix[0]))
    job.target.write_bytes(body)
    return CheckedPicture(job.target, name, source.split, width, height, content.hexdigest(), tuple(boxes)), problems


def _size_problem(source: SourcePicture, width: int, height: int) -> list[Problem]:
    if source.size in (None, (width, height)):
        return []
    stated = f"{source.size[0]}x{source.size[1]}" if source.size else ""
    reason = f"the labels say {stated}, the upright picture has {width}x{height}; boxes are taken as they stand"
    return [Problem("changed", source.name, reason, pictures=1)]


def _to_pixels(
    label: Label, width: int, height: int
) -> tuple[tuple[float, float, float, float] | None, Problem | None]:
    """The box inside the picture, in pixels; None for one that cannot be used. And what there is to report."""
    box = label.box
    if not all(math.isfinite(value) for value in box):
        return None, _dropped(label, "a coordinate is not a finite number")
    if label.unit != "pixel_xyxy" and max(map(abs, box)) > MOST_FRACTION:
        return None, _dropped(label, "pixels where fractions of the picture belong")
    x1, y1, x2, y2 = box
    if label.unit == "fraction_cxcywh":
        cx, cy, w, h = box
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    if label.unit != "pixel_xyxy":
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    if x2 - x1 < LEAST_SIDE or y2 - y1 < LEAST_SIDE:
        return None, _dropped(label, f"no area: {x2 - x1:.4g} x {y2 - y1:.4g} pixels")
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if inside[2] - inside[0] < LEAST_SIDE or inside[3] - inside[1] < LEAST_SIDE:
        return None, _dropped(label, f"outside of the picture of {width}x{height}")
    out = max(abs(a - b) for a, b in zip(inside, (x1, y1, x2, y2), strict=True))
    problem = None
    if out > SILENT_CLIP:
        reason = f"clipped: {out:.4g} pixels outside of the picture of {width}x{height}"
        problem = Problem("changed", label.where, reason, boxes=1)
    # Ten-thousandths of a pixel keep the files small, and are what they were on every machine.
    return (round(inside[0], 4), round(inside[1], 4), round(inside[2], 4), round(inside[3], 4)), problem


def _dropped(label: Label, reason: str) -> Problem:
    values = " ".join(f"{value:g}" for value in label.box)
    return Problem("dropped", label.where, f"{reason} ({label.name}: {values})", boxes=1)


def _downscaled(body: bytes, pixels: np.ndarray, max_side: int) -> tuple[bytes, tuple[str, ...], tuple[int, int]]:
    """The encoded smaller picture, the suffixes that fit it, and its width and height."""
    height, width, _ = pixels.shape
    scale = max_side / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kind = "JPEG" if sniff(body) in ("JPEG", "WEBP") else "PNG"
    buffer = BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(buffer, kind, quality=JPEG_QUALITY)
    return buffer.getvalue(), SUFFIXES[kind], size


def _scaled(box: CheckedBox, across: float, down: float) -> CheckedBox:
    x1, y1, x2, y2 = box.xyxy
    return CheckedBox(
        box.name, (round(x1 * across, 4), round(y1 * down, 4), round(x2 * across, 4), round(y2 * down, 4)), box.crowd
    )
