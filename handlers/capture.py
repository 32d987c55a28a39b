"""Pictures worth labelling, kept while serving: where a recipe has a section `capture`.

    an answer -> a reason to keep it? -> bounded queue -> budget left -> nothing like it of late -> blurred -> store
                                             |                |                 |                               |
                                        queue_full         budget           duplicate                    stored, failed

What serves looks at the answer and puts the encoded picture into the queue, or drops it where that is full. All else is
done by a thread of its own, which takes 3 thousandths of a core, and may hang for ever.
"""

import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from handlers.capture_budget import HOUR_S, Hourly, Memory
from handlers.capture_picture import Box, head, look, prepared
from handlers.capture_store import open_store, write_item
from handlers.errors import BadSettings
from handlers.geometry import Letterbox, clip, unletterbox
from handlers.labels import check_capture
from handlers.metrics import BUDGET, DUPLICATE, FAILED, OK, QUEUE_FULL, STORED
from handlers.response import Context, json_answer
from handlers.settings import CAPTURE_VARIABLE, Blur, Capture, Keep, check_destination
from model_defs.contract import Detections

if TYPE_CHECKING:
    from handlers.pipeline import Answer, Item, Job, Pipeline

logger = logging.getLogger(__name__)

OFF = "off"
# What waits for the thread, at most.
QUEUE_PICTURES = 32
QUEUE_BYTES = 64_000_000
# The share of a core that the thread takes, and the seconds on a core that it may have at once after a pause.
SHARE = 0.003
AT_ONCE_S = 0.1
# So many pictures tell which classes are rare.
RARE_AFTER = 100
# Also what has so low a score, far below the threshold, is blurred where its class is.
BLUR_ABOVE = 0.05
# Seconds between two lines of the log about what failed.
QUIET_S = 60.0


class Reason(NamedTuple):
    """text: as it is stored. label: the class for the sake of which, if there is one."""

    text: str
    label: int | None = None


class Sighting(NamedTuple):
    """A picture on its way. found: what was answered, on the upright picture. candidates, plan: as in `Item`,
    for what is blurred."""

    when: float
    body: bytes
    height: int
    width: int
    found: Detections
    reasons: list[Reason]
    candidates: Detections | None
    plan: Letterbox | None


class Interest:
    """Why pictures are worth keeping, from what was found in them with scores above `threshold`. chance: gives a number
    from 0 to below 1."""

    def __init__(
        self, keep: Keep, threshold: float, labels: Sequence[str], chance: Callable[[], float] = random.random
    ):
        self._keep = keep
        self._near = threshold + keep.near_threshold
        self._labels = labels
        self._wanted = {labels.index(name) for name in keep.classes}
        self._chance = chance
        self._pictures = 0
        self._with: Counter[int] = Counter()

    def reasons(self, labels: Sequence[int], scores: Sequence[float]) -> list[Reason]:
        keep, classes = self._keep, set(labels)
        found = []
        if keep.near_threshold:
            near = {label for label, score in zip(labels, scores, strict=True) if score <= self._near}
            found += [Reason("near-threshold", label) for label in sorted(near)]
        if keep.empty and not classes:
            found.append(Reason("empty"))
        wanted = classes & self._wanted | (self._rare(classes) if keep.rare else set())
        found += [Reason(f"class:{self._labels[label]}", label) for label in sorted(wanted)]
        if keep.random and self._chance() < keep.random:
            found.append(Reason("random"))
        return found

    def _rare(self, classes: set[int]) -> set[int]:
        most = self._keep.rare * self._pictures
        rare = {label for label in classes if self._with[label] < most} if self._pictures >= RARE_AFTER else set()
        self._pictures += 1
        self._with.update(classes)
        return rare


