"""KServe v2 over REST: `/v2/…`. Errors have the protocol's form, `{"error": "…"}`, and beside it their `type`."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import BaseModel

from tools.gateway.auth import caller
from tools.gateway.errors import KSERVE
from tools.gateway.kserve.calls import SERVER, Calls, ModelMetadata, ServerMetadata
from tools.gateway.kserve.codec import InferInput, InferOutput, read_rest, write_rest
from tools.gateway.services import Services

JSON_SIZE = "Inference-Header-Content-Length"
# Bytes from which on JSON takes its time: a million are read in 6 ms, and those of numbers written in 50.
LARGE = 1_000_000

Made = TypeVar("Made")


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelIsReady(BaseModel):
    name: str
    ready: bool


class Refused(BaseModel):
    """Why there is no answer: a line for people, a name for programs."""

    error: str
    type: str


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Refused} for status in statuses}


_READS = _refusals(401, 404, 429, 503)
_INFERS = _refusals(400, 401, 404, 408, 413, 415, 429, 500, 503) | {200: {"content": {"application/octet-stream": {}}}}
_SCHEMA = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": InferInput.model_json_schema()},
        "outputs": {"type": "array", "items": InferOutput.model_json_schema()},
    },
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _SCHEMA},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_JsonSize = Annotated[
    str | None,
    Header(alias=JSON_SIZE, description="bytes of the JSON at the head of the body, where tensors follow it"),
]


async def _worked(size: int, work: Callable[..., Made], *given: Any) -> Made:
    """What `work` makes of so many bytes; of many in a thread, so that other requests have their turn meanwhile."""
    return await asyncio.to_thread(work, *given) if size > LARGE else work(*given)


def router(services: Services) -> APIRouter:
    calls = Calls(services.backend)
    everybody = APIRouter(prefix=KSERVE, tags=["KServe v2"])
    callers = APIRouter(prefix=f"{KSERVE}/models/{{name}}", tags=["KServe v2"], dependencies=[Depends(caller)])

    @everybody.get("", summary="ServerMetadata")
    async def server_metadata() -> ServerMetadata:
        return SERVER

    @everybody.get("/health/live", summary="ServerLive")
    async def server_live() -> Live:
        return Live(live=True)

    @everybody.get("/health/ready", summary="ServerReady", responses={503: {"model": Ready}})
    async def server_ready(response: Response) -> Ready:
        """200 when every model answers."""
        ready = await calls.server_ready()
        response.status_code = 200 if ready else 503
        return Ready(ready=ready)

    async def model_ready(name: str, version: str | None, response: Response) -> ModelIsReady:
        ready = await calls.model_ready(name, version)
        response.status_code = 200 if ready else 503
        return ModelIsReady(name=name, ready=ready)

    async def infer(name: str, version: str | None, request: Request, json_size: str | None) -> Response:
        given = await request.body()
        asked = await _worked(len(given), read_rest, given, json_size)
        answer = await calls.infer(name, version, asked)
        body, size = await _worked(answer.size, write_rest, answer, asked)
        if size is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={JSON_SIZE: str(size)})

    @callers.get("", summary="ModelMetadata", responses=_READS)
    async def default_metadata(name: str) -> ModelMetadata:
        return await calls.metadata(name, None)

    @callers.get("/versions/{version}", summary="ModelMetadata of a version", responses=_READS)
    async def version_metadata(name: str, version: str) -> ModelMetadata:
        return await calls.metadata(name, version)

    @callers.get("/ready", summary="ModelReady", responses=_READS)
    async def default_ready(name: str, response: Response) -> ModelIsReady:
        return await model_ready(name, None, response)

    @callers.get("/versions/{version}/ready", summary="ModelReady of a version", responses=_READS)
    async def version_ready(name: str, version: str, response: Response) -> ModelIsReady:
        return await model_ready(name, version, response)

    @callers.post("/infer", summary="ModelInfer", responses=_INFERS, openapi_extra=_BODY)
    async def default_infer(name: str, request: Request, json_size: _JsonSize = None) -> Response:
        return await infer(name, None, request, json_size)

    @callers.post(
        "/versions/{version}/infer", summary="ModelInfer of a version", responses=_INFERS, openapi_extra=_BODY
    )
    async def version_infer(name: str, version: str, request: Request, json_size: _JsonSize = None) -> Response:
        return await infer(name, version, request, json_size)

    # Side by side: of a router in another one the figures would know half of the path.
    both = APIRouter()
    both.include_router(everybody)
    both.include_router(callers)
    return both
