"""One evaluation: what a source finds on a split, and every figure about it."""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.data.dataset import Dataset, Picture
from tools.evaluate.metrics import (
    IOU_THRESHOLDS,
    MAX_RANKED,
    AveragePrecision,
    Counts,
    Curves,
    Integers,
    Matches,
    average_precision,
    confusion_matrix,
    match,
    operating_points,
    tally,
    truth_of,
)
from tools.evaluate.sources import Answer, Source
from tools.progress import Progress

# The files of a stored evaluation.
RESULT = "evaluation.json"
MATCHES = "matches.npz"

STAGES = ("decode", "preprocess", "inference", "postprocess")
RATES = ("precision", "recall", "f1", "f2")
OVERALL = ("map50", "map50_95", "map75", *RATES)
PER_CLASS = ("ap50", "ap", *RATES)
CURVE = np.arange(101) / 100
WORST = 12


@dataclass(frozen=True)
class Evaluation:
    """name: what was evaluated. setting: how the detections for average precision were found. serving: how the others.

    answers: one a picture, in order. counts: of the served detections, `[pictures, num_classes]`. curves: of the
    same without a threshold. matches: of the detections for average precision, at COCO's IoU thresholds.
    notes: what a reader of the figures must know. digest: of what is there, so that like is compared with like.
    """

    name: str
    setting: str
    serving: str
    split: str
    classes: Sequence[str]
    pictures: Sequence[Picture]
    answers: Sequence[Answer]
    ap: AveragePrecision
    counts: Counts
    curves: Curves
    matches: Matches
    confusion: Integers
    notes: Sequence[str]
    digest: str

    def values(self) -> dict[str, float]:
        """Every figure by the name that a gate calls it by: `map50`, ..., then `ap50:CLASS`, ..."""
        overall = {name: float(getattr(self.ap, name)) for name in ("map50", "map50_95", "map75")}
        overall |= {name: float(rate) for name, rate in self.counts.total(0).total().rates().items()}
        columns = {"ap50": self.ap.ap50, "ap": self.ap.ap, **self.counts.total(0).rates()}
        return overall | {
            f"{column}:{name}": float(value)
            for column, values in columns.items()
            for name, value in zip(self.classes, values, strict=True)
        }

    def worst(self) -> list[int]:
        """The pictures with the most misses and false alarms together, the worst first."""
        faults = (self.counts.fp + self.counts.fn).sum(axis=1)
        order = np.argsort(-faults, kind="stable")[:WORST]
        return [int(index) for index in order if faults[index]]

    def speed(self) -> dict[str, float]:
        """Median milliseconds of each stage of serving one picture; empty where nobody took the time."""
        taken = [answer.timing_ms for answer in self.answers if answer.timing_ms]
        if not taken:
            return {}
        return {stage: statistics.median(each.get(stage, 0.0) for each in taken) for stage in STAGES}


def evaluate(source: Source, dataset: Dataset, split: str) -> Evaluation:
    """Ask the source about every picture of a split. Raises ToolError when the split or the source is not there."""
    pictures, classes = dataset.split(split), dataset.classes
    truths = [truth_of(picture) for picture in pictures]
    answers = []
    with Progress("evaluating", len(pictures), unit="pictures") as progress:
        for answer in source.answers(pictures, classes):
            answers.append(answer)
            progress.advance()
    size = len(classes)
    ranked, served = [answer.ranked for answer in answers], [answer.served for answer in answers]
    return Evaluation(
        source.name,
        source.setting,
        source.serving,
        split,
        classes,
        pictures,
        answers,
        average_precision(truths, ranked, size),
        tally(match(truths, served, size)),
        operating_points(truths, [answer.swept for answer in answers], size),
        match(truths, ranked, size, IOU_THRESHOLDS, MAX_RANKED),
        confusion_matrix(truths, served, size, 0),
        _notes(source, pictures, classes, answers),
        digest(pictures, classes),
    )


def digest(pictures: Sequence[Picture], classes: Sequence[str]) -> str:
    """Of everything that figures depend on but the detections: classes, pictures by name, boxes."""
    content = [
        list(classes),
        [[each.name, [[box.label, *box.xyxy, box.crowd] for box in each.boxes]] for each in pictures],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _notes(source: Source, pictures: Sequence[Picture], classes: Sequence[str], answers: Sequence[Answer]) -> list[str]:
    notes = []
    unknown = [name for name in classes if source.classes is not None and name not in source.classes]
    if unknown:
        notes.append(f"the model does not know {', '.join(unknown)}: every box of these classes counts as missed")
    foreign = sum(answer.foreign for answer in answers)
    if foreign:
        notes.append(f"{foreign} served detections are of classes that the data set has not, and are left out")
    refused = [
        (picture.name, answer.refusal) for picture, answer in zip(pictures, answers, strict=True) if answer.refusal
    ]
    if refused:
        name, why = refused[0]
        notes.append(f"{len(refused)} pictures are refused and count as nothing found; the first is {name}: {why}")
    return notes


def document(evaluation: Evaluation) -> dict[str, Any]:
    """What `evaluation.json` holds; null where a figure cannot be said."""
    values = evaluation.values()
    counts, classes = evaluation.counts.total(0), evaluation.classes
    boxes = [box.label for picture in evaluation.pictures for box in picture.boxes if not box.crowd]
    thresholds = evaluation.curves.over(CURVE)
    content = {
        "model": evaluation.name,
        "setting": evaluation.setting,
        "serving": evaluation.serving,
        "notes": list(evaluation.notes),
        "data": {
            "split": evaluation.split,
            "pictures": len(evaluation.pictures),
            "boxes": len(boxes),
            "digest": evaluation.digest,
        },
        "overall": {name: values[name] for name in OVERALL}
        | {size: getattr(evaluation.ap, size) for size in ("small", "medium", "large")},
        "per_class": [
            {
                "name": name,
                "pictures": sum(any(box.label == label for box in each.boxes) for each in evaluation.pictures),
                "boxes": boxes.count(label),
                **{column: values[f"{column}:{name}"] for column in PER_CLASS},
                **{kind: int(getattr(counts, kind)[label]) for kind in ("tp", "fp", "fn")},
            }
            for label, name in enumerate(classes)
        ],
        "best": {
            name: dict(zip(("threshold", "value"), evaluation.curves.best(beta), strict=True))
            for name, beta in (("f1", 1), ("f2", 2))
        },
        "curves": {
            "thresholds": CURVE.tolist(),
            "overall": {name: rate.tolist() for name, rate in thresholds.total().rates().items()},
            "per_class": {
                name: {rate: column[:, label].tolist() for rate, column in thresholds.rates().items()}
                for label, name in enumerate(classes)
            },
            "precision_at_recall": {
                name: evaluation.ap.precision_at[:, label].tolist() for label, name in enumerate(classes)
            },
        },
        "confusion": evaluation.confusion.tolist(),
        "speed_ms": evaluation.speed(),
        "worst": [evaluation.pictures[index].name for index in evaluation.worst()],
        "refused": [
            {"picture": picture.name, "why": answer.refusal}
            for picture, answer in zip(evaluation.pictures, evaluation.answers, strict=True)
            if answer.refusal
        ],
    }
    return _plain(content)


def _plain(value: Any) -> Any:
    """NaN as null, which JSON has; six digits are plenty."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value


def coco_results(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The detections for average precision as COCO writes results; ids as in the split's annotations."""
    return [
        {"image_id": image_id, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image_id, answer in enumerate(evaluation.answers, start=1)
        for (x1, y1, x2, y2), label, score in zip(*(part.tolist() for part in answer.ranked), strict=True)
    ]
