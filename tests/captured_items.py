"""Items as a capture keeps them, made by hand."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.image import ORIENTATION
from tools.data.draw import draw_scene

DAY = "2026-11-20"


def item_id(number: int) -> str:
    return f"0199{number:04x}-0000-7000-8000-{number:012x}"


def scene(seed: int, width: int = 96, height: int = 64, orientation: int = 1) -> bytes:
    """A JPEG of drawn shapes. orientation: EXIF's; from 5 on the upright picture has width and height the other way."""
    image = draw_scene(np.random.default_rng(seed), width, height)[0]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def write_item(
    folder: Path,
    number: int,
    picture: bytes,
    size: tuple[int, int],
    detections: Sequence[tuple[str, float, tuple[float, float, float, float]]] = (),
    **changes: object,
) -> str:
    """Its id. size: width and height of the upright picture. detections: label, score, box."""
    name = item_id(number)
    content = {
        "id": name,
        "time": f"{DAY}T10:00:{number % 60:02d}+00:00",
        "image": f"{name}.jpg",
        "model": "shapes",
        "version": "1.0",
        "checksum": "0" * 64,
        "reasons": ["near-threshold", "random"],
        "width": size[0],
        "height": size[1],
        "detections": [{"label": label, "index": 0, "score": score, "box": box} for label, score, box in detections],
        "score_threshold": 0.25,
        "blurred": False,
    }
    day = folder / DAY
    day.mkdir(parents=True, exist_ok=True)
    (day / f"{name}.jpg").write_bytes(picture)
    (day / f"{name}.json").write_text(json.dumps(content | changes))
    return name
