"""What a worker has answered, in figures for Prometheus. Knows nothing of any server.

    a batch -> added up here -> at most once a second the increases since the last time -> the server's counters

TorchServe takes a metric as a line that the worker prints; a histogram of its own takes a line a value, and has fixed
buckets. So histograms are three counters each here, by the names and the label `le` that Prometheus gives them.
"""

import math
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from handlers.errors import RequestError
from handlers.labels import BACKGROUND

if TYPE_CHECKING:
    from handlers.pipeline import Answer, Item, Job

# The outcome of what is no error.
OK = "ok"
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
ANSWERS, DETECTIONS = "marina_answers", "marina_detections"
STAGE_SECONDS, BATCH_PICTURES, SCORE = "marina_stage_seconds", "marina_batch_pictures", "marina_score"
HISTOGRAMS = {
    STAGE_SECONDS: Histogram(
        "Seconds",
        (*MODEL, "stage"),
        (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    ),
    BATCH_PICTURES: Histogram("Count", MODEL, (1, 2, 4, 8, 16, 32, 64)),
    SCORE: Histogram("Count", MODEL, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
}


def _declared() -> dict[str, Declared]:
    found = {ANSWERS: Declared("Count", (*MODEL, "type")), DETECTIONS: Declared("Count", (*MODEL, "label"))}
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

    model, version: as the server knows the archive. labels: the names of the classes.
    """

    def __init__(self, model: str, version: str, labels: Sequence[str]):
        self._model = (_plain(model), _plain(version))
        self._labels = [_plain(label) for label in labels]
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._cells: dict[tuple[str, ...], _Cells] = {}
        self._begin_with_zeros(labels)

    def _begin_with_zeros(self, labels: Sequence[str]) -> None:
        """For Prometheus, a counter that appears with a 1 has not increased."""
        for outcome in (OK, *(error.__name__ for error in RequestError.__subclasses__())):
            self._counts[ANSWERS, outcome] = 0
        for plain, label in zip(self._labels, labels, strict=True):
            if label != BACKGROUND:
                self._counts[DETECTIONS, plain] = 0
        for key in (*((STAGE_SECONDS, stage) for stage in STAGES), (BATCH_PICTURES,), (SCORE,)):
            self._cells[key] = _Cells(HISTOGRAMS[key[0]].edges)

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

    def _add_item(self, item: "Item", answered: bool) -> None:
        for stage, milliseconds in item.timing_ms.items():
            self._observe(milliseconds / 1000, STAGE_SECONDS, stage)
        if answered and item.detections is not None:
            _, labels, scores = item.detections
            self._counts.update((DETECTIONS, self._labels[label]) for label in labels.tolist())
            for score in scores.tolist():
                self._observe(score, SCORE)

    def _observe(self, value: float, *key: str) -> None:
        """key: the name of a histogram, and what its dimensions beside the model are."""
        if key not in self._cells:
            self._cells[key] = _Cells(HISTOGRAMS[key[0]].edges)
        self._cells[key].add(value)

    def take(self) -> Iterator[Increase]:
        """What has been added since the last time; at first, all that there can be, with zeros."""
        with self._lock:
            counts, cells = self._counts, self._cells
            self._counts, self._cells = Counter(), {}
        for (name, value), count in counts.items():
            yield Increase(name, count, (*self._model, value))
        for (name, *values), cell in cells.items():
            yield from cell.increases(name, (*self._model, *values))

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


def _plain(text: str) -> str:
    """Percent-encoded where TorchServe's line would be taken for another, or be cut."""
    return "".join(quote(char, safe="") if char in ",|:%" or not char.isprintable() else char for char in text)
