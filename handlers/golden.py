"""Golden answers: what an archive has to find on its own pictures, wherever it runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_iou

from handlers.errors import BadArchive
from model_defs.contract import Detections

# Processors round differently; a wrong weight, colour order or resize goes far beyond this.
MIN_IOU = 0.95
MAX_BOX_DIFFERENCE = 0.5  # pixels; of a small box, the IoU is too strict, as stored boxes are rounded
MAX_SCORE_DIFFERENCE = 0.02


def load_golden(path: Path, labels: Sequence[str]) -> Detections:
    """An answer of format `detections`, as a JSON file. Raises BadArchive when it is not that."""
    try:
        rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))["detections"]
        found = Detections(
            torch.tensor([row["box"] for row in rows], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([labels.index(row["label"]) for row in rows], dtype=torch.int64),
            torch.tensor([row["score"] for row in rows], dtype=torch.float32),
        )
    except OSError as error:
        raise BadArchive(f"golden answer {path.name} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadArchive(f"golden answer {path.name} is not an answer of format detections ({error!r})") from error
    return found


def difference(expected: Detections, found: Detections, score_threshold: float) -> str | None:
    """What is wrong with `found`, in words; None when it agrees with `expected`.

    Boxes pair up by class, place and score. One that is alone counts only when its score is clearly above the
    threshold, since just there it may come or go.
    """
    clear = score_threshold + MAX_SCORE_DIFFERENCE
    iou = box_iou(expected.boxes, found.boxes)
    close = (expected.scores[:, None] - found.scores[None]).abs() <= MAX_SCORE_DIFFERENCE
    near = (expected.boxes[:, None] - found.boxes[None]).abs().amax(dim=2) <= MAX_BOX_DIFFERENCE
    pairs = ((iou >= MIN_IOU) | near) & close & (expected.labels[:, None] == found.labels[None])
    lost = (~pairs.any(dim=1) & (expected.scores > clear)).nonzero().flatten().tolist()
    gained = (~pairs.any(dim=0) & (found.scores > clear)).nonzero().flatten().tolist()
    if not lost and not gained:
        return None
    what, detections, first = ("missing", expected, lost[0]) if lost else ("unexpected", found, gained[0])
    box = [round(value, 1) for value in detections.boxes[first].tolist()]
    return (
        f"{len(lost)} detections missing, {len(gained)} unexpected; first {what}: label {int(detections.labels[first])}"
        f" score {float(detections.scores[first]):.3f} box {box}"
    )
