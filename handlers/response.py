"""Detections to the bytes of an answer, in one of the formats of `settings.FORMATS`."""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from handlers.drawing import class_colour, draw_boxes
from handlers.errors import InvalidOption, RequestError
from model_defs.contract import Detections

JSON = "application/json"
# A thousandth of a pixel and a millionth of a score: below what two machines agree on.
BOX_DIGITS = 3
SCORE_DIGITS = 6
# TorchServe kills a worker whose answer is larger than 6,553,500 bytes.
MAX_ANSWER_BYTES = 6_000_000
MAX_JPEG_SIDE = 65_500


class Context(NamedTuple):
    """What an answer says beside its detections. height, width: of the upright picture in pixels."""

    model: str
    version: str
    labels: Sequence[str]
    height: int
    width: int
    timing_ms: dict[str, float]


def error_answer(error: RequestError) -> tuple[bytes, str]:
    """TorchServe's form of an error."""
    body = {"code": error.status, "type": type(error).__name__, "message": str(error)}
    return json.dumps(body).encode(), JSON


def kserve_answer(predictions: list[Any]) -> tuple[bytes, str]:
    """KServe V1's form around the answers to several pictures. Raises InvalidOption when they are too long together."""
    body = json.dumps({"predictions": predictions}).encode()
    if len(body) > MAX_ANSWER_BYTES:
        raise InvalidOption(
            f"the answer to {len(predictions)} instances would have {len(body)} bytes, more than {MAX_ANSWER_BYTES};"
            " send fewer, or lower max_detections"
        )
    return body, JSON


def json_answer(detections: Detections, form: str, context: Context) -> Any:
    """The answer as JSON values: formats torchserve, detections and coco."""
    rows = list(_rows(detections))
    if form == "torchserve":
        return [{context.labels[label]: box, "score": score} for box, label, score in rows]
    if form == "coco":
        return [
            {"category_id": label, "bbox": [x1, y1, _rounded(x2 - x1), _rounded(y2 - y1)], "score": score}
            for (x1, y1, x2, y2), label, score in rows
        ]
    return {
        "model": context.model,
        "version": context.version,
        "width": context.width,
        "height": context.height,
        "detections": [
            {"label": context.labels[label], "index": label, "score": score, "box": box} for box, label, score in rows
        ],
        "timing_ms": context.timing_ms,
    }


def render(detections: Detections, form: str, context: Context, pixels: np.ndarray | None) -> tuple[bytes, str]:
    """An answer and its content type. pixels: the picture, `[H, W, 3]` uint8, for format image."""
    if form == "yolo":
        return _yolo_text(detections, context).encode(), "text/plain; charset=utf-8"
    if form == "image":
        assert pixels is not None
        return draw(pixels, detections, context.labels), "image/jpeg"
    return json.dumps(json_answer(detections, form, context)).encode(), JSON


def _rows(detections: Detections) -> Any:
    boxes = [[_rounded(value) for value in box] for box in detections.boxes.tolist()]
    scores = [round(score, SCORE_DIGITS) for score in detections.scores.tolist()]
    return zip(boxes, detections.labels.tolist(), scores, strict=True)


def _rounded(value: float) -> float:
    return round(value, BOX_DIGITS)


def _yolo_text(detections: Detections, context: Context) -> str:
    lines = []
    for (x1, y1, x2, y2), label, score in zip(
        detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True
    ):
        cx, cy = (x1 + x2) / 2 / context.width, (y1 + y2) / 2 / context.height
        width, height = (x2 - x1) / context.width, (y2 - y1) / context.height
        lines.append(f"{label} {cx:.6f} {cy:.6f} {width:.6f} {height:.6f} {score:.6f}\n")
    return "".join(lines)


def draw(pixels: np.ndarray, detections: Detections, labels: Sequence[str]) -> bytes:
    """The picture with boxes, names and scores drawn on it, as JPEG; a class keeps its colour."""
    rows = list(_rows(detections))
    captions = [f"{labels[label]} {score:.2f}" for _, label, score in rows]
    return _jpeg(
        draw_boxes(pixels, [box for box, _, _ in rows], captions, [class_colour(label) for _, label, _ in rows])
    )


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        if buffer.tell() <= MAX_ANSWER_BYTES:
            return buffer.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
