"""What a shadow's counts say: shares with their intervals, and whether the candidate may be promoted.

A share's interval is Wilson's (E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
1927), 95 %, as if detections were independent of each other. Those on one picture, or of one video, are not quite, and
so it is somewhat too narrow.
"""

import math
from collections.abc import Iterator
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import BaseModel

from tools.gateway.settings import Bounds
from tools.shadow.matching import Counts
from tools.shadow.record import Identity, Record, Totals

Z = 1.959964  # of a standard normal, 95 % lie between -Z and Z
NOTE = (
    "Nobody has labelled these pictures: gained and lost say what promotion would change, not which model is right."
    " `marina evaluate` on labelled pictures tells that."
)


class Share(BaseModel):
    """count of total; low and high bound the true share. share: None of nothing."""

    count: int
    total: int
    share: float | None
    low: float
    high: float

    def __str__(self) -> str:
        if self.share is None:
            return "none"
        return f"{100 * self.share:.1f} % ({100 * self.low:.1f} … {100 * self.high:.1f})"


class ClassReport(BaseModel):
    """Detections of one class, or of all. lost: of the live model's. gained: of the candidate's. moved, rescored: of
    those of both. score_drift: candidate's less live model's score, on average."""

    label: str
    live: int
    candidate: int
    lost: Share
    gained: Share
    moved: Share
    rescored: Share
    score_drift: float


class Latency(BaseModel):
    """What a picture takes, by the models' own clocks, without waiting; where pictures came in batches, each has the
    inference of its whole batch. ratio: the geometric mean of candidate's to live model's."""

    live_ms: float
    candidate_ms: float
    ratio: float


class Verdict(BaseModel):
    """reasons: a line each. more_pictures: about how many decide it at the present shares; None where that cannot be
    said, or is decided."""

    verdict: Literal["promote", "hold", "reject"]
    reasons: list[str]
    more_pictures: int | None = None


class Report(BaseModel):
    """Of one shadow, since when counting began. waiting: pictures. live and candidate: None until both were seen."""

    model: str
    shadow: str
    live: Identity | None
    candidate: Identity | None
    since: datetime
    share: float
    compared: int
    agreed: Share
    failed: Share
    unreachable: int
    dropped: int
    captured: int
    not_captured: int
    waiting: int
    latency: Latency | None
    overall: ClassReport
    classes: list[ClassReport]
    verdict: Verdict
    note: str = NOTE


class Reports(BaseModel):
    """A shadow each."""

    shadows: list[Report]


def share_of(count: int, total: int) -> Share:
    if total == 0:
        return Share(count=0, total=0, share=None, low=0.0, high=1.0)
    share = count / total
    middle = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    # At the ends it is exact, and rounding must not leave them.
    low = max(0.0, middle - half) if count else 0.0
    high = min(1.0, middle + half) if count < total else 1.0
    return Share(count=count, total=total, share=share, low=low, high=high)


def needed(share: Share, most: float) -> float:
    """How large the total must be, at this share, for its interval to leave `most` out: infinite right on it.

    Wilson's interval has those shares p for which the found one is nearer than Z times sqrt(p (1 - p) / total).
    """
    assert share.share is not None
    distance = (share.share - most) ** 2
    return math.inf if distance == 0 else Z * Z * most * (1 - most) / distance


def class_report(label: str, counts: Counts) -> ClassReport:
    return ClassReport(
        label=label,
        live=counts.live,
        candidate=counts.candidate,
        lost=share_of(counts.lost, counts.live),
        gained=share_of(counts.gained, counts.candidate),
        moved=share_of(counts.moved, counts.kept),
        rescored=share_of(counts.rescored, counts.kept),
        score_drift=round(counts.drift / counts.kept, 4) if counts.kept else 0.0,
    )


