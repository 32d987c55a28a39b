"""The baseline of an archive: how the values of each quantity are spread over its evaluation set.

How far the index goes by chance: for unchanged pictures it is spread as `1/n + 1/m` times chi-square, with one degree
of freedom less than there are buckets (B. Yurdakul, J. Naranjo: Statistical properties of the population stability
index, Journal of Risk Model Validation 14(4), 2020). Detections of one picture resemble one another and tell less than
as many from different pictures: by the mean design effect, which the pictures of the baseline show (J. N. K. Rao,
A. J. Scott: The analysis of categorical data from complex sample surveys, JASA 76, 1981).
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from handlers.baseline import CLASS, DETECTIONS, DIGITS, OTHERS, QUANTITIES, Baseline, Distribution
from tools.watch.looks import Look, find_pictures, look_at

if TYPE_CHECKING:
    from handlers.pipeline import Pipeline

# Pictures, and values of a quantity, below which nothing can be compared.
LEAST = 100
MOST = 2000
TENTHS = 10
# A class of fewer detections goes with the others: chi-square would not hold (W. G. Cochran, Biometrics 10, 1954).
LEAST_OF_CLASS = 5
# Of one comparison: how likely any of its quantities is taken for changed that is not.
FALSE_ALARM = 1e-4


def find_baseline_pictures(folder: Path) -> list[Path]:
    """At most MOST, from all over the folder or data set. Raises ToolError where there is none."""
    files = find_pictures(folder, "baseline")
    return files[:: math.ceil(len(files) / MOST)]


def take_baseline(pipeline: "Pipeline", files: Sequence[Path]) -> Baseline:
    """Raises ToolError for a picture that is refused."""
    return baseline_of(list(look_at(pipeline, files, "baseline")))


def baseline_of(looks: Sequence[Look]) -> Baseline:
    """Quantities of too few pictures or values are left out."""
    quantities = {}
    for quantity in QUANTITIES if len(looks) >= LEAST else ():
        spread = _distribution(quantity, [look.get(quantity, []) for look in looks])
        if spread:
            quantities[quantity] = spread
    return Baseline(len(looks), quantities)


def shortage(baseline: Baseline) -> list[str]:
    """What is to be said of the quantities that were left out."""
    missing = [quantity for quantity in QUANTITIES if quantity not in baseline.quantities]
    told = f"{baseline.pictures} pictures, too few to tell the drift of {', '.join(missing)}"
    return [f"baseline: {told}; give {LEAST} pictures and detections or more"] if missing else []


def baseline_json(baseline: Baseline) -> bytes:
    """As `handlers.baseline.parse_baseline` reads it."""
    quantities = {
        name: {key: value for key, value in asdict(each).items() if value != ()}
        for name, each in baseline.quantities.items()
    }
    document = {"pictures": baseline.pictures, "quantities": quantities}
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _distribution(quantity: str, pictures: Sequence[Sequence[float | str]]) -> Distribution | None:
    """pictures: the values in each."""
    values = [value for picture in pictures for value in picture]
    if len(values) < LEAST:
        return None
    if quantity == CLASS:
        spread = Distribution((), 0, classes=_classes(values))
    else:
        spread = Distribution((), 0, edges=_edges(quantity, [float(value) for value in values]))
    cells = [Counter(map(spread.bucket, picture)) for picture in pictures]
    counts = {bucket: sum(cell[bucket] for cell in cells) for bucket in spread.buckets}
    quantile = NormalDist().inv_cdf(1 - FALSE_ALARM / len(QUANTITIES))
    chance = _design_effect(cells, counts) * _chi_square(len(counts) - 1, quantile)
    return replace(spread, counts=tuple(counts.values()), chance=round(chance, DIGITS))


def _classes(values: Sequence[float | str]) -> tuple[str, ...]:
    counts = Counter(map(str, values))
    often = tuple(sorted(name for name, count in counts.items() if count >= LEAST_OF_CLASS))
    return (*often, OTHERS)


def _edges(quantity: str, values: Sequence[float]) -> tuple[float, ...]:
    """The tenths; a value that makes up several of them gets a bucket of its own, and so do pictures without any
    detection."""
    ordered = sorted(round(value, DIGITS) for value in values)
    tenths = [ordered[math.ceil(len(ordered) * part / TENTHS) - 1] for part in range(1, TENTHS)]
    found = {*tenths, 0.0} if quantity == DETECTIONS else {*tenths}
    found |= {round(tenth - 10**-DIGITS, DIGITS) for tenth, count in Counter(tenths).items() if count > 1 and tenth > 0}
    return tuple(sorted(found))


def _design_effect(cells: Sequence[Counter[str]], totals: dict[str, int]) -> float:
    """How much more the shares vary than if each value came from a picture of its own: 1 or more."""
    there = {bucket: total for bucket, total in totals.items() if total}
    everything = sum(there.values())
    squares = 0.0
    for cell in cells:
        size = cell.total()
        squares += sum((cell[bucket] - size * total / everything) ** 2 / total for bucket, total in there.items())
    return max(1.0, squares / max(1, len(there) - 1))


def _chi_square(freedom: int, quantile: float) -> float:
    """Of the standard normal's quantile the one of chi-square (E. B. Wilson, M. M. Hilferty, PNAS 17, 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + quantile * math.sqrt(part)) ** 3
