"""Figures that compare what was found on pictures with what is there.

Boxes are xyxy in pixels of the upright picture, labels count the data set's classes from 0. A detection hits a truth
of its own class at an IoU of at least 0.5 (for average precision also at 0.55 to 0.95). Detections choose in the
order of falling score, the free truth of highest IoU; each truth is hit once. A crowd truth is neither missed nor
hit, and what lies in it is no false alarm.

What cannot be said is NaN: precision where nothing was found, recall where nothing is there, F where nothing is there
and nothing was found. F is 0 as soon as something was missed or falsely found and nothing was hit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tools.data.dataset import Picture

if TYPE_CHECKING:
    from model_defs.contract import Detections

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

HIT_IOU = 0.5
# COCO's: ten thresholds, and of each class the best hundred detections of a picture.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_RANKED = 100
# Where curves are drawn and the best threshold is looked for: every threshold of three digits.
SCORE_THRESHOLDS = np.arange(1000) / 1000
HIT, FALSE_ALARM, IGNORED = 1, 0, -1


class Truth(NamedTuple):
    """What is there in one picture. boxes: `[N, 4]`. labels: `[N]`. crowd: `[N]`, whether it is a crowd region."""

    boxes: Floats
    labels: Integers
    crowd: NDArray[np.bool_]


class Found(NamedTuple):
    """`Detections` as arrays, for what has no need of torch. boxes: `[N, 4]`. labels, scores: `[N]`."""

    boxes: Floats
    labels: Integers
    scores: Floats


AnyFound = Union["Detections", Found]


def truth_of(picture: Picture) -> Truth:
    return Truth(
        np.array([box.xyxy for box in picture.boxes], dtype=np.float64).reshape(-1, 4),
        np.array([box.label for box in picture.boxes], dtype=np.int64),
        np.array([box.crowd for box in picture.boxes], dtype=bool),
    )


def found_of(boxes: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> Found:
    """From lists, arrays or tensors on the CPU; they may be empty."""
    return Found(
        np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        np.asarray(labels, dtype=np.int64),
        np.asarray(scores, dtype=np.float64),
    )


class AveragePrecision(NamedTuple):
    """COCO's figures; NaN where there is no truth. small, medium, large: map50_95 of truths of less than 32 x 32
    pixels, up to 96 x 96, and beyond, measured by their boxes. ap50, ap: `[num_classes]`, at 0.5 and at 0.5 to 0.95.
    precision_at: `[101, num_classes]`, at recalls of 0, 0.01, ... 1 and an IoU of 0.5.
    """

    map50: float
    map50_95: float
    map75: float
    small: float
    medium: float
    large: float
    ap50: Floats
    ap: Floats
    precision_at: Floats


def average_precision(truths: Sequence[Truth], found: Sequence[AnyFound], num_classes: int) -> AveragePrecision:
    """As COCO defines it (https://cocodataset.org/#detection-eval): the mean over IoU thresholds and classes of the
    mean precision at 101 recalls."""
    from faster_coco_eval import COCO, COCOeval_faster

    there: list[dict[str, Any]] = []
    claimed: list[dict[str, Any]] = []
    for picture, (truth, each) in enumerate(zip(truths, found, strict=True)):
        for box, label, crowd in zip(*(part.tolist() for part in truth), strict=True):
            there.append(_annotation(len(there), picture, box, label, iscrowd=int(crowd)))
        for box, label, score in zip(*(part.tolist() for part in found_of(*each)), strict=True):
            claimed.append(_annotation(len(claimed), picture, box, label, iscrowd=0, score=score))
    names = {
        "images": [{"id": picture} for picture in range(len(truths))],
        "categories": [{"id": label} for label in range(num_classes)],
    }
    evaluation = COCOeval_faster(
        COCO(names | {"annotations": there}), COCO(names | {"annotations": claimed}), iouType="bbox"
    )
    evaluation.params.maxDets = [MAX_RANKED]
    evaluation.evaluate()
    evaluation.accumulate()
    # [IoU, recall, class, size, 1]; -1 where a class has no truth of a size.
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])[..., 0]
    by_iou = precision.mean(axis=1)
    small, medium, large = (_mean(by_iou[:, :, size]) for size in (1, 2, 3))
    by_iou = by_iou[:, :, 0]
    ap50, ap75, ap = by_iou[0], by_iou[5], by_iou.mean(axis=0)
    precision_at = precision[0, :, :, 0]
    return AveragePrecision(_mean(ap50), _mean(ap), _mean(ap75), small, medium, large, ap50, ap, precision_at)


def _annotation(index: int, picture: int, box: Sequence[float], label: int, **more: float) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    place = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    # 0 would mean "no annotation" to the evaluation.
    return {"id": index + 1, "image_id": picture, "category_id": label} | place | more


def _mean(values: Floats) -> float:
    """Of those that are not NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def fitness(ap: AveragePrecision) -> float:
    """What tells one checkpoint of a training run from another: mostly mAP50-95, as YOLOv5 weighs them."""
    return 0.1 * ap.map50 + 0.9 * ap.map50_95


class Matches(NamedTuple):
    """Every detection and what became of it, at each of some IoU thresholds.

    picture, label, score: `[N]`; pictures in order, in each its classes, in each falling scores.
    state: `[N, thresholds]` int8 of HIT, FALSE_ALARM, IGNORED. there: `[pictures, num_classes]` truths, crowds apart.
    """

    picture: Integers
    label: Integers
    score: Floats
    state: NDArray[np.int8]
    there: Integers


def match(
    truths: Sequence[Truth],
    found: Sequence[AnyFound],
    num_classes: int,
    iou_thresholds: Sequence[float] | Floats = (HIT_IOU,),
    limit: int | None = None,
) -> Matches:
    """limit: so many detections of a class in a picture, the best ones; the others are left out."""
    there = np.zeros((len(truths), num_classes), dtype=np.int64)
    pictures, labels, scores, states = [], [], [], []
    for picture, (truth, each) in enumerate(zip(truths, map(_arrays, found), strict=True)):
        np.add.at(there[picture], truth.labels[~truth.crowd], 1)
        order = np.argsort(-each.scores, kind="stable")
        for label in np.unique(each.labels):
            rows = order[each.labels[order] == label][:limit]
            same = truth.labels == label
            states.append(_states(each.boxes[rows], truth.boxes[same], truth.crowd[same], iou_thresholds))
            pictures.append(np.full(len(rows), picture))
            labels.append(each.labels[rows])
            scores.append(each.scores[rows])
    if not scores:
        nothing = np.zeros(0, dtype=np.int64)
        return Matches(nothing, nothing, np.zeros(0), np.zeros((0, len(iou_thresholds)), dtype=np.int8), there)
    return Matches(
        np.concatenate(pictures), np.concatenate(labels), np.concatenate(scores), np.concatenate(states), there
    )


def _arrays(found: AnyFound) -> Found:
    return found_of(*found)


def _states(
    boxes: Floats, truths: Floats, crowd: NDArray[np.bool_], iou_thresholds: Sequence[float] | Floats
) -> NDArray[np.int8]:
    """`[N, thresholds]` for the detections of one class in one picture, best first."""
    states = np.full((len(boxes), len(iou_thresholds)), FALSE_ALARM, dtype=np.int8)
    overlap = iou(boxes, truths[~crowd])
    inside = _share_inside(boxes, truths[crowd])
    for column, threshold in enumerate(iou_thresholds):
        free = overlap.copy()
        for row in np.flatnonzero(overlap.max(axis=1, initial=0) >= threshold):
            best = free[row].argmax()
            if free[row, best] >= threshold:
                states[row, column] = HIT
                free[:, best] = 0
        states[(states[:, column] == FALSE_ALARM) & (inside >= threshold), column] = IGNORED
    return states


def iou(one: Floats, other: Floats) -> Floats:
    """`[N, 4]` and `[M, 4]` xyxy to `[N, M]`."""
    common = _intersection(one, other)
    together = _area(one)[:, None] + _area(other) - common
    return np.divide(common, together, out=np.zeros_like(common), where=together > 0)


def _share_inside(boxes: Floats, crowds: Floats) -> Floats:
    """`[N]`: the largest share of a box that lies in one crowd region, which is what COCO asks of crowds."""
    area = _area(boxes)[:, None]
    common = _intersection(boxes, crowds)
    return np.divide(common, area, out=np.zeros_like(common), where=area > 0).max(axis=1, initial=0)


def _intersection(one: Floats, other: Floats) -> Floats:
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=2)


