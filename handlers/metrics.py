"""What a worker has answered, in figures for Prometheus. Knows nothing of any server.

    a batch -> added up here -> at most once a second the increases since the last time -> the server's counters

TorchServe takes a metric as a line that the worker prints; a histogram of its own takes a line a value, and has fixed
buckets. So histograms are three counters each here, by the names and the label `le` that Prometheus gives them.
"""

import math
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from handlers.baseline import Baseline, values_of
from handlers.errors import RequestError
from handlers.labels import BACKGROUND

if TYPE_CHECKING:
    from handlers.pipeline import Answer, Item, Job

# The outcome of what is no error.
OK = "ok"
# What becomes of a picture that is worth keeping (`handlers.capture`).
STORED, DUPLICATE, BUDGET, QUEUE_FULL, FAILED = CAPTURED = ("stored", "duplicate", "budget", "queue_full", "failed")
STAGES = ("decode", "preprocess", "inference", "postprocess")
PERIOD_S = 1.0


class Declared(NamedTuple):
    """A counter. dimensions: the names of its labels."""

    unit: str
    dimensions: tuple[str, ...]


class Histogram(NamedTuple):
    """edges: the upper ends of the buckets, each in its bucket."""

    unit: str
    dimensions: tuple[str, ...]
    edges: tuple[float, ...]


