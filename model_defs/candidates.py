"""Candidates from what YOLO networks give, whatever has executed them."""

import torch
from torch import Tensor

from model_defs.contract import Detections


def from_rows(
    rows: Tensor, pictures: Tensor, count: int, score_threshold: float, multi_label: bool = False
) -> list[Detections]:
    """The best class of every box, or every class if `multi_label`, whose score, objectness x class score, is
    above `score_threshold`; for each of `count` pictures.

    rows: `[M, 5 + classes]`: centre x, centre y, width, height in pixels, objectness and class scores in 0..1, as
        YOLOv5's head gives them. The boxes come out as xyxy in the same pixels. pictures: `[M]`, whose each row is.
    """
    likely = rows[:, 4] > score_threshold
    rows, pictures = rows[likely], pictures[likely]
    class_scores = rows[:, 5:] * rows[:, 4:5]
    if multi_label:
        keep, labels = (class_scores > score_threshold).nonzero(as_tuple=True)
        scores = class_scores[keep, labels]
    else:
        scores, labels = class_scores.max(dim=1)
        (keep,) = (scores > score_threshold).nonzero(as_tuple=True)
        scores, labels = scores[keep], labels[keep]
    centre, half = rows[keep, :2], rows[keep, 2:4] / 2
    found = Detections(torch.cat((centre - half, centre + half), dim=1), labels, scores)
    if count == 1:
        return [found]
    pictures = pictures[keep]
    return [Detections(*(part[pictures == index] for part in found)) for index in range(count)]
