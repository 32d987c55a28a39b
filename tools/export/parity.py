"""How far an engine's answers are from those of torch in fp32, and whether that is near enough.

Boxes pair up by class, the best score first, from an IoU of 0.5 on. One that is alone counts as gained or lost only
when its score is clearly above the threshold: nearer than the scores may differ, it may come or go.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.ops import box_iou

from handlers.errors import ModelFailure, RequestError
from handlers.pipeline import Pipeline
from model_defs.contract import Detections
from tools.archive.recipe import Parity
from tools.data.dataset import Dataset
from tools.errors import ToolError
from tools.evaluate.evaluation import evaluate
from tools.evaluate.sources import PipelineSource
from tools.export.calibration import ALL, Calibration, read_picture
from tools.progress import Progress

PAIRED_IOU = 0.5
# Coarse enough that a machine which rounds differently gives the same report.
DIGITS = 4


@dataclass(frozen=True)
class Bounds:
    """min_iou, max_score_difference: of every pair. max_gained, max_lost: in each begun hundred of detections.

    max_map_drop: of mAP50-95, where there are labels.
    """

    min_iou: float
    max_score_difference: float
    max_gained: float
    max_lost: float
    max_map_drop: float


# What YOLOv5n keeps on 62 real photographs, and some room: IoU 1.0 and score 0.00001 in fp32, 0.63 and 0.07 in bf16,
# 0.977 and 0.005 in fp16, 0.52 and 0.30 in int8, where one of 143 detections is gained and one lost. A low IoU comes of
# two boxes for one object with nearly equal scores: another of them is left over.
BOUNDS = {
    "fp32": Bounds(0.99, 0.005, 0, 0, 0.002),
    "bf16": Bounds(0.6, 0.1, 1, 1, 0.01),
    "fp16": Bounds(0.9, 0.02, 1, 1, 0.005),
    "int8": Bounds(0.5, 0.35, 2, 2, 0.01),
}


def bounds_of(precision: str, wanted: Parity) -> Bounds:
    """What the recipe says, and for the rest what its precision can keep."""
    return replace(BOUNDS[precision], **wanted.model_dump(exclude_none=True))


class Difference(NamedTuple):
    """Of one picture. detections: found by torch in fp32. iou: lowest of its pairs. score: largest difference."""

    picture: str
    detections: int
    iou: float
    score: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Report:
    """differences: one a picture. map50_95: of torch in fp32 and of the archive, None without labels."""

    differences: Sequence[Difference]
    map50_95: tuple[float, float] | None

    @property
    def detections(self) -> int:
        return sum(each.detections for each in self.differences)

    @property
    def gained(self) -> int:
        return sum(each.gained for each in self.differences)

    @property
    def lost(self) -> int:
        return sum(each.lost for each in self.differences)

    def line(self) -> str:
        """For people."""
        if not self.differences:
            return "parity: not compared with torch in fp32; give the recipe golden pictures, or --calibration DIR"
        if not self.detections + self.gained:
            return (
                f"parity: nothing is found on any of {len(self.differences)} pictures, so nothing is proven; give"
                " pictures with objects, as golden ones or with --calibration DIR"
            )
        text = (
            f"parity with torch in fp32 on {len(self.differences)} pictures, {self.detections} detections: lowest IoU"
            f" {min(each.iou for each in self.differences):.4f}, largest score difference"
            f" {max(each.score for each in self.differences):.4f}, {self.gained} gained, {self.lost} lost"
        )
        if self.map50_95:
            text += "; mAP50-95 {:.4f}, of torch {:.4f}".format(*reversed(self.map50_95))
        else:
            text += "; no mAP, for which a set made by `marina data prepare` has the labels"
        return text

    def document(self) -> dict[str, Any]:
        """What the provenance holds."""
        content: dict[str, Any] = {
            "pictures": len(self.differences),
            "detections": self.detections,
            "min_iou": round(min((each.iou for each in self.differences), default=1.0), DIGITS),
            "max_score_difference": round(max((each.score for each in self.differences), default=0.0), DIGITS),
            "gained": self.gained,
            "lost": self.lost,
        }
        if self.map50_95:
            content["map50_95"] = dict(
                zip(("torch", "archive"), (round(v, DIGITS) for v in self.map50_95), strict=True)
            )
        return content


def compare(
    reference: Pipeline, other: Pipeline, pictures: Iterable[tuple[str, bytes]], total: int, bounds: Bounds
) -> list[Difference]:
    """Both as a server would answer, picture by picture. Raises ToolError for a picture that one cannot answer."""
    clear = reference.defaults.score_threshold + bounds.max_score_difference
    differences = []
    with Progress("comparing with torch in fp32", total, unit="pictures") as progress:
        for name, body in pictures:
            expected, found = (_answer(pipeline, name, body) for pipeline in (reference, other))
            differences.append(difference(name, expected, found, clear))
            progress.advance()
    return differences


def _answer(pipeline: Pipeline, name: str, body: bytes) -> Detections:
    (answer,) = pipeline.detect([body], pipeline.defaults)
    if isinstance(answer, ModelFailure):
        raise ToolError(f"{name} cannot be compared: the network fails on it, as told above; take another runtime")
    if isinstance(answer, RequestError):
        raise ToolError(f"{name} cannot be compared: {answer}; take it out")
    return answer


def difference(picture: str, expected: Detections, found: Detections, clear: float) -> Difference:
    """clear: the score above which a detection that is alone counts. Best scores stand first in both."""
    iou = box_iou(expected.boxes, found.boxes)
    iou[expected.labels[:, None] != found.labels[None]] = 0
    pairs: dict[int, tuple[int, float]] = {}
    for row in range(len(expected.scores) if len(found.scores) else 0):
        best, column = iou[row].max(dim=0)
        if best >= PAIRED_IOU:
            pairs[row] = int(column), float(best)
            iou[:, column] = 0
    taken = {column for column, _ in pairs.values()}
    return Difference(
        picture,
        len(expected.scores),
        min((best for _, best in pairs.values()), default=1.0),
        max((abs(float(expected.scores[row] - found.scores[column])) for row, (column, _) in pairs.items()), default=0),
        sum(column not in taken and score > clear for column, score in enumerate(found.scores.tolist())),
        sum(row not in pairs and score > clear for row, score in enumerate(expected.scores.tolist())),
    )


def prove(reference: Pipeline, other: Pipeline, folder: Path, calibration: Calibration, bounds: Bounds) -> Report:
    """Compare on golden pictures and those for calibration. folder: the extracted archive that `other` was loaded from.

    Raises ToolError for a picture that one cannot answer.
    """
    golden = [(golden.image, other.golden_picture(folder, golden.image)) for golden in other.settings.golden]
    files = ((str(file), read_picture(file)) for file in calibration.compared)
    total = len(golden) + len(calibration.compared)
    differences = compare(reference, other, chain(golden, files), total, bounds)
    maps = None
    if calibration.dataset:
        torch, archive = (_map(each, calibration.dataset) for each in (reference, other))
        # Of labels without a single box there is none.
        maps = None if math.isnan(torch) else (torch, archive)
    return Report(differences, maps)


def _map(pipeline: Pipeline, dataset: Dataset) -> float:
    return evaluate(PipelineSource(pipeline, pipeline.settings.name), dataset, ALL).ap.map50_95


def beyond(report: Report, bounds: Bounds) -> str | None:
    """The figure that is out of bounds, its bound and the picture, in one line; None when all are within."""
    if not report.differences:
        return None
    box = min(report.differences, key=lambda each: each.iou)
    if box.iou < bounds.min_iou:
        return _beyond(f"a box of {box.picture} has IoU {box.iou:.4f}", "min_iou", bounds.min_iou)
    score = max(report.differences, key=lambda each: each.score)
    if score.score > bounds.max_score_difference:
        text = f"a score on {score.picture} differs by {score.score:.4f}"
        return _beyond(text, "max_score_difference", bounds.max_score_difference)
    hundreds = math.ceil(report.detections / 100)
    for name, bound in (("gained", bounds.max_gained), ("lost", bounds.max_lost)):
        total = getattr(report, name)
        if total > bound * max(1, hundreds):
            worst = max(report.differences, key=lambda each: getattr(each, name))
            text = f"{total} beside {report.detections} detections are {name}, most of them on {worst.picture}"
            return _beyond(text, f"max_{name}", bound)
    if report.map50_95 and report.map50_95[0] - report.map50_95[1] > bounds.max_map_drop:
        before, after = report.map50_95
        text = f"mAP50-95 goes from {before:.4f} to {after:.4f} on {len(report.differences)} pictures"
        return _beyond(text, "max_map_drop", bounds.max_map_drop)
    return None


def _beyond(what: str, name: str, bound: float) -> str:
    return (
        f"the archive does not answer as torch in fp32 does: {what}, and parity.{name} is {bound:g}; take another"
        " runtime, or allow more in the recipe"
    )
