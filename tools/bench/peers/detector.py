"""YOLOv5 in ONNX Runtime, with Pillow and numpy around it: what the peers have in common."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

SETTINGS = Path("peer.json")
PADDING = (114, 114, 114)


class Detector:
    """Takes the bytes of a picture, gives its detections; boxes are xyxy in its pixels. Several threads may call it."""

    def __init__(self) -> None:
        settings = json.loads(SETTINGS.read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        self.session = onnxruntime.InferenceSession(settings["network"], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.labels: list[str] = settings["labels"]
        self.size: int = settings["size"]
        self.score_threshold: float = settings["score_threshold"]
        self.iou_threshold: float = settings["iou_threshold"]

    def __call__(self, body: bytes) -> dict[str, Any]:
        image = Image.open(io.BytesIO(body)).convert("RGB")
        scale = self.size / max(image.size)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (self.size - resized.width) // 2, (self.size - resized.height) // 2
        canvas = Image.new("RGB", (self.size, self.size), PADDING)
        canvas.paste(resized, (left, top))
        pixels = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1)[None] / 255
        rows = self.session.run(None, {self.input: pixels})[0][0]
        boxes, scores, labels = self.select(rows)
        boxes = (boxes - np.array([left, top, left, top])) / scale
        boxes = boxes.clip(0, [image.width, image.height, image.width, image.height])
        return {
            "detections": [
                {"label": self.labels[label], "score": float(score), "box": box.tolist()}
                for box, score, label in zip(boxes, scores, labels, strict=True)
            ]
        }

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Threshold and suppression. rows: `[N, 5 + classes]`, centre x and y, width, height, objectness, classes."""
        rows = rows[rows[:, 4] > self.score_threshold]
        scores = rows[:, 5:] * rows[:, 4:5]
        labels = scores.argmax(axis=1)
        scores = scores.max(axis=1)
        keep = scores > self.score_threshold
        rows, scores, labels = rows[keep], scores[keep], labels[keep]
        boxes = np.concatenate((rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2), axis=1)
        chosen = self.suppress(boxes + labels[:, None] * 10_000, scores)  # classes apart do not overlap
        return boxes[chosen], scores[chosen], labels[chosen]

    def suppress(self, boxes: np.ndarray, scores: np.ndarray) -> list[int]:
        """Indices of the boxes that no better one overlaps."""
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        order, chosen = scores.argsort()[::-1], []
        while len(order):
            best, order = order[0], order[1:]
            chosen.append(int(best))
            corner = np.maximum(boxes[best, :2], boxes[order, :2])
            sides = (np.minimum(boxes[best, 2:], boxes[order, 2:]) - corner).clip(0)
            shared = sides[:, 0] * sides[:, 1]
            order = order[shared / (areas[best] + areas[order] - shared) <= self.iou_threshold]
        return chosen
