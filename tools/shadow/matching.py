"""Two answers to one picture: which of their detections are the same objects.

Boxes pair up by class and place alone, the pair of highest IoU first, each box in one pair at most. What is left over
of the live model's is lost, of the candidate's gained. Classes go by their names, since two models may number them
otherwise.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt

from tools.evaluate.metrics import Floats, iou
from tools.strict import Strict

# A row of an answer in format `detections`: label, index, score, box (xyxy in pixels of the upright picture).
Row = Mapping[str, Any]


class Tolerance(Strict):
    """iou: from which on two boxes are one object. moved_iou: below which it counts as moved. score_change: above which
    its score counts as changed."""

    iou: float
    moved_iou: float
    score_change: float


class Counts(BaseModel):
    """Detections of one class: of each model, of both (`kept`), and among those of both the moved ones and those of
    another score. drift: the sum over those of both of candidate's less live model's score."""

    live: NonNegativeInt = 0
    candidate: NonNegativeInt = 0
    kept: NonNegativeInt = 0
    moved: NonNegativeInt = 0
    rescored: NonNegativeInt = 0
    drift: float = 0.0

    @property
    def lost(self) -> int:
        return self.live - self.kept

    @property
    def gained(self) -> int:
        return self.candidate - self.kept

    @property
    def agree(self) -> bool:
        return not (self.lost or self.gained or self.moved or self.rescored)

    def add(self, other: "Counts") -> None:
        for name in Counts.model_fields:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def compare(live: Sequence[Row], candidate: Sequence[Row], tolerance: Tolerance) -> dict[str, Counts]:
    """What became of each class that one of them found."""
    labels = dict.fromkeys(row["label"] for rows in (live, candidate) for row in rows)
    return {label: _count(_of(label, live), _of(label, candidate), tolerance) for label in labels}


def _of(label: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["label"] == label]


def _count(live: Sequence[Row], candidate: Sequence[Row], tolerance: Tolerance) -> Counts:
    counts = Counts(live=len(live), candidate=len(candidate))
    for one, other, overlap in pairs(_boxes(live), _boxes(candidate), tolerance.iou):
        change = candidate[other]["score"] - live[one]["score"]
        counts.kept += 1
        counts.moved += overlap < tolerance.moved_iou
        counts.rescored += abs(change) > tolerance.score_change
        counts.drift += change
    return counts


def _boxes(rows: Sequence[Row]) -> Floats:
    return np.array([row["box"] for row in rows], dtype=np.float64).reshape(-1, 4)


def pairs(one: Floats, other: Floats, least: float) -> Iterator[tuple[int, int, float]]:
    """`[N, 4]` and `[M, 4]` xyxy: rows of each that belong together, and their IoU, which is `least` or more."""
    overlap = iou(one, other)
    rows, columns = np.nonzero(overlap >= least)
    best_first = np.argsort(-overlap[rows, columns], kind="stable")
    taken: tuple[set[int], set[int]] = set(), set()
    for row, column in zip(rows[best_first].tolist(), columns[best_first].tolist(), strict=True):
        if row not in taken[0] and column not in taken[1]:
            taken[0].add(row)
            taken[1].add(column)
            yield row, column, float(overlap[row, column])
