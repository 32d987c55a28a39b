"""A video through a detector: several frames under way at once, their results in order."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image

from tools.errors import ToolError
from tools.video.frames import Frame, LiveStream, VideoFile
from tools.video.overlay import Overlay
from tools.video.writer import VideoWriter

JPEG_QUALITY = 95
CANCEL_CHECK_S = 0.2

T = TypeVar("T")
Found = list[dict[str, Any]]


class Cancelled(ToolError):
    """Whoever asked for the video wants it no more."""


@dataclass(frozen=True)
class Summary:
    """frames and detections: how many went through. damaged: the video's, None for a whole one."""

    frames: int
    detections: int
    damaged: str | None


async def annotate(
    video: VideoFile | LiveStream,
    ask: Callable[[bytes], Awaitable[Found]],
    writer: VideoWriter | None,
    overlay: Overlay | None,
    jsonl: IO[str] | None,
    concurrency: int,
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> Summary:
    """Asks for the detections of every frame, and writes them in the order of the frames.

    ask: from a JPEG to what the format `detections` holds, boxes in the frame's pixels; at most `concurrency` calls
    are under way. writer: gets the frames with the overlay's boxes. jsonl: gets a line a frame, {"frame": index,
    "seconds": time, "detections": […]}. progress: called with the frames done so far. cancelled: asked several times
    a second.

    Raises Cancelled, what `ask` raises, and what the video and the writer raise.
    """
    pipeline = _Pipeline(video, ask, concurrency)
    reading = asyncio.create_task(pipeline.read())
    frames = detections = 0
    try:
        while (item := await _unless(cancelled, pipeline.asked.get())) is not None:
            frame, answer = item
            found = await _unless(cancelled, answer)
            if overlay is not None and overlay.tracks:
                found = overlay.track(found, frame.seconds)
            if writer is not None:
                await _to_its_end(asyncio.to_thread(_draw_and_write, writer, overlay, frame, found))
            if jsonl is not None:
                line = {"frame": frame.index, "seconds": round(frame.seconds, 6), "detections": found}
                jsonl.write(json.dumps(line, ensure_ascii=False) + "\n")
            pipeline.room.release()
            frames += 1
            detections += len(found)
            progress(frames)
        await reading
    finally:
        await pipeline.stop(reading)
    return Summary(frames, detections, video.damaged)


class _Pipeline:
    """Frames with their requests, in the order of the frames; None after the last one."""

    def __init__(self, video: VideoFile | LiveStream, ask: Callable[[bytes], Awaitable[Found]], concurrency: int):
        self.asked: asyncio.Queue[tuple[Frame, asyncio.Task[Found]] | None] = asyncio.Queue()
        # Answered frames that wait for a slow first one are held too; beyond these nothing is read.
        self.room = asyncio.Semaphore(2 * concurrency)
        self._video = video
        self._ask = ask
        self._free = asyncio.Semaphore(concurrency)
        self._requests: set[asyncio.Task[Found]] = set()
        # A thread of its own, not waited for: a live source that is silent holds it until it is closed.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="frames")

    async def read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                # Before the frame is taken: a live source's must not grow old while it waits.
                await self.room.acquire()
                await self._free.acquire()
                frame = await loop.run_in_executor(self._reader, next, self._video, None)
                if frame is None:
                    return
                request = asyncio.create_task(self._request(frame))
                self._requests.add(request)
                request.add_done_callback(self._answered)
                self.asked.put_nowait((frame, request))
        finally:
            self.asked.put_nowait(None)

    async def _request(self, frame: Frame) -> Found:
        try:
            return await self._ask(await asyncio.to_thread(_jpeg, frame.pixels))
        finally:
            self._free.release()

    def _answered(self, request: asyncio.Task[Found]) -> None:
        self._requests.discard(request)
        if not request.cancelled():
            request.exception()  # seen: the first frame's is raised, and asyncio need not complain of the others'

    async def stop(self, reading: asyncio.Task[None]) -> None:
        self._reader.shutdown(wait=False)
        under_way = [reading, *self._requests]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _unless(cancelled: Callable[[], bool], awaited: Awaitable[T]) -> T:
    task = asyncio.ensure_future(awaited)
    try:
        while not cancelled():
            if (await asyncio.wait({task}, timeout=CANCEL_CHECK_S))[0]:
                return task.result()
        raise Cancelled("the video was cancelled")
    finally:
        task.cancel()


async def _to_its_end(work: Awaitable[T]) -> T:
    """A thread cannot be stopped: who cancels waits until it no longer works on what will be closed."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _jpeg(pixels: np.ndarray) -> bytes:
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "JPEG", quality=JPEG_QUALITY)
    return body.getvalue()


def _draw_and_write(writer: VideoWriter, overlay: Overlay | None, frame: Frame, found: Found) -> None:
    if overlay is not None:
        frame = replace(frame, pixels=overlay.draw(frame.pixels, found))
    writer.write(frame)
