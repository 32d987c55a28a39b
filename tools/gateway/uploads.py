"""Pictures that are kept with what was found on them: for their owner, under names of ours, for a time."""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel

from handlers.drawing import class_colour, draw_boxes
from handlers.image import decode, sniff
from handlers.settings import Limits
from tools.gateway.auth import Who
from tools.gateway.detect import Detection
from tools.gateway.errors import GatewayError, responses
from tools.gateway.form import BODY_TYPE, form_schema, read_form
from tools.gateway.listing import After, Limit, new_name, page
from tools.gateway.services import Services
from tools.gateway.storage import Storage

logger = logging.getLogger(__name__)

OPTIONS = ("score_threshold", "iou_threshold", "max_detections", "classes", "class_agnostic")
SWEEP_S = 60
# Pictures that are drawn on at once; each takes 50 megapixels at most.
DRAWN_AT_ONCE = 2

# As `new_name` makes it, so that it tells when the upload expires.
_ID = re.compile(r"[0-9a-f]{32}")


class Upload(BaseModel):
    """filename: as the client called it. counts: detections of each label."""

    id: str
    created: datetime
    expires: datetime
    filename: str
    content_type: str
    model: str
    version: str
    width: int
    height: int
    counts: dict[str, int]
    detections: list[Detection]


class Uploads(BaseModel):
    """next: what to give as `after` for those that follow; none at the end."""

    uploads: list[Upload]
    next: str | None


class Shelf:
    """The uploads in a storage. Blocking: call it in a thread.

    uploads/<owner>/<id>/original      the picture as it came
    uploads/<owner>/<id>/record.json   written last: without it the upload is not there
    """

    def __init__(self, storage: Storage, ttl_s: int):
        self._storage = storage
        self._ttl_s = ttl_s

    def add(self, owner: str, picture: bytes, filename: str, answer: dict[str, Any]) -> Upload:
        """answer: of format `detections`."""
        now = time.time()
        detections = answer["detections"]
        upload = Upload(
            id=new_name(now),
            created=_moment(int(now)),
            expires=_moment(int(now) + self._ttl_s),
            filename="".join(character for character in filename if character.isprintable())[:200],
            content_type=f"image/{(sniff(picture) or '').lower()}",
            counts=Counter(detection["label"] for detection in detections),
            **{name: answer[name] for name in ("model", "version", "width", "height", "detections")},
        )
        folder = _folder(owner, upload.id)
        self._storage.put(f"{folder}/original", picture)
        self._storage.put(f"{folder}/record.json", upload.model_dump_json().encode())
        return upload

    def get(self, owner: str, upload: str) -> Upload:
        """Raises GatewayError 404 for what is not there, has expired or is another's."""
        record = None
        if _ID.fullmatch(upload) and not self._expired(upload):
            record = self._storage.get(f"{_folder(owner, upload)}/record.json")
        if record is None:
            raise GatewayError(404, "UnknownUpload", f"you have no upload {upload[:40]!r}")
        return Upload.model_validate_json(record)

    def picture(self, owner: str, upload: str) -> tuple[Upload, bytes]:
        found = self.get(owner, upload)
        picture = self._storage.get(f"{_folder(owner, upload)}/original")
        if picture is None:
            raise GatewayError(404, "UnknownUpload", f"upload {upload[:40]!r} was deleted just now")
        return found, picture

    def page(self, owner: str, after: str, limit: int) -> Uploads:
        names, following = page(self._storage.list(f"uploads/{owner}"), after, limit)
        found = []
        for name in names:
            with suppress(GatewayError):
                found.append(self.get(owner, name))
        return Uploads(uploads=found, next=following)

    def delete(self, owner: str, upload: str) -> None:
        self.get(owner, upload)
        self._storage.delete(_folder(owner, upload))

    def sweep(self) -> None:
        """Delete what has expired, with what a crash left behind."""
        for owner in self._storage.list("uploads"):
            for upload in self._storage.list(f"uploads/{owner}"):
                if _ID.fullmatch(upload) and self._expired(upload):
                    self._storage.delete(_folder(owner, upload))

    def _expired(self, upload: str) -> bool:
        return int(upload[:8], 16) + self._ttl_s <= time.time()


def _folder(owner: str, upload: str) -> str:
    return f"uploads/{owner}/{upload}"


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def annotated(picture: bytes, detections: list[Detection], max_bytes: int) -> bytes:
    """The picture with boxes, names and scores drawn on it, as JPEG."""
    pixels = decode(picture, Limits(max_bytes=max_bytes))
    image = draw_boxes(
        pixels,
        [detection.box for detection in detections],
        [f"{detection.label} {detection.score:.2f}" for detection in detections],
        [class_colour(detection.index) for detection in detections],
    )
    sink = BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _picture(kind: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}}


def router(services: Services) -> APIRouter:
    shelf = Shelf(services.storage, services.settings.upload_ttl_s)
    drawing = asyncio.Semaphore(DRAWN_AT_ONCE)

    async def sweep() -> None:
        while True:
            try:
                await asyncio.to_thread(shelf.sweep)
            except OSError as error:
                logger.warning("expired uploads could not be deleted: %s", error)
            await asyncio.sleep(SWEEP_S)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(sweep())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    routes = APIRouter(prefix="/uploads", tags=["uploads"], lifespan=lifespan)

    @routes.post("", status_code=201, responses=responses(400, 404, 415, 500), openapi_extra=form_schema(*OPTIONS))
    async def upload(request: Request, who: Who) -> Upload:
        """Detect objects on a picture, and keep both until it expires or is deleted."""
        form = await read_form(request)
        headers = {"Marina-Format": "detections"} | form.headers(*OPTIONS)
        model = services.backend.name_or_only(form.fields.get("model"))
        answer = await services.backend.predict(model, form.fields.get("version"), form.picture, BODY_TYPE, headers)
        content = json.loads(answer.body)
        if answer.status != 200:
            raise GatewayError(answer.status, content["type"], content["message"])
        return await asyncio.to_thread(shelf.add, who.owner, form.picture, form.filename, content)

    @routes.get("", responses=responses(422))
    async def listed(who: Who, after: After = "", limit: Limit = 20) -> Uploads:
        """Your uploads, the oldest first."""
        return await asyncio.to_thread(shelf.page, who.owner, after, limit)

    @routes.get("/{id}", responses=responses(404))
    async def one(id: str, who: Who) -> Upload:
        """What was found on the picture: boxes and counts."""
        return await asyncio.to_thread(shelf.get, who.owner, id)

    @routes.get(
        "/{id}/original",
        response_class=Response,
        responses=_picture("image/*") | responses(404),
    )
    async def original(id: str, who: Who) -> Response:
        """The picture, byte by byte as it came."""
        found, picture = await asyncio.to_thread(shelf.picture, who.owner, id)
        return Response(picture, media_type=found.content_type, headers={"X-Content-Type-Options": "nosniff"})

    @routes.get(
        "/{id}/annotated",
        response_class=Response,
        responses=_picture("image/jpeg") | responses(404),
    )
    async def drawn(id: str, who: Who) -> Response:
        """The picture with boxes, as JPEG."""
        found, picture = await asyncio.to_thread(shelf.picture, who.owner, id)
        async with drawing:
            body = await asyncio.to_thread(annotated, picture, found.detections, services.settings.limits.max_bytes)
        return Response(body, media_type="image/jpeg")

    @routes.delete("/{id}", status_code=204, responses=responses(404))
    async def deleted(id: str, who: Who) -> None:
        """Delete the picture and what was found on it."""
        await asyncio.to_thread(shelf.delete, who.owner, id)

    return routes