def _area(boxes: Floats) -> Floats:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)


class Counts(NamedTuple):
    """tp: detections that hit. fp: false alarms. fn: truths missed. Arrays of one shape; their rates are NaN where
    the module's docstring says so."""

    tp: Integers
    fp: Integers
    fn: Integers

    @property
    def precision(self) -> Floats:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> Floats:
        return _ratio(self.tp, self.tp + self.fn)

    def f(self, beta: int) -> Floats:
        """(1 + beta²) TP / ((1 + beta²) TP + beta² FN + FP); 2 counts a miss four times a false alarm."""
        weight = beta**2
        return _ratio((1 + weight) * self.tp, (1 + weight) * self.tp + weight * self.fn + self.fp)

    def total(self, axis: int = -1) -> "Counts":
        """Summed, over the classes unless another axis is given."""
        return Counts(self.tp.sum(axis=axis), self.fp.sum(axis=axis), self.fn.sum(axis=axis))

    def rates(self) -> dict[str, Floats]:
        return {"precision": self.precision, "recall": self.recall, "f1": self.f(1), "f2": self.f(2)}


def _ratio(part: Integers, whole: Integers) -> Floats:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def tally(matches: Matches) -> Counts:
    """`[pictures, num_classes]` at the first IoU threshold of the matches."""
    tp, fp = np.zeros_like(matches.there), np.zeros_like(matches.there)
    for counts, state in ((tp, HIT), (fp, FALSE_ALARM)):
        rows = matches.state[:, 0] == state
        np.add.at(counts, (matches.picture[rows], matches.label[rows]), 1)
    return Counts(tp, fp, matches.there - tp)