class Queue:
    """Pictures for another thread, of which there are never too many."""

    def __init__(self) -> None:
        self._waiting: deque[Sighting] = deque()
        self._bytes = 0
        self._condition = threading.Condition()

    def put(self, sighting: Sighting) -> bool:
        """Whether there was room."""
        with self._condition:
            size = len(sighting.body)
            if len(self._waiting) >= QUEUE_PICTURES or self._bytes + size > QUEUE_BYTES:
                return False
            self._waiting.append(sighting)
            self._bytes += size
            self._condition.notify()
        return True

    def get(self, timeout: float) -> Sighting | None:
        """The next one; None where none comes within these seconds."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._waiting, timeout):
                return None
            sighting = self._waiting.popleft()
            self._bytes -= len(sighting.body)
            return sighting


class Budget:
    """How many pictures may be kept. workers: how many share the recipe's figures; each has at least one picture."""

    def __init__(self, capture: Capture, workers: int):
        self._all = Hourly(max(1, capture.per_hour // workers))
        self._most = max(1, capture.per_class_per_hour // workers)
        self._of_class: dict[int, Hourly] = {}

    def allowed(self, reasons: Iterable[Reason], now: float) -> list[Reason]:
        """Those that there is still room for."""
        if not self._all.left(now):
            return []
        return [reason for reason in reasons if reason.label is None or self._class(reason.label).left(now)]

    def take(self, reasons: Iterable[Reason], now: float) -> None:
        self._all.take(now)
        for label in {reason.label for reason in reasons if reason.label is not None}:
            self._class(label).take(now)

    def _class(self, label: int) -> Hourly:
        return self._of_class.setdefault(label, Hourly(self._most))


class Pace:
    """Holds a thread back, so that it takes `SHARE` of a core."""

    def __init__(self) -> None:
        self._free = 0.0

    def pause(self, used: float, now: float) -> float:
        """How long to rest after so many seconds on a core."""
        self._free = max(self._free, now - AT_ONCE_S / SHARE) + used / SHARE
        return max(0.0, self._free - now)


class PictureCapture:
    """Keeps pictures of one worker. count: called with what has become of each that was worth keeping, one of
    `handlers.metrics.CAPTURED`, from any thread. Call `start` once.

    Raises BadSettings for a class that the model does not know.
    """

    def __init__(self, capture: Capture, to: str, pipeline: "Pipeline", workers: int, count: Callable[[str], None]):
        check_capture(capture, pipeline.labels)
        self._capture = capture
        self._pipeline = pipeline
        self._count = count
        self._store = open_store(to)
        self._interest = Interest(capture.keep, pipeline.defaults.score_threshold, pipeline.labels)
        self._budget = Budget(capture, workers)
        self._memory = Memory()
        self._pace = Pace()
        self._queue = Queue()
        self._logged = -QUIET_S

    @property
    def keep_above(self) -> float:
        """The score above which it wants to have the candidates of a picture."""
        return BLUR_ABOVE if self._blurs else 1.0

    @property
    def _blurs(self) -> bool:
        return self._capture.blur != Blur()

    def start(self) -> None:
        # A daemon, so that no worker waits for a store that hangs.
        threading.Thread(target=self._work, name="capture", daemon=True).start()

    def offer(self, batch: Iterable[tuple["Job", "Answer"]]) -> None:
        """Requests with the answer to each. Takes microseconds, whatever becomes of the pictures.

        Those that are not `Item.usual` are left alone: what was found in them is not what the model says by itself.
        """
        for job, answer in batch:
            for item in job.items:
                if item.usual and answer.outcome == OK and item.body is not None and item.detections is not None:
                    self._offer(item, item.body, item.detections)

    def _offer(self, item: "Item", body: bytes, found: Detections) -> None:
        reasons = self._interest.reasons(found.labels.tolist(), found.scores.tolist())
        if reasons:
            candidates = item.candidates if self._blurs else None
            sighting = Sighting(time.time(), body, item.height, item.width, found, reasons, candidates, item.plan)
            if not self._queue.put(sighting):
                self._count(QUEUE_FULL)

    def _work(self) -> None:
        next_expiry = time.monotonic()
        while True:
            if time.monotonic() >= next_expiry:
                self._expire()
                next_expiry = time.monotonic() + HOUR_S
            sighting = self._queue.get(HOUR_S)
            if sighting:
                begin = time.thread_time()
                self._count(self.settle(sighting, time.monotonic()))
                del sighting
                time.sleep(self._pace.pause(time.thread_time() - begin, time.monotonic()))

    def settle(self, sighting: Sighting, now: float) -> str:
        """Keep a picture if it is to be; what became of it. now: seconds on a clock that never goes back."""
        reasons = self._budget.allowed(sighting.reasons, now)
        if not reasons:
            return BUDGET
        try:
            seen = look(sighting.body, self._pipeline.settings.limits), frozenset(sighting.found.labels.tolist())
            if self._memory.has_like(*seen):
                return DUPLICATE
            self._write(sighting, reasons)
        except Exception as error:  # noqa: BLE001  # whatever it is, it concerns this picture alone
            self._log(f"a picture could not be kept: {error or type(error).__name__}")
            return FAILED
        self._memory.add(*seen)
        self._budget.take(reasons, now)
        return STORED

    def _write(self, sighting: Sighting, reasons: Sequence[Reason]) -> None:
        settings = self._pipeline.settings
        blurred = self._blurred(sighting)
        picture, suffix = prepared(sighting.body, settings.limits, blurred)
        context = Context(
            settings.name, settings.version, self._pipeline.labels, sighting.height, sighting.width, timing_ms={}
        )
        answer = json_answer(sighting.found, "detections", context)
        record: dict[str, Any] = {
            "model": answer["model"],
            "version": answer["version"],
            "checksum": self._pipeline.checksum,
            "reasons": list(dict.fromkeys(reason.text for reason in reasons)),
            "width": answer["width"],
            "height": answer["height"],
            "detections": answer["detections"],
            "score_threshold": self._pipeline.defaults.score_threshold,
            "blurred": bool(blurred),
        }
        write_item(self._store, sighting.when, picture, suffix, record)

    def _blurred(self, sighting: Sighting) -> list[Box]:
        """What is to be blurred, in pixels of the upright picture: also of candidates that are no detections."""
        if not self._blurs:
            return []
        assert sighting.candidates is not None
        boxes, labels, _ = (part.cpu() for part in sighting.candidates)
        if sighting.plan is not None:
            boxes = unletterbox(boxes, sighting.plan)
        rows: list[Box] = list(map(tuple, clip(boxes, sighting.height, sighting.width).tolist()))
        names = [self._pipeline.labels[label] for label in labels.tolist()]
        blur = self._capture.blur
        whole = [box for box, name in zip(rows, names, strict=True) if name in blur.classes]
        return whole + [head(box) for box, name in zip(rows, names, strict=True) if name in blur.heads_of]

    def _expire(self) -> None:
        oldest = datetime.now(UTC) - timedelta(days=self._capture.days)
        try:
            self._store.expire(f"{oldest:%Y-%m-%d}")
        except Exception as error:  # noqa: BLE001  # what is old can be removed later
            self._log(f"old pictures could not be removed: {error or type(error).__name__}")

    def _log(self, text: str) -> None:
        if time.monotonic() - self._logged >= QUIET_S:
            self._logged = time.monotonic()
            logger.warning("capture: %s", " ".join(text.split()))


def open_capture(
    pipeline: "Pipeline", config: Mapping[str, Any], count: Callable[[str], None]
) -> PictureCapture | None:
    """What an archive's recipe and its server want to be kept, at work; None for nothing.

    config: the parsed model-config.yaml. count: as `PictureCapture` takes it. Raises BadSettings.
    """
    capture = pipeline.settings.capture
    if capture is None:
        return None
    to = os.environ.get(CAPTURE_VARIABLE) or capture.to
    if to is None or to == OFF:
        logger.info("capture: off, by %s", CAPTURE_VARIABLE if to else f"want of a destination; set {CAPTURE_VARIABLE}")
        return None
    try:
        check_destination(to)
    except ValueError as error:
        raise BadSettings(f"{CAPTURE_VARIABLE}: {error}, or {OFF}") from error
    keeper = PictureCapture(capture, to, pipeline, max(1, config.get("maxWorkers", 1)), count)
    pipeline.keep_above = keeper.keep_above
    keeper.start()
    logger.info("capture: pictures are kept in %s for %d days", to, capture.days)
    return keeper
