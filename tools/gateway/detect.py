"""A picture in, what is on it out; and which models there are."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from handlers.options import ALLOWED
from tools.gateway.auth import Who
from tools.gateway.backend import Model
from tools.gateway.errors import responses
from tools.gateway.form import BODY_TYPE, form_schema, read_form
from tools.gateway.services import Services


class Detection(BaseModel):
    """label and index: the class, by name and number. box: x1 y1 x2 y2 in pixels of the upright picture."""

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]


class Detections(BaseModel):
    """What is on one picture, the surest first. width, height: of the upright picture. timing_ms: of each stage."""

    model: str
    version: str
    width: int
    height: int
    detections: list[Detection]
    timing_ms: dict[str, float]


class Models(BaseModel):
    models: list[Model]


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON in the form `detections`, or another that `format` names: `image` is the picture with"
        " boxes drawn on it, `yolo` is text, `torchserve` and `coco` are lists.",
        "model": Detections,
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/Detections"},
                        {"type": "array", "items": {"type": "object"}},
                    ]
                }
            },
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "text/plain": {"schema": {"type": "string"}},
        },
    }
}


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["detection"])
    backend = services.backend

    @routes.post(
        "/detect",
        response_class=Response,
        responses=_ANSWERS | responses(400, 404, 415, 500),
        openapi_extra=form_schema(*ALLOWED),
    )
    async def detect(request: Request, who: Who) -> Response:
        """Detect objects on one picture. The field `format` says in which form to answer, else `Accept` does:
        `image/jpeg` is answered with the picture with boxes, all else with JSON."""
        form = await read_form(request)
        headers = {"Marina-Format": preferred_format(request.headers.get("accept", ""))} | form.headers(*ALLOWED)
        model = backend.name_or_only(form.fields.get("model"))
        answer = await backend.predict(model, form.fields.get("version"), form.picture, BODY_TYPE, headers)
        return Response(answer.body, answer.status, media_type=answer.content_type)

    @routes.get("/models", responses=responses())
    async def models(who: Who) -> Models:
        """Which models are served: version, checksum, labels, thresholds, since when, and whether they answer now."""
        return Models(models=await backend.models())

    return routes


def preferred_format(accept: str) -> str:
    """Of an Accept header (RFC 9110, section 12.5.1): `image` when it asks for pictures first, else `detections`."""
    best, found = 0.0, "detections"
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        form = {"image/jpeg": "image", "image/*": "image", "application/json": "detections", "*/*": "detections"}.get(
            kind
        )
        quality = next((_number(part[2:]) for part in parameters if part.startswith("q=")), 1.0)
        if form and quality > best:
            best, found = quality, form
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