def make_report(record: Record, model: str, shadow: str, share: float, bounds: Bounds, waiting: int) -> Report:
    """shadow: the candidate as the settings call it."""
    totals = record.totals
    overall = class_report("all", totals.overall)
    classes = [class_report(label, totals.classes[label]) for label in sorted(totals.classes)]
    return Report(
        model=model,
        shadow=shadow,
        live=record.live,
        candidate=record.candidate,
        since=record.since,
        share=share,
        compared=totals.compared,
        agreed=share_of(totals.agreed, totals.compared),
        failed=share_of(totals.failed, totals.compared + totals.failed),
        unreachable=totals.unreachable,
        dropped=totals.dropped,
        captured=totals.captured,
        not_captured=totals.not_captured,
        waiting=waiting,
        latency=_latency(totals),
        overall=overall,
        classes=classes,
        verdict=_judged(record, overall, classes, bounds),
    )


def _latency(totals: Totals) -> Latency | None:
    pictures = totals.compared
    if not pictures:
        return None
    return Latency(
        live_ms=round(totals.live_ms / pictures, 3),
        candidate_ms=round(totals.candidate_ms / pictures, 3),
        ratio=round(math.exp(totals.log_ratio / pictures), 4),
    )


class _Check(NamedTuple):
    """of: what the share is one of. most: what it may be."""

    name: str
    share: Share
    of: str
    most: float

    @property
    def line(self) -> str:
        return f"{self.name}: {self.share} of {self.of}; at most {100 * self.most:g} % may be"


def _judged(record: Record, overall: ClassReport, classes: list[ClassReport], bounds: Bounds) -> Verdict:
    totals = record.totals
    asked = totals.compared + totals.failed
    if record.live is not None and record.candidate is not None and record.live.checksum == record.candidate.checksum:
        return Verdict(verdict="hold", reasons=["the candidate is the very archive that is live"])
    if asked < bounds.min_pictures:
        missing = bounds.min_pictures - asked
        return Verdict(
            verdict="hold", reasons=[f"{asked} of {bounds.min_pictures} pictures were seen"], more_pictures=missing
        )
    whole = list(_whole_checks(totals, overall, bounds))
    against = [check.line for check in (*whole, *_class_checks(classes, bounds)) if check.share.low > check.most]
    latency = _latency(totals)
    if latency and latency.ratio > bounds.max_latency:
        against.append(f"latency: {latency.ratio:.2f} times the live model's; at most {bounds.max_latency:g} may be")
    if against:
        return Verdict(verdict="reject", reasons=against)
    unclear = [check for check in whole if check.share.high > check.most]
    if unclear:
        return Verdict(
            verdict="hold", reasons=[check.line for check in unclear], more_pictures=_missing(unclear, asked)
        )
    return Verdict(verdict="promote", reasons=[check.line for check in whole])


def _whole_checks(totals: Totals, overall: ClassReport, bounds: Bounds) -> Iterator[_Check]:
    failed = share_of(totals.failed, totals.compared + totals.failed)
    yield _Check("failed", failed, "the pictures that the candidate was asked about", bounds.max_failed)
    yield _Check("lost", overall.lost, "the live model's detections", bounds.max_lost)
    yield _Check("gained", overall.gained, "the candidate's detections", bounds.max_gained)
    yield _Check("moved", overall.moved, "the detections of both", bounds.max_moved)


def _class_checks(classes: list[ClassReport], bounds: Bounds) -> Iterator[_Check]:
    for each in classes:
        yield _Check(f"lost {each.label}", each.lost, "the live model's", bounds.max_class)
        yield _Check(f"gained {each.label}", each.gained, "the candidate's", bounds.max_class)


def _missing(unclear: list[_Check], asked: int) -> int | None:
    """Pictures, about: each brings as many detections as it did so far."""
    totals = [
        asked * needed(check.share, check.most) / check.share.total if check.share.total else math.inf
        for check in unclear
    ]
    return math.ceil(max(totals)) - asked if math.isfinite(max(totals)) else None
