"""Copies of one picture become one, with the labels of all."""

from collections.abc import Sequence
from dataclasses import replace

from tools.data.check import CheckedBox, CheckedPicture
from tools.data.formats.source import Problem

SAME_IOU = 0.9  # above, two boxes of a class are one object labelled twice
# Where a picture stays that lies in several splits: nothing that is tested on may be trained on.
STAYS = {"test": 0, "valid": 1, "train": 2, None: 3}


def merge_copies(pictures: Sequence[CheckedPicture]) -> tuple[list[CheckedPicture], list[Problem]]:
    """Of the pictures with the same content the one in test, else valid, else train; of those the first."""
    groups: dict[str, list[CheckedPicture]] = {}
    for picture in pictures:
        groups.setdefault(picture.content, []).append(picture)
    kept, problems = [], []
    for copies in groups.values():
        first, *others = sorted(copies, key=lambda picture: STAYS[picture.split])
        boxes = list(first.boxes)
        for other in others:
            new = _new_boxes(other.boxes, boxes)
            boxes += new
            merged = len(other.boxes) - len(new)
            reason = f"the same picture as {first.name}, which stays; {merged} of {len(other.boxes)} boxes are its own"
            if other.split != first.split:
                reason += f"; this copy was in {other.split}, that one is in {first.split}"
            problems.append(Problem("merged", other.name, reason, 1, merged))
        kept.append(replace(first, boxes=tuple(boxes)))
    return kept, problems


def _new_boxes(boxes: Sequence[CheckedBox], known: Sequence[CheckedBox]) -> list[CheckedBox]:
    """Those that are not among the known ones; a known box stands for one box only."""
    free = list(known)
    new = []
    for box in boxes:
        same = next((other for other in free if _same(box, other)), None)
        if same is None:
            new.append(box)
        else:
            free.remove(same)
    return new


def _same(one: CheckedBox, other: CheckedBox) -> bool:
    return one.name == other.name and one.crowd == other.crowd and _iou(one.xyxy, other.xyxy) > SAME_IOU


def _iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)
