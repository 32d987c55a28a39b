"""Boxes in pixels to Label Studio's regions in per cent, and back.

https://labelstud.io/guide/task_format: x and y of the upper left corner, width and height, each in per cent of the
picture as the browser shows it, which is upright; a rotation in degrees turns the rectangle clockwise about that
corner.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.labelstudio.config import Control

TYPE = "rectanglelabels"
LEAST_SIDE = 0.1  # of a box, in pixels: nobody could have drawn a smaller one

Box = tuple[float, float, float, float]


@dataclass
class Regions:
    """What an annotation says. boxes: label and xyxy in pixels of the upright picture. turned: how many of them are
    the upright boxes around rectangles that were turned. unusable: why a region gives no box."""

    boxes: list[tuple[str, Box]] = field(default_factory=list)
    turned: int = 0
    unusable: list[str] = field(default_factory=list)


def to_regions(
    detections: Iterable[Mapping[str, Any]], width: int, height: int, control: Control
) -> list[dict[str, Any]]:
    """detections: of an answer in the form `detections`. width, height: of the upright picture, in pixels."""
    regions = []
    for detection in detections:
        x1, y1, x2, y2 = detection["box"]
        value = {
            "x": x1 * 100 / width,
            "y": y1 * 100 / height,
            "width": (x2 - x1) * 100 / width,
            "height": (y2 - y1) * 100 / height,
            "rotation": 0,
            TYPE: [detection["label"]],
        }
        regions.append(
            {
                "from_name": control.name,
                "to_name": control.picture,
                "type": TYPE,
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": detection["score"],
                "value": value,
            }
        )
    return regions


def prediction(model_version: str, regions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Its score is that of the least sure box, by which Label Studio can put tasks in order; 0 without a box."""
    score = min((region["score"] for region in regions), default=0.0)
    return {"model_version": model_version, "score": score, "result": list(regions)}


def model_version(model: str, version: str) -> str:
    """One name for predictions that were pushed and live ones, so that none is asked for twice."""
    return f"{model} {version}"


def to_boxes(result: Iterable[Mapping[str, Any]], width: int, height: int) -> Regions:
    """result: of an annotation. width, height: of the upright picture, in pixels. Boxes are clipped to the picture."""
    found = Regions()
    for region in result:
        value = region.get("value", {})
        if not value.keys() & {"x", "points", "format"} and region.get("type") != TYPE:
            continue  # a choice or a text about the whole picture, or how two regions relate
        try:
            labels = value[TYPE]
            if region.get("type") != TYPE or not labels:
                raise ValueError("it has no label")
            if region.get("image_rotation"):
                raise ValueError("the picture was turned while it was drawn")
            box = _clipped(_corners(value, width, height), width, height)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = "it is no labelled rectangle" if isinstance(error, KeyError | TypeError) else str(error)
            found.unusable.append(why)
            continue
        found.turned += bool(value.get("rotation"))
        found.boxes += [(str(label), box) for label in labels]
    return found


def _corners(value: Mapping[str, Any], width: int, height: int) -> Box:
    """xyxy in pixels; of a rectangle that is turned, the upright box around it."""
    x, w = (float(value[key]) * width / 100 for key in ("x", "width"))
    y, h = (float(value[key]) * height / 100 for key in ("y", "height"))
    angle = math.radians(float(value.get("rotation") or 0))
    across = [x + a * math.cos(angle) - b * math.sin(angle) for a in (0, w) for b in (0, h)]
    down = [y + a * math.sin(angle) + b * math.cos(angle) for a in (0, w) for b in (0, h)]
    return min(across), min(down), max(across), max(down)


def _clipped(box: Box, width: int, height: int) -> Box:
    """Raises ValueError for a box without area in the picture, or with a coordinate that is no number."""
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    if not (x2 - x1 >= LEAST_SIDE and y2 - y1 >= LEAST_SIDE and all(map(math.isfinite, box))):
        raise ValueError("it has no area in the picture")
    # Ten-thousandths of a pixel, as `marina data prepare` keeps them.
    return round(x1, 4), round(y1, 4), round(x2, 4), round(y2, 4)
