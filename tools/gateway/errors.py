"""Every error that the gateway answers with: in TorchServe's form, `{"code", "type", "message"}`, or where a client of
KServe v2 asks in the form of that, `{"error": "…"}`, with the type beside it."""

import logging
import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tools.gateway.storage import StorageDown

logger = logging.getLogger(__name__)

# Where the paths of KServe v2 begin.
KSERVE = "/v2"
# Seconds.
RETRY_AFTER_S = 5


class Error(BaseModel):
    """Why there is no answer: the HTTP status, a name for programs, and a line for people."""

    code: int
    type: str
    message: str


class GatewayError(HTTPException):
    """A request cannot be answered. retry_after: seconds after which it may be.

    An HTTPException, so that FastAPI lets it pass where it reads bodies.
    """

    def __init__(self, status: int, type: str, message: str, retry_after: float | None = None):
        headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        # What is left of a refused body would otherwise still be read.
        if status in (408, 413):
            headers["Connection"] = "close"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, " ".join(message.split()), headers)
        self.status = status
        self.type = type
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        return self.detail

    def response(self, path: str) -> JSONResponse:
        """path: of the request."""
        content = {"code": self.status, "type": self.type, "message": self.message}
        if path.startswith(f"{KSERVE}/"):
            content = {"error": self.message, "type": self.type}
        return JSONResponse(content, self.status, self.headers)


# What any call that needs a caller may be refused with.
COMMON = (401, 408, 413, 429, 503)
_MEANING = {
    400: "The picture or an option cannot be used.",
    401: "No token, or none that is known.",
    404: "There is no such thing, or it belongs to another caller.",
    408: "The body came too slowly.",
    409: "Not in this state.",
    413: "The body is too large.",
    415: "The body is of a form that is not taken.",
    422: "A parameter is missing, or has a value that it cannot have.",
    429: "Too many requests of this caller; see Retry-After.",
    500: "The model failed on this picture.",
    503: "The model, or the gateway, is not available or busy; see Retry-After.",
}


def responses(*statuses: int, common: Iterable[int] = COMMON) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the errors that it answers with, beside the common ones."""
    return {status: {"model": Error, "description": _MEANING[status]} for status in sorted({*statuses, *common})}


def handle_errors(app: FastAPI) -> None:
    """Have every error of `app` answered in this form."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, GatewayError):
            kind = HTTPStatus(error.status_code).phrase.title().replace(" ", "")
            headers = error.headers
            error = GatewayError(error.status_code, kind, f"{request.method} {request.url.path[:200]}: {error.detail}")
            error.headers = headers
        return error.response(request.url.path)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.exception_handler(StorageDown)
    async def storage_down(request: Request, error: StorageDown) -> JSONResponse:
        logger.warning("the storage of uploads is down: %s", error)
        message = "uploads cannot be kept or read now; try again"
        return GatewayError(503, "StorageDown", message, RETRY_AFTER_S).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        refusal = GatewayError(422, "InvalidParameter", f"{where}: {first['msg']} (it is {first['input']!r:.80})")
        return refusal.response(request.url.path)