@dataclass(frozen=True)
class Curves:
    """How the counts depend on the score threshold. As in serving, a detection counts when its score is above it.

    scores, tp, fp: for each class its scores, best first, and what the detections down to each of them, none at
    first, hit and falsely find. there: `[num_classes]` truths.
    """

    scores: list[Floats]
    tp: list[Integers]
    fp: list[Integers]
    there: Integers

    def over(self, thresholds: ArrayLike) -> Counts:
        """`[thresholds, num_classes]`; exact, nothing is interpolated."""
        kept = [np.searchsorted(-scores, -np.asarray(thresholds), side="left") for scores in self.scores]
        tp = np.stack([counts[index] for counts, index in zip(self.tp, kept, strict=True)], axis=-1)
        fp = np.stack([counts[index] for counts, index in zip(self.fp, kept, strict=True)], axis=-1)
        return Counts(tp, fp, self.there - tp)

    def at(self, threshold: float) -> Counts:
        """`[num_classes]` at one threshold."""
        return self.over(threshold)

    def best(self, beta: int) -> tuple[float, float]:
        """The threshold of three digits, the lowest of equals, that gives the best F over all classes; and that F.

        Over all classes is over their summed counts, so that every box weighs the same. (0, NaN) where nothing is
        there and nothing was found.
        """
        values = self.over(SCORE_THRESHOLDS).total().f(beta)
        index = int(np.argmax(np.nan_to_num(values, nan=-1)))
        return float(SCORE_THRESHOLDS[index]), float(values[index])


def operating_points(truths: Sequence[Truth], found: Sequence[AnyFound], num_classes: int) -> Curves:
    """What the detector does at each score threshold, by hits at an IoU of at least 0.5."""
    matches = match(truths, found, num_classes)
    curves = Curves([], [], [], matches.there.sum(axis=0))
    order = np.argsort(-matches.score, kind="stable")
    for label in range(num_classes):
        rows = order[matches.label[order] == label]
        curves.scores.append(matches.score[rows])
        for counts, state in ((curves.tp, HIT), (curves.fp, FALSE_ALARM)):
            counts.append(np.concatenate(([0], np.cumsum(matches.state[rows, 0] == state))))
    return curves


def confusion_matrix(
    truths: Sequence[Truth],
    found: Sequence[AnyFound],
    num_classes: int,
    score_threshold: float,
    iou_threshold: float = HIT_IOU,
) -> Integers:
    """`[num_classes + 1, num_classes + 1]`: rows are what is there, columns what was found, the last is background.

    Detections with a score above the threshold and truths are paired whatever their classes, those of highest IoU
    first, each once.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for truth, each in zip(truths, map(_arrays, found), strict=True):
        order = np.argsort(-each.scores, kind="stable")
        order = order[each.scores[order] > score_threshold]
        boxes, labels = each.boxes[order], each.labels[order]
        solid = truth.labels[~truth.crowd]
        overlap = iou(boxes, truth.boxes[~truth.crowd])
        rows, columns = np.unravel_index(np.argsort(-overlap, axis=None, kind="stable"), overlap.shape)
        taken, missed = np.zeros(len(labels), dtype=bool), np.ones(len(solid), dtype=bool)
        for row, column in zip(rows, columns, strict=True):
            if overlap[row, column] < iou_threshold:
                break
            if not taken[row] and missed[column]:
                taken[row], missed[column] = True, False
                matrix[solid[column], labels[row]] += 1
        np.add.at(matrix[:, num_classes], solid[missed], 1)
        for row in np.flatnonzero(~taken):
            of_class = truth.boxes[truth.crowd & (truth.labels == labels[row])]
            if _share_inside(boxes[[row]], of_class)[0] < iou_threshold:
                matrix[num_classes, labels[row]] += 1
    return matrix
