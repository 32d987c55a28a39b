"""What the pictures of an archive's evaluation set were like, and what was found in them: its baseline.

    evaluation set -> the archive -> values of each quantity -> buckets -> baseline.json
    live pictures  -> the archive -> values of each quantity -> the same buckets -> the server's counters

Each bucket holds about a tenth of the baseline's values, as is usual for the population stability index: one of those
of the histograms would hold every picture of a camera at night.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.errors import BadArchive

if TYPE_CHECKING:
    from handlers.pipeline import Item

BASELINE = "baseline.json"
MEGAPIXELS, BRIGHTNESS, DETECTIONS = "megapixels", "brightness", "detections"  # of a picture
SCORE, CLASS = "score", "class"  # of a detection
QUANTITIES = (MEGAPIXELS, BRIGHTNESS, DETECTIONS, SCORE, CLASS)
# The classes that the baseline has hardly any of.
OTHERS = "(others)"
# Of a number, so that a machine that calculates a little otherwise finds the same buckets.
DIGITS = 3


@dataclass(frozen=True)
class Distribution:
    """How many values of one quantity fell into each bucket.

    edges: of numbers, the upper ends of all buckets but the last, each in its bucket. classes: of classes, the buckets.
    chance: the index stays below this times `1 / n + 1 / m`, n and m the values compared, while nothing has changed.
    """

    counts: tuple[int, ...]
    chance: float
    edges: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()

    @cached_property
    def buckets(self) -> tuple[str, ...]:
        return self.classes or (*map(str, self.edges), "+Inf")

    def bucket(self, value: float | str) -> str:
        """The name of the one that a value belongs to."""
        if isinstance(value, str):
            return value if value in self.classes else OTHERS
        return self.buckets[bisect_left(self.edges, round(value, DIGITS))]


@dataclass(frozen=True)
class Baseline:
    """pictures: how many there were. quantities: those of which there were values enough."""

    pictures: int
    quantities: dict[str, Distribution]


def load_baseline(folder: Path) -> Baseline | None:
    """Of an extracted archive; None where it was built without one. Raises BadArchive for one that is damaged."""
    try:
        content = (folder / BASELINE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadArchive(f"{BASELINE} cannot be read ({error.strerror})") from error
    return parse_baseline(content)


def parse_baseline(content: bytes) -> Baseline:
    """Raises BadArchive for what no build has written."""
    try:
        document = json.loads(content)
        quantities = {name: _distribution(each) for name, each in document["quantities"].items()}
        if not quantities.keys() <= set(QUANTITIES):
            raise ValueError(f"quantities {', '.join(quantities)}")
        return Baseline(int(document["pictures"]), quantities)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadArchive(f"{BASELINE} is not as a build writes it ({error!r}); build the archive again") from error


def _distribution(document: dict[str, Any]) -> Distribution:
    found = Distribution(
        tuple(map(int, document["counts"])),
        float(document["chance"]),
        tuple(map(float, document.get("edges", ()))),
        tuple(map(str, document.get("classes", ()))),
    )
    if len(found.counts) != len(found.buckets) or list(found.edges) != sorted(found.edges):
        raise ValueError(f"{len(found.counts)} counts, buckets {found.buckets}")
    return found


def values_of(item: "Item", labels: Sequence[str]) -> Iterator[tuple[str, float | str]]:
    """Each value of each quantity in an answered picture. labels: the names of the model's classes."""
    if item.detections is None or item.brightness is None:
        return
    yield MEGAPIXELS, item.width * item.height / 1e6
    yield BRIGHTNESS, item.brightness
    _, classes, scores = item.detections
    yield DETECTIONS, len(scores)
    for score in scores.tolist():
        yield SCORE, score
    for label in classes.tolist():
        yield CLASS, labels[label]
