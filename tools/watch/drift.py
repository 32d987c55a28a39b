"""How far traffic has gone from a baseline: the population stability index of each quantity, and a verdict.

    index = sum over the buckets of (p - q) ln(p / q)      p: share in the traffic, q: share in the baseline

the symmetrised divergence of S. Kullback and R. A. Leibler (1951); from 0.1 a shift is called moderate, from 0.25 large
(N. Siddiqi: Credit Risk Scorecards, 2006). Half a count more is taken to be in every bucket, so that an empty one has a
logarithm (H. Jeffreys). A quantity has drifted where the index is above 0.1 and above what chance explains, as
`tools.watch.baseline` has it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handlers.baseline import DETECTIONS, Baseline, Distribution

HALF = 0.5
MODERATE = 0.1
# Values in the traffic, below which nothing is said.
LEAST = 100

# Quantity, bucket: how many values.
Counts = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Shift:
    """One quantity. values: in the traffic. index: None where there are too few. chance: how far it goes unchanged.

    shares: of each bucket, in the baseline and in the traffic.
    """

    quantity: str
    values: int
    index: float | None
    chance: float
    shares: dict[str, tuple[float, float]]

    @property
    def drifted(self) -> bool:
        return self.index is not None and self.index > max(MODERATE, self.chance)

    @property
    def most(self) -> str:
        """The bucket that changed most."""
        return max(self.shares, key=lambda bucket: abs(self.shares[bucket][1] - self.shares[bucket][0]))


def compare(baseline: Baseline, counts: Counts) -> list[Shift]:
    """Each quantity of the baseline. counts: of the traffic, in the baseline's buckets."""
    return [_shift(name, known, counts.get(name, {})) for name, known in baseline.quantities.items()]


def _shift(name: str, known: Distribution, counts: Mapping[str, float]) -> Shift:
    before = dict(zip(known.buckets, known.counts, strict=True))
    now = {bucket: counts.get(bucket, 0.0) for bucket in known.buckets}
    n, m = sum(now.values()), sum(before.values())
    if n < LEAST:
        return Shift(name, round(n), None, math.inf, {})
    index = 0.0
    for bucket in known.buckets:
        p = (now[bucket] + HALF) / (n + HALF * len(now))
        q = (before[bucket] + HALF) / (m + HALF * len(now))
        index += (p - q) * math.log(p / q)
    shares = {bucket: (before[bucket] / m, now[bucket] / n) for bucket in known.buckets}
    return Shift(name, round(n), index, known.chance * (1 / n + 1 / m), shares)


def is_told(shifts: Sequence[Shift]) -> bool:
    """Whether there was enough of anything to say something."""
    return any(shift.index is not None for shift in shifts)


def pictures_in(counts: Counts) -> int:
    return round(sum(counts.get(DETECTIONS, {}).values()))


def as_document(baseline: Baseline, counts: Counts, shifts: Sequence[Shift]) -> dict[str, Any]:
    """For programs. drift: null where nothing can be said. chance: the index stays below it while nothing changes."""
    return {
        "pictures": pictures_in(counts),
        "baseline_pictures": baseline.pictures,
        "drift": any(shift.drifted for shift in shifts) if is_told(shifts) else None,
        "quantities": [
            {
                "quantity": shift.quantity,
                "values": shift.values,
                "index": None if shift.index is None else round(shift.index, 4),
                "chance": None if shift.index is None else round(shift.chance, 4),
                "drift": shift.drifted,
                "shares": {
                    bucket: {"baseline": round(before, 4), "traffic": round(now, 4)}
                    for bucket, (before, now) in shift.shares.items()
                },
            }
            for shift in shifts
        ],
    }


def as_table(baseline: Baseline, counts: Counts, shifts: Sequence[Shift]) -> str:
    """For people."""
    lines = [
        f"{pictures_in(counts):,} pictures beside {baseline.pictures:,} of the baseline",
        f"{'quantity':12}{'values':>9}{'index':>9}{'chance':>9}  most changed",
    ]
    for shift in shifts:
        if shift.index is None:
            lines.append(f"{shift.quantity:12}{shift.values:>9,}{'':18}  fewer than {LEAST}: nothing can be said")
            continue
        before, now = shift.shares[shift.most]
        line = f"{shift.quantity:12}{shift.values:>9,}{shift.index:>9.3f}{shift.chance:>9.3f}"
        changed = f"{_range(baseline.quantities[shift.quantity], shift.most)}: {before:.1%} -> {now:.1%}"
        lines.append(f"{line}  {changed}{'  DRIFT' if shift.drifted else ''}")
    drifted = [shift.quantity for shift in shifts if shift.drifted]
    lines.append(f"drift: {', '.join(drifted) or ('none' if is_told(shifts) else 'unknown')}")
    return "\n".join(lines)


def _range(known: Distribution, bucket: str) -> str:
    """A bucket in words."""
    if known.classes:
        return bucket
    place = known.buckets.index(bucket)
    if place == len(known.edges):
        return f"above {known.edges[-1]:g}"
    return f"{known.edges[place - 1]:g} to {known.edges[place]:g}" if place else f"up to {known.edges[0]:g}"