MODEL = ("model", "version")
ANSWERS, DETECTIONS, CAPTURE = "marina_answers", "marina_detections", "marina_capture"
STAGE_SECONDS, BATCH_PICTURES, SCORE = "marina_stage_seconds", "marina_batch_pictures", "marina_score"
PICTURE_MEGAPIXELS, PICTURE_BRIGHTNESS = "marina_picture_megapixels", "marina_picture_brightness"
PICTURE_DETECTIONS = "marina_picture_detections"
HISTOGRAMS = {
    STAGE_SECONDS: Histogram(
        "Seconds",
        (*MODEL, "stage"),
        (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    ),
    BATCH_PICTURES: Histogram("Count", MODEL, (1, 2, 4, 8, 16, 32, 64)),
    SCORE: Histogram("Count", MODEL, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    PICTURE_MEGAPIXELS: Histogram("Megapixels", MODEL, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)),
    PICTURE_BRIGHTNESS: Histogram("Count", MODEL, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    PICTURE_DETECTIONS: Histogram("Count", MODEL, (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500)),
}
# Of each number among the quantities of a baseline; of classes, there is DETECTIONS.
HISTOGRAM_OF = {
    "megapixels": PICTURE_MEGAPIXELS,
    "brightness": PICTURE_BRIGHTNESS,
    "detections": PICTURE_DETECTIONS,
    "score": SCORE,
}
# Of an archive with a baseline: what came in its buckets, of `usual` pictures; and, from each worker as it starts, the
# baseline's own counts and `Distribution.chance`, which are to be divided by the number of workers that have told them.
WATCHED, BASELINE, CHANCE = "marina_watched", "marina_baseline", "marina_baseline_chance"
BASELINE_WORKERS = "marina_baseline_workers"


def _declared() -> dict[str, Declared]:
    found = {ANSWERS: Declared("Count", (*MODEL, "type")), DETECTIONS: Declared("Count", (*MODEL, "label"))}
    found[WATCHED] = found[BASELINE] = Declared("Count", (*MODEL, "quantity", "bucket"))
    found[CHANCE] = Declared("Count", (*MODEL, "quantity"))
    found[BASELINE_WORKERS] = Declared("Count", MODEL)
    found[CAPTURE] = Declared("Count", (*MODEL, "outcome"))
    for name, (unit, dimensions, _) in HISTOGRAMS.items():
        found[f"{name}_bucket"] = Declared("Count", (*dimensions, "le"))
        found[f"{name}_sum"] = Declared(unit, dimensions)
        found[f"{name}_count"] = Declared("Count", dimensions)
    return found


# All that a worker hands over, by name.
COUNTERS = _declared()


class Increase(NamedTuple):
    """of: what the counter's dimensions are, in their order."""

    counter: str
    amount: float
    of: tuple[str, ...]


class _Cells:
    """How many values lie between two edges each, and the sum of all."""

    def __init__(self, edges: tuple[float, ...]):
        self._edges = edges
        self._cells = [0] * (len(edges) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        # Of a sum with such a value nothing could be told any more.
        if math.isfinite(value):
            self._cells[bisect_left(self._edges, value)] += 1
            self._sum += value

    def increases(self, name: str, of: tuple[str, ...]) -> Iterator[Increase]:
        for edge, count in zip((*map(str, self._edges), "+Inf"), accumulate(self._cells), strict=True):
            yield Increase(f"{name}_bucket", count, (*of, edge))
        yield Increase(f"{name}_sum", round(self._sum, 6), of)
        yield Increase(f"{name}_count", sum(self._cells), of)


class Figures:
    """Adds up what one worker answers. To be used by any threads.

    model, version: as the server knows the archive. labels: the names of the classes. baseline: the archive's, if any.
    """

    def __init__(self, model: str, version: str, labels: Sequence[str], baseline: Baseline | None = None):
        self._model = (model, version)
        self._labels = labels
        self._distributions = baseline.quantities if baseline else {}
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._counts: dict[tuple[str, ...], float] = defaultdict(int)
        self._cells: dict[tuple[str, ...], _Cells] = {}
        self._begin_with_zeros()
        if baseline:
            self._tell_baseline()

    def _begin_with_zeros(self) -> None:
        """For Prometheus, a counter that appears with a 1 has not increased."""
        for outcome in (OK, *(error.__name__ for error in RequestError.__subclasses__())):
            self._counts[ANSWERS, outcome] = 0
        for captured in CAPTURED:
            self._counts[CAPTURE, captured] = 0
        for label in self._labels:
            if label != BACKGROUND:
                self._counts[DETECTIONS, label] = 0
        for name in HISTOGRAMS:
            for key in [(name, stage) for stage in STAGES] if name == STAGE_SECONDS else [(name,)]:
                self._cells[key] = _Cells(HISTOGRAMS[name].edges)

    def _tell_baseline(self) -> None:
        self._counts[(BASELINE_WORKERS,)] = 1
        for quantity, known in self._distributions.items():
            self._counts[CHANCE, quantity] = known.chance
            for bucket, count in zip(known.buckets, known.counts, strict=True):
                self._counts[BASELINE, quantity, bucket] = count
                self._counts[WATCHED, quantity, bucket] = 0

    def add(self, batch: Sequence[tuple["Job", "Answer"]]) -> None:
        """Count the requests that came together, with the answer to each."""
        with self._lock:
            pictures = sum(len(job.items) for job, _ in batch)
            if pictures:
                self._observe(pictures, BATCH_PICTURES)
            for job, answer in batch:
                self._counts[ANSWERS, answer.outcome] += 1
                for item in job.items:
                    self._add_item(item, answer.outcome == OK)
        self._news.set()

    def add_captured(self, outcome: str) -> None:
        """Count what has become of a picture that was worth keeping: one of `CAPTURED`."""
        with self._lock:
            self._counts[CAPTURE, outcome] += 1
        self._news.set()

    def _add_item(self, item: "Item", answered: bool) -> None:
        for stage, milliseconds in item.timing_ms.items():
            self._observe(milliseconds / 1000, STAGE_SECONDS, stage)
        for quantity, value in values_of(item, self._labels) if answered else ():
            if isinstance(value, str):
                self._counts[DETECTIONS, value] += 1
            else:
                self._observe(value, HISTOGRAM_OF[quantity])
            if item.usual and quantity in self._distributions:
                self._counts[WATCHED, quantity, self._distributions[quantity].bucket(value)] += 1

    def _observe(self, value: float, *key: str) -> None:
        """key: the name of a histogram, and what its dimensions beside the model are."""
        if key not in self._cells:
            self._cells[key] = _Cells(HISTOGRAMS[key[0]].edges)
        self._cells[key].add(value)

    def take(self) -> Iterator[Increase]:
        """What has been added since the last time; at first, all that there can be, with zeros."""
        with self._lock:
            counts, cells = self._counts, self._cells
            self._counts, self._cells = defaultdict(int), {}
        for (name, *values), count in counts.items():
            yield Increase(name, count, self._of(values))
        for (name, *values), cell in cells.items():
            yield from cell.increases(name, self._of(values))

    def _of(self, values: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(plain, (*self._model, *values)))

    def report(self, write: Callable[[Increase], None]) -> None:
        """From now on, hand all that is added to `write`, in a thread of its own, in a burst a second at most."""

        def work() -> None:
            while True:
                for increase in self.take():
                    write(increase)
                self._news.wait()
                self._news.clear()
                # What comes meanwhile goes along.
                time.sleep(PERIOD_S)

        threading.Thread(target=work, name="metrics", daemon=True).start()


def plain(text: str) -> str:
    """A label as it is told: percent-encoded where TorchServe's line would be taken for another, or be cut."""
    return "".join(quote(char, safe="") if char in ",|:%" or not char.isprintable() else char for char in text)
