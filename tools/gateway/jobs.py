"""Videos in, annotated videos and their detections out, when they are ready."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from handlers.errors import InvalidOption
from handlers.options import ALLOWED, Options, parse_options
from tools.errors import ToolError
from tools.gateway.auth import Who
from tools.gateway.errors import GatewayError, responses
from tools.gateway.job_queue import DETECTIONS, RESULT, Job, JobQueue, Jobs, Record
from tools.gateway.listing import After, Limit, new_name
from tools.gateway.services import Services
from tools.video.frames import VideoFile

# What the classes of a request are read beside.
_ANY_OPTIONS = Options(0.0, 0.0, 1, class_agnostic=False, classes=None, format="detections")
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "the video itself: `curl -X POST -T clip.mp4`",
        "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_VIDEO: dict[int | str, dict[str, Any]] = {
    200: {"description": "The video, H.264 with its sound.", "content": {"video/mp4": {"schema": {"type": "string"}}}}
}
_LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": 'A line for each frame: `{"frame", "seconds", "detections"}`.',
        "content": {"application/jsonl": {"schema": {"type": "string"}}},
    }
}


class Wishes(BaseModel):
    """What to look for in a video; a threshold that is left out is the model's own."""

    model: str | None = Field(None, description="may be left out where only one is served")
    version: str | None = Field(None, description="without it the one that the server serves by default")
    score_threshold: float | None = Field(None, ge=0, le=1)
    iou_threshold: float | None = Field(None, ge=0, le=1)
    classes: str | None = Field(None, max_length=10_000, description=ALLOWED["classes"])
    stride: int = Field(1, ge=1, le=10_000, description="look at every n-th frame only, and show only those")
    track: bool = Field(False, description="number the objects, each the same from frame to frame")

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in cls.model_fields:
                told = {"name": repr(name[:80]), "known": ", ".join(cls.model_fields)}
                raise PydanticCustomError("unknown_option", "unknown query parameter {name}; known: {known}", told)
        return given

    @property
    def headers(self) -> dict[str, str]:
        given = {"score-threshold": self.score_threshold, "iou-threshold": self.iou_threshold, "classes": self.classes}
        chosen = {f"Marina-{name}": str(value) for name, value in given.items() if value is not None}
        return {"Marina-format": "detections"} | chosen


def router(services: Services) -> APIRouter:
    jobs = JobQueue(services.settings.video, services.backend)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await jobs.start()
            yield
        finally:
            await jobs.close()

    routes = APIRouter(prefix="/videos", tags=["videos"], lifespan=lifespan)

    @routes.post("", status_code=202, responses=responses(400, 404, 415, 422), openapi_extra=_BODY)
    async def submit(request: Request, response: Response, who: Who, wishes: Annotated[Wishes, Query()]) -> Job:
        """Have objects detected in a video. Ask the address in `Location` how far it is."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise GatewayError(415, "UnsupportedMedia", "send the video itself, no form: curl -X POST -T clip.mp4")
        name = services.backend.name_or_only(wishes.model)
        model = await services.backend.model(name, wishes.version)
        check_classes(wishes, model.labels)
        now = datetime.now(UTC)
        job = new_name(now.timestamp())
        with jobs.arriving(job) as source:
            await _receive(request, source)
            frames = await asyncio.to_thread(_count_frames, source, wishes.stride)
            record = Record(
                id=job,
                owner=who.owner,
                model=name,
                version=model.version,
                asked_version=wishes.version,
                labels=model.labels,
                headers=wishes.headers,
                stride=wishes.stride,
                track=wishes.track,
                frames=frames,
                created=now,
            )
            jobs.add(record)
        response.headers["Location"] = request.url_for("job_state", job=job).path
        return record

    @routes.get("", responses=responses(422))
    async def listed(who: Who, after: After = "", limit: Limit = 20) -> Jobs:
        """Your jobs, the oldest first: how far each is."""
        return jobs.page(who.owner, after, limit)

    @routes.get("/{job}", responses=responses(404))
    async def job_state(job: str, who: Who) -> Job:
        """How far a job is."""
        return jobs.find(job, who.owner)

    @routes.get("/{job}/result.mp4", response_class=FileResponse, responses=_VIDEO | responses(404, 409))
    async def video(job: str, who: Who) -> FileResponse:
        """The video with boxes drawn on it."""
        path = jobs.result(job, who.owner, RESULT)
        return FileResponse(path, media_type="video/mp4", filename=RESULT, content_disposition_type="inline")

    @routes.get("/{job}/detections.jsonl", response_class=FileResponse, responses=_LINES | responses(404, 409))
    async def detections(job: str, who: Who) -> FileResponse:
        """What is on each frame."""
        return FileResponse(jobs.result(job, who.owner, DETECTIONS), media_type="application/jsonl")

    @routes.delete("/{job}", status_code=204, responses=responses(404))
    async def delete(job: str, who: Who) -> None:
        """Cancel a job that waits or runs; delete all of it, whatever its state."""
        await jobs.remove(jobs.find(job, who.owner).id)

    return routes


def check_classes(wishes: Wishes, labels: list[str]) -> None:
    """As the model itself would at the first frame. Raises GatewayError 400."""
    if wishes.classes is None:
        return
    try:
        parse_options({"classes": wishes.classes}, _ANY_OPTIONS, labels)
    except InvalidOption as error:
        raise GatewayError(400, "InvalidOption", str(error)) from error


async def _receive(request: Request, path: Path) -> None:
    """The body to a file; the gateway's door counts its bytes and its time."""
    with path.open("xb") as file:
        async for chunk in request.stream():
            file.write(chunk)


def _count_frames(path: Path, stride: int) -> int | None:
    """None where the video does not tell. Raises GatewayError 400 for what is no video."""
    try:
        with VideoFile(path, stride) as video:
            return video.frames
    except ToolError as error:
        raise GatewayError(400, "InvalidVideo", str(error).replace(str(path), "the body")) from error
