"""Two evaluations of the same pictures: what changed, and whether that is more than chance.

Which pictures a data set happens to hold is chance. So as many pictures as there are are drawn from them, with
repetition, and both evaluations are taken on the drawn ones; of many such changes the middle 95 % are the interval
(paired bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). A change whose
interval holds 0 is not clear.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.errors import ToolError
from tools.evaluate.evaluation import MATCHES, RATES, RESULT
from tools.evaluate.metrics import HIT, IGNORED, Counts, Floats, Integers
from tools.progress import Progress

OF_RUN = "evaluation"  # where a training run keeps the one of its best weights
RESAMPLES = 1000
SEED = 0
INTERVAL = (2.5, 97.5)  # percentiles
RECALLS = np.linspace(0, 1, 101)


class Ranking(NamedTuple):
    """The detections of one class, best score first. picture: `[N]`. counted: `[N, 1 or thresholds]`, not IGNORED.
    hits: for each IoU threshold the rows that hit."""

    picture: Integers
    counted: np.ndarray
    hits: list[Integers]

    def average_precision(self, weights: Integers, total: int) -> Floats:
        """`[thresholds]`, as `metrics.average_precision` has it. weights: how often each picture is there.
        total: truths of the class, so weighted."""
        weight = weights[self.picture]
        so_far = np.cumsum(weight[:, None] * self.counted, axis=0)
        values = np.zeros(len(self.hits))
        for index, rows in enumerate(self.hits):
            # Precision peaks at hits, and what counts at a recall is its best from there on.
            tp = np.cumsum(weight[rows])
            precision = tp / np.maximum(so_far[rows, min(index, so_far.shape[1] - 1)], 1)
            best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
            values[index] = best[np.searchsorted(tp / total, RECALLS)].mean()
        return values


@dataclass(frozen=True)
class Result:
    """One evaluation as it was stored. counts: served, `[pictures, num_classes]`. there: truths, the same shape."""

    model: str
    classes: Sequence[str]
    digest: str
    counts: Counts
    there: Integers
    rankings: Sequence[Ranking]

    def figures(self, weights: Integers) -> Floats:
        """The figures of `names` when each picture is there as often as its weight says."""
        totals = weights @ self.there
        ap = np.full((len(self.classes), len(self.rankings[0].hits)), np.nan)
        for label, ranking in enumerate(self.rankings):
            if totals[label]:
                ap[label] = ranking.average_precision(weights, totals[label])
        counts = Counts(*(weights @ part for part in self.counts))
        known = ap[totals > 0]
        means = [known[:, 0].mean(), known.mean()] if len(known) else [np.nan, np.nan]
        return np.concatenate([means, list(counts.total().rates().values()), ap[:, 0], counts.f(2)])

    @property
    def names(self) -> list[str]:
        overall = ["map50", "map50_95", *RATES]
        return [*overall, *(f"{column}:{name}" for column in ("ap50", "f2") for name in self.classes)]


class Change(NamedTuple):
    """One figure before and after; low and high bound the change as the module's docstring says."""

    name: str
    before: float
    after: float
    low: float
    high: float

    def as_line(self, width: int) -> str:
        change = self.after - self.before
        if np.isnan(change):
            return f"{self.name:<{width}}{_figure(self.before)}{_figure(self.after)}"
        verdict = "better" if self.low > 0 else "worse" if self.high < 0 else "no clear change"
        return (
            f"{self.name:<{width}}{_figure(self.before)}{_figure(self.after)}"
            f"   {change:+.3f} ({self.low:+.3f} … {self.high:+.3f}), {verdict}"
        )


def read_result(path: Path) -> Result:
    """path: an evaluation.json, its folder, or the folder of a training run. Raises ToolError."""
    folder = path.parent if path.name == RESULT else path
    if (folder / OF_RUN / RESULT).is_file():
        folder = folder / OF_RUN
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        with np.load(folder / MATCHES) as stored:
            arrays = dict(stored)
        classes = [entry["name"] for entry in content["per_class"]]
        counts = Counts(arrays["tp"], arrays["fp"], arrays["fn"])
        there = arrays["there"]
        if any(part.shape != (content["data"]["pictures"], len(classes)) for part in (*counts, there)):
            raise ValueError(f"{MATCHES} and {RESULT} are of different evaluations")
        rankings = _rankings(arrays, len(classes))
        return Result(content["model"], classes, content["data"]["digest"], counts, there, rankings)
    except FileNotFoundError as error:
        raise ToolError(
            f"{error.filename} is not there; make an evaluation with: marina evaluate … --output FOLDER"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise ToolError(f"evaluation {folder} cannot be read ({error!r}); make it again") from error


def _rankings(arrays: dict[str, Any], num_classes: int) -> list[Ranking]:
    order = np.argsort(-arrays["score"], kind="stable")
    rankings = []
    for label in range(num_classes):
        rows = order[arrays["label"][order] == label]
        state = arrays["state"][rows]
        counted = state != IGNORED
        hits = [np.flatnonzero(state[:, column] == HIT) for column in range(state.shape[1])]
        rankings.append(Ranking(arrays["picture"][rows], counted[:, :1] if counted.all() else counted, hits))
    return rankings


def compare(before: Result, after: Result) -> list[Change]:
    """Every figure of both. Raises ToolError when they are of different pictures, boxes or classes."""
    if before.digest != after.digest:
        raise ToolError(
            f"{before.model} and {after.model} were evaluated on different pictures, boxes or classes, so their figures"
            " cannot be compared; evaluate both on the same --data and --split"
        )
    pictures = len(before.there)
    generator = np.random.default_rng(SEED)
    changes = []
    with Progress("drawing pictures again", RESAMPLES, unit="draws") as progress:
        for _ in range(RESAMPLES):
            weights = np.bincount(generator.integers(pictures, size=pictures), minlength=pictures)
            changes.append(after.figures(weights) - before.figures(weights))
            progress.advance()
    once = np.ones(pictures, dtype=np.int64)
    columns = zip(before.names, before.figures(once), after.figures(once), np.array(changes).T, strict=True)
    return [Change(name, float(one), float(other), *_interval(drawn)) for name, one, other, drawn in columns]


def _interval(changes: Floats) -> tuple[float, float]:
    """Of the draws in which there was something to measure."""
    known = changes[~np.isnan(changes)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.percentile(known, INTERVAL)
    return float(low), float(high)


def as_table(before: Result, after: Result, changes: Sequence[Change]) -> str:
    width = max(len(change.name) for change in changes) + 2
    return "\n".join(
        [
            f"before: {before.model}",
            f"after:  {after.model}",
            "",
            f"{'':<{width}}{'before':>8}{'after':>8}   change (95 % of {RESAMPLES} draws of pictures)",
            *(change.as_line(width) for change in changes),
        ]
    )


def _figure(value: float) -> str:
    return f"{'–' if np.isnan(value) else format(value, '.3f'):>8}"
