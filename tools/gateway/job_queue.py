"""Video jobs on disk, worked off one after the other; they outlive the gateway.

<folder>/<id>/job.json           written last of an upload and removed first: without it the job is not there
<folder>/<id>/source             the video as it came; gone when the job is finished
<folder>/<id>/result.mp4         only of a job that is done, as is detections.jsonl
<folder>/lock                    held by the one gateway that works here

queued -> running -> done | failed; a gateway that stops puts the running one back.
"""

import asyncio
import fcntl
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from pydantic import BaseModel

from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.gateway.backend import Backend
from tools.gateway.errors import GatewayError
from tools.gateway.listing import page
from tools.gateway.settings import Video
from tools.video.frames import VideoFile
from tools.video.overlay import Overlay
from tools.video.run import Cancelled, annotate
from tools.video.writer import VideoWriter

logger = logging.getLogger(__name__)

RECORD, SOURCE, RESULT, DETECTIONS = "job.json", "source", "result.mp4", "detections.jsonl"
# A video that brings the gateway down does so no more often than this.
MOST_ATTEMPTS = 3
# How long a job waits for a model server that does not answer.
PATIENCE_S = 600
FULL_RETRY_S = 30
SWEEP_S = 60

Opened = TypeVar("Opened")


class Job(BaseModel):
    """What the owner of a job sees of it.

    frames: to be looked at, null where the video does not tell. frames_done: of them. detections: on all of them.
    error: why it failed. damaged: what of the video could not be read. expires: null until it is finished.
    """

    id: str
    model: str
    version: str
    state: Literal["queued", "running", "done", "failed"] = "queued"
    created: datetime
    expires: datetime | None = None
    frames: int | None = None
    frames_done: int = 0
    detections: int | None = None
    error: str | None = None
    damaged: str | None = None


class Jobs(BaseModel):
    """next: what to give as `after` for those that follow; none at the end."""

    videos: list[Job]
    next: str | None


class Record(Job):
    """A job as it lies on disk. asked_version: null for the one that is served by default. headers: of its requests.
    attempts: how often a gateway began it and was killed at it, the present one included."""

    owner: str
    asked_version: str | None
    labels: list[str]
    headers: dict[str, str]
    stride: int
    track: bool
    attempts: int = 0

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed")

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


