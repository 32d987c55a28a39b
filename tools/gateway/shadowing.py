"""Candidates that see a share of the traffic, behind the answers.

    a live model's answer -> by chance -> bounded queue -> the candidate's answer -> compared -> counts, kept in a file
                                               |                  |                     |
                                            dropped      failed, unreachable    captured, where they differ

On the way of a request there is a throw of dice and a place in a queue. A live answer in another format than
`detections` is asked for again in that, behind the answer too.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import quote

from handlers.request import TENSOR
from handlers.settings import Limits
from tools.gateway.backend import Backend, BackendAnswer, Down, Late, Model, Replica, check_headers, new_client
from tools.gateway.errors import GatewayError
from tools.gateway.metrics import Figures
from tools.gateway.settings import Server, Settings
from tools.gateway.settings import Shadow as ShadowSettings
from tools.shadow.keeper import Keeper
from tools.shadow.matching import Counts, Tolerance, compare
from tools.shadow.record import Identity, Record, read_record, write_record
from tools.shadow.report import Report, make_report

logger = logging.getLogger(__name__)

RETRY_S = 1.0
SAVE_S = 5.0
# How long both models are taken for what they were when last asked; a new version is seen at once.
FRESH_S = 30.0
# Seconds between two lines of the log about what failed.
QUIET_S = 60.0
FORMAT = "Marina-Format"
DETECTIONS = "detections"


class Sighting(NamedTuple):
    """A picture as it was asked about. live: the answer in format `detections`; None where it was in another one."""

    body: bytes
    content_type: str
    headers: Mapping[str, str]
    live: bytes | None

    @property
    def size(self) -> int:
        return len(self.body) + len(self.live or b"")

    @property
    def options(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower() != FORMAT.lower()}


class _Failed(Exception):
    """The candidate answers a picture with an error, or too late."""


class Shadow:
    """One candidate; use between `start` and `close`.

    ask_live: see `Backend.predict`. describe_live: may raise Down or GatewayError. Raises ToolError for a file of
    counts that cannot be read.
    """

    def __init__(
        self,
        settings: ShadowSettings,
        gateway: Settings,
        ask_live: Callable[..., Awaitable[BackendAnswer]],
        describe_live: Callable[[str], Awaitable[Model]],
        figures: Figures,
    ):
        self._settings = settings
        self._server = _server(settings, gateway)
        self._ask_live = ask_live
        self._describe_live = describe_live
        self._figures = figures
        self._tolerance = Tolerance(iou=settings.iou, moved_iou=settings.moved_iou, score_change=settings.score_change)
        self._path = gateway.shadow_folder / f"{quote(settings.model, safe='')}.json"
        self._record = read_record(self._path, self._tolerance)
        self._keeper: Keeper | None = None
        if settings.capture is not None:
            limits = Limits(max_bytes=gateway.limits.max_bytes)
            self._keeper = Keeper(settings.capture, settings.capture_per_hour, limits)
        self._keeping: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[Sighting] = asyncio.Queue(settings.queue)
        self._bytes = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._meeting = asyncio.Lock()
        self._known_until = 0.0
        self._threshold = 0.0
        self._changed = False
        self._logged = -QUIET_S

    async def start(self) -> None:
        name, _, version = self._settings.candidate.partition("/")
        self._version = version or None
        self._client = new_client()
        self._replica = Replica(self._server, name, self._client)
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._settings.concurrency)]
        self._tasks.append(asyncio.create_task(self._save_often()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        await self._save()
        await self._client.close()

    def offer(self, body: bytes, content_type: str, headers: Mapping[str, str], answer: bytes) -> None:
        """A picture that the live model has answered with 200."""
        if random.random() >= self._settings.share:  # noqa: S311  # nobody gains by guessing it
            return
        form = next((value for name, value in headers.items() if name.lower() == FORMAT.lower()), None)
        sighting = Sighting(body, content_type, headers, answer if form == DETECTIONS else None)
        if self._queue.full() or self._bytes + sighting.size > self._settings.queue_bytes:
            self._count("dropped")
            return
        self._bytes += sighting.size
        self._queue.put_nowait(sighting)

    def report(self) -> Report:
        settings, waiting = self._settings, self._queue.qsize()
        return make_report(self._record, settings.model, settings.candidate, settings.share, settings.bounds, waiting)

    async def _work(self) -> None:
        while True:
            sighting = await self._queue.get()
            self._bytes -= sighting.size
            try:
                await self._look(sighting)
            except _Failed as error:
                self._count("failed")
                self._log(f"the candidate fails: {error}")
            except (Down, GatewayError) as error:
                self._count("unreachable")
                self._log(f"no answer: {error}")
                self._known_until = 0.0
                await asyncio.sleep(RETRY_S)
            except Exception:
                self._count("dropped")
                logger.exception("shadow of %s: a picture could not be compared", self._settings.model)

    async def _look(self, sighting: Sighting) -> None:
        """Raises _Failed, and Down or GatewayError where there is no answer."""
        await self._meet()
        record = self._record
        live = await self._live_again(sighting) if sighting.live is None else sighting.live
        candidate = await self._candidate(sighting)
        one, other, counts = await asyncio.to_thread(_compared, live, candidate, self._tolerance)
        if record is not self._record or not _are_of(record, one, other):
            # One of the models was exchanged meanwhile.
            self._known_until = 0.0
            self._count("dropped")
            return
        record.totals.add(counts, sum(one["timing_ms"].values()), sum(other["timing_ms"].values()))
        self._changed = True
        agree = all(each.agree for each in counts.values())
        self._figures.add_shadow(self._settings.model, "agreed" if agree else "differing", counts)
        # What was asked with options is not all that the models see.
        if self._keeper is not None and not agree and not sighting.options:
            self._capture(self._keeper, sighting.body, one, other)

    async def _meet(self) -> None:
        """Learn what both models are; where one is another than before, all begins anew."""
        async with self._meeting:
            if time.monotonic() < self._known_until:
                return
            self._replica.read_token()
            model, self._replica.model = await asyncio.gather(
                self._describe_live(self._settings.model), self._replica.describe(self._version)
            )
            self._threshold = model.postprocess.get("score_threshold", 0.0)
            live, candidate = _identity(model), _identity(self._replica.model)
            if self._record.live is None:
                self._record.live, self._record.candidate = live, candidate
                self._changed = True
            elif (self._record.live, self._record.candidate) != (live, candidate):
                logger.info("shadow of %s: another model or candidate; counting begins anew", self._settings.model)
                self._record = Record(live=live, candidate=candidate, tolerance=self._tolerance)
                self._changed = True
            self._known_until = time.monotonic() + FRESH_S

    async def _live_again(self, sighting: Sighting) -> bytes:
        headers = sighting.options | {FORMAT: DETECTIONS}
        answer = await self._ask_live(self._settings.model, None, sighting.body, sighting.content_type, headers)
        if answer.status != 200:
            raise GatewayError(answer.status, "Refused", f"the live model answers {answer.status} when asked again")
        return answer.body

    async def _candidate(self, sighting: Sighting) -> bytes:
        sent = sighting.options | {FORMAT: DETECTIONS, "Content-Type": sighting.content_type}
        try:
            check_headers(sent, self._replica.model.labels)
            answer = await self._replica.ask(self._version, sighting.body, sent, self._settings.timeout_s)
        except (GatewayError, Late) as error:
            raise _Failed(str(error)) from error
        if answer.status in (404, 503):
            raise Down(f"it answers {answer.status}")
        if answer.status != 200:
            raise _Failed(f"it answers {answer.status} {answer.body[:200]!r}")
        return answer.body

    def _capture(self, keeper: Keeper, body: bytes, live: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        """One at a time: where the store hangs, comparing goes on."""
        if self._keeping is not None and not self._keeping.done():
            self._count("not_captured")
            return
        identity, threshold = self._record.live, self._threshold
        assert identity is not None

        async def keep() -> None:
            try:
                if await asyncio.to_thread(keeper.keep, body, identity, live, threshold, candidate):
                    self._count("captured")
            except Exception as error:  # noqa: BLE001  # whatever it is, it concerns this picture alone
                self._count("not_captured")
                self._log(f"a picture could not be kept: {error or type(error).__name__}")

        self._keeping = asyncio.create_task(keep())

    def _count(self, outcome: str) -> None:
        """outcome: a field of `Totals`."""
        totals = self._record.totals
        setattr(totals, outcome, getattr(totals, outcome) + 1)
        self._figures.add_shadow(self._settings.model, outcome)
        self._changed = True

    def _log(self, text: str) -> None:
        if time.monotonic() - self._logged >= QUIET_S:
            self._logged = time.monotonic()
            logger.warning("shadow of %s: %s", self._settings.model, " ".join(text.split()))

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            await self._save()

    async def _save(self) -> None:
        if not self._changed:
            return
        self._changed = False
        content = self._record.model_dump_json(indent=2).encode()
        try:
            await asyncio.to_thread(write_record, self._path, content)
        except OSError as error:
            self._log(f"the counts cannot be written to {self._path}: {error.strerror or error}")


class ShadowedBackend(Backend):
    """All predictions that are made through it are seen by the shadow of their model, where there is one."""

    def __init__(self, settings: Settings, figures: Figures):
        super().__init__(settings.backends)
        ask_live = super().predict
        self._shadows = {
            one.model: Shadow(one, settings, ask_live, self._describe, figures) for one in settings.shadows
        }

    async def start(self) -> None:
        await super().start()
        for shadow in self._shadows.values():
            await shadow.start()

    async def close(self) -> None:
        for shadow in self._shadows.values():
            await shadow.close()
        await super().close()

    async def predict(
        self, model: str, version: str | None, body: bytes, content_type: str, headers: Mapping[str, str]
    ) -> BackendAnswer:
        answer = await super().predict(model, version, body, content_type, headers)
        shadow = self._shadows.get(model)
        # Promotion changes what is answered where no version is asked for.
        if shadow is not None and version is None and answer.status == 200 and content_type != TENSOR:
            shadow.offer(body, content_type, headers, answer.body)
        return answer

    async def _describe(self, name: str) -> Model:
        """As `model`, but a busy server that refuses this is not taken for one that is down. Raises Down too."""
        return await self._pick(name, None).describe()

    def reports(self) -> list[Report]:
        return [shadow.report() for shadow in self._shadows.values()]


def _server(shadow: ShadowSettings, gateway: Settings) -> Server:
    """The TorchServe that serves the candidate."""
    if shadow.url is not None:
        return Server(url=shadow.url, token_file=shadow.token_file, models=[shadow.candidate])
    return next(server for server in gateway.backends if shadow.model in server.models)


def _identity(model: Model) -> Identity:
    return Identity(name=model.name, version=model.version, checksum=model.checksum)


def _compared(live: bytes, candidate: bytes, tolerance: Tolerance) -> tuple[Any, Any, dict[str, Counts]]:
    """Both answers, of format `detections`, and what became of each class."""
    one, other = json.loads(live), json.loads(candidate)
    return one, other, compare(one["detections"], other["detections"], tolerance)


def _are_of(record: Record, live: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    assert record.live is not None
    assert record.candidate is not None
    return (live["version"], candidate["version"]) == (record.live.version, record.candidate.version)