class JobQueue:
    """The jobs of one gateway. Use between `start` and `close`, all of it in one event loop."""

    def __init__(self, settings: Video, backend: Backend):
        self._settings = settings
        self._backend = backend
        self._folder = settings.folder
        self._jobs: dict[str, Record] = {}
        self._arriving = 0
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._running: tuple[str, asyncio.Task[None]] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._lock: IO[bytes] | None = None

    async def start(self) -> None:
        """Take up what an earlier gateway left. Raises ToolError when the folder cannot be used."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ToolError(
                f"video folder {self._folder} is used by another gateway; give each its own,"
                " by --video-folder or video.folder in the file"
            ) from error
        except OSError as error:
            raise ToolError(f"video folder {self._folder} cannot be used ({error.strerror})") from error
        for record in sorted(self._take_up(), key=lambda record: record.created):
            self._jobs[record.id] = record
            if not record.finished:
                self._waiting.put_nowait(record.id)
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._sweep())]

    async def close(self) -> None:
        """Stop; the running job is put back."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._running:
            await asyncio.wait([self._running[1]])
        if self._lock:
            self._lock.close()

    @contextmanager
    def arriving(self, job: str) -> Iterator[Path]:
        """A place in the queue and a path for the source of a new job; all is gone unless it is added.

        Raises GatewayError 503 when the queue or the disk is full.
        """
        unfinished = sum(not record.finished for record in self._jobs.values())
        if unfinished + self._arriving >= self._settings.queue:
            raise GatewayError(
                503, "QueueFull", f"{self._settings.queue} videos wait or run already; try again later", FULL_RETRY_S
            )
        folder = self._folder / job
        self._arriving += 1
        try:
            folder.mkdir()
            yield folder / SOURCE
        except OSError as error:
            raise GatewayError(
                503, "NoSpace", f"the video cannot be stored ({error.strerror})", FULL_RETRY_S
            ) from error
        finally:
            self._arriving -= 1
            if job not in self._jobs:
                shutil.rmtree(folder, ignore_errors=True)

    def add(self, record: Record) -> None:
        self._save(record)
        self._jobs[record.id] = record
        self._waiting.put_nowait(record.id)

    def find(self, job: str, owner: str) -> Record:
        """Raises GatewayError 404 for what is not there, has expired or is another's."""
        record = self._jobs.get(job)
        if record is None or record.owner != owner or record.expired:
            raise GatewayError(404, "UnknownJob", f"you have no video {job[:40]!r}")
        return record

    def page(self, owner: str, after: str, limit: int) -> Jobs:
        """The owner's jobs, the oldest first, from behind the one called `after`."""
        owned = [name for name, record in self._jobs.items() if record.owner == owner and not record.expired]
        names, following = page(owned, after, limit)
        return Jobs(videos=[self._jobs[name] for name in names], next=following)

    def result(self, job: str, owner: str, name: str) -> Path:
        """A file of a job that is done. Raises GatewayError: 404, and 409 for one that is not done."""
        record = self.find(job, owner)
        if record.state != "done":
            raise GatewayError(409, "NotDone", f"the job is {record.state}" + f": {record.error}" * bool(record.error))
        return self._folder / job / name

    async def remove(self, job: str) -> None:
        """Stop the job if it runs, and delete all of it."""
        self._jobs.pop(job, None)
        (self._folder / job / RECORD).unlink(missing_ok=True)
        if self._running and self._running[0] == job:
            await asyncio.wait([self._running[1]])
        await asyncio.to_thread(shutil.rmtree, self._folder / job, ignore_errors=True)

    def _save(self, record: Record) -> None:
        with replacing(self._folder / record.id / RECORD) as file:
            file.write(record.model_dump_json().encode())

    def _take_up(self) -> Iterator[Record]:
        """The jobs on disk; what belongs to none is deleted."""
        for folder in self._folder.iterdir():
            if not folder.is_dir():
                continue
            try:
                record = Record.model_validate_json((folder / RECORD).read_bytes())
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if record.state == "running":
                if record.attempts >= MOST_ATTEMPTS:
                    self._finish(record, error=f"the gateway was killed {record.attempts} times at this video")
                else:
                    record.state = "queued"
            kept = {"done": {RESULT, DETECTIONS}, "failed": set()}.get(record.state, {SOURCE})
            for file in folder.iterdir():
                if file.name not in kept | {RECORD}:
                    file.unlink()
            yield record

    async def _work(self) -> None:
        while True:
            job = await self._waiting.get()
            if job not in self._jobs:
                continue
            self._running = job, asyncio.create_task(self._run(self._jobs[job]))
            await asyncio.wait([self._running[1]])
            if failure := self._running[1].exception():
                logger.error("the record of video job %s cannot be kept: %s", job, failure)
            self._running = None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_S, self._settings.ttl_s))
            for record in [record for record in self._jobs.values() if record.expired]:
                await self.remove(record.id)

    async def _run(self, record: Record) -> None:
        record.state, record.frames_done = "running", 0
        record.attempts += 1
        error = None
        try:
            self._save(record)
            await self._annotate(record)
        except Cancelled:
            if record.id in self._jobs:
                record.state = "queued"
                record.attempts -= 1
                self._save(record)
            return
        except ToolError as found:
            error = self._without_folder(str(found), record)
        except Exception:  # whatever one video brings about, the next one gets its turn
            logger.exception("video job %s failed", record.id)
            error = "the gateway failed on this video; its log has the cause"
        if record.id in self._jobs:
            self._finish(record, error)

    def _finish(self, record: Record, error: str | None) -> None:
        record.state, record.error = ("failed", error) if error else ("done", None)
        record.expires = datetime.now(UTC) + timedelta(seconds=self._settings.ttl_s)
        self._save(record)
        (self._folder / record.id / SOURCE).unlink(missing_ok=True)

    async def _annotate(self, record: Record) -> None:
        folder = self._folder / record.id
        source = folder / SOURCE

        async def ask(picture: bytes) -> list[dict[str, Any]]:
            return await self._ask(record, picture)

        def progress(done: int) -> None:
            record.frames_done = done

        def cancelled() -> bool:
            return self._closing or record.id not in self._jobs

        async with _in_thread(await asyncio.to_thread(VideoFile, source, record.stride)) as video:
            record.frames = video.frames
            writer = VideoWriter(folder / RESULT, video.width, video.height, video.rate, audio_from=source)
            overlay = Overlay(record.labels, track=record.track)
            with replacing(folder / DETECTIONS) as file, io.TextIOWrapper(file, encoding="utf-8") as lines:
                async with _in_thread(writer):
                    summary = await annotate(
                        video, ask, writer, overlay, lines, self._settings.concurrency, progress, cancelled
                    )
        record.frames = record.frames_done = summary.frames
        record.detections = summary.detections
        record.damaged = summary.damaged and self._without_folder(summary.damaged, record)

    def _without_folder(self, message: str, record: Record) -> str:
        """Where the gateway keeps its files is nobody's business."""
        return message.replace(f"{self._folder / record.id}/", "")

    async def _ask(self, record: Record, picture: bytes) -> list[dict[str, Any]]:
        """The detections on one frame. A server that is down or busy is asked again for PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = await self._backend.predict(
                    record.model, record.asked_version, picture, "image/jpeg", record.headers
                )
                break
            except GatewayError as error:
                if error.status != 503 or time.monotonic() > deadline:
                    raise ToolError(error.message) from error
                await asyncio.sleep(error.retry_after or 1)
        content = json.loads(answer.body)
        if answer.status != 200:
            raise ToolError(f"a frame was refused: {content['message']}")
        return content["detections"]


@asynccontextmanager
async def _in_thread(manager: AbstractContextManager[Opened]) -> AsyncIterator[Opened]:
    """A context whose beginning and good end take long, so that they must not stop the event loop."""
    opened = await asyncio.to_thread(manager.__enter__)
    try:
        yield opened
    except BaseException:
        manager.__exit__(*sys.exc_info())
        raise
    await asyncio.to_thread(manager.__exit__, None, None, None)
