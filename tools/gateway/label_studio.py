"""The ML backend that Label Studio asks for live predictions: https://labelstud.io/guide/ml_create.

health   whether it is there and the key is right
setup    the project's labels are among the model's; the model version, so that nothing is predicted twice
predict  pictures fetched from Label Studio -> the model -> regions
train    is done elsewhere

Pictures are fetched from the configured Label Studio alone, whatever a task says, without following where it sends on.
Label Studio shows the key by basic authentication, as the password.
"""

import asyncio
import json
import logging
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBasic, HTTPBasicCredentials
from pydantic import BaseModel, Field

from tools.gateway.auth import Caller, caller
from tools.gateway.backend import Model
from tools.gateway.errors import GatewayError, responses
from tools.gateway.form import BODY_TYPE
from tools.gateway.services import Services
from tools.labelstudio.access import Access, picture_url
from tools.labelstudio.client import origin_and_path, read_token
from tools.labelstudio.config import Control, read_config
from tools.labelstudio.regions import model_version, prediction, to_regions

logger = logging.getLogger(__name__)

TOGETHER = 8  # pictures of one request
FETCH_TIMEOUT_S = 30.0

_BASIC = HTTPBasic(auto_error=False, description="An API key as the password, whatever the name.")


class Project(BaseModel):
    """config: its labelling configuration. What else Label Studio sends, a token among it, is not looked at."""

    config: str = Field(alias="schema")


class Task(BaseModel):
    id: int
    data: dict[str, Any]


class Tasks(BaseModel):
    tasks: list[Task]
    label_config: str


class Event(BaseModel):
    action: str


async def _annotating(request: Request, basic: Annotated[HTTPBasicCredentials | None, Depends(_BASIC)]) -> Caller:
    """As `caller`, by basic authentication."""
    key = HTTPAuthorizationCredentials(scheme="Bearer", credentials=basic.password) if basic else None
    try:
        return await caller(request, key)
    except GatewayError as error:
        if error.status == 401:
            error.headers = {"WWW-Authenticate": "Basic"}
        raise


Annotating = Annotated[Caller, Depends(_annotating)]


def router(services: Services) -> APIRouter:
    """Empty where the settings name no Label Studio. Raises ToolError for a token that cannot be used."""
    settings, backend = services.settings, services.backend
    routes = APIRouter(prefix="/label-studio", tags=["Label Studio"])
    if settings.label_studio_url is None or settings.label_studio_token_file is None:
        return routes
    pictures = _Pictures(
        origin_and_path(settings.label_studio_url),
        read_token(settings.label_studio_token_file),
        settings.limits.max_bytes,
    )

    @routes.get("/health", responses=responses())
    async def health(who: Annotating) -> dict[str, str]:
        """The gateway runs, and knows the key."""
        return {"status": "UP"}

    @routes.post("/setup", responses=responses(400))
    async def setup(who: Annotating, project: Project) -> dict[str, str]:
        """Whether the model can help in this project, and its version."""
        model = await backend.model(backend.name_or_only(settings.label_studio_model))
        _control(project.config, model)
        return {"model_version": model_version(model.name, model.version)}

    @routes.post("/predict", responses=responses(400, 500))
    async def predict(who: Annotating, tasks: Tasks) -> dict[str, list[Any]]:
        """What the model finds on the picture of each task."""
        model = await backend.model(backend.name_or_only(settings.label_studio_model))
        control = _control(tasks.label_config, model)
        doors = asyncio.Semaphore(TOGETHER)

        async def one(task: Task) -> dict[str, Any] | GatewayError:
            try:
                async with doors:
                    picture = await pictures.fetch(task.data.get(control.key))
                    return await _predict(services, model, picture, control)
            except GatewayError as error:
                logger.warning("Label Studio's task %d has no prediction: %s", task.id, error.message)
                return error

        found = await asyncio.gather(*(one(task) for task in tasks.tasks))
        failed = [result for result in found if isinstance(result, GatewayError)]
        if failed and len(failed) == len(found):
            raise failed[0]
        # An empty list is a task without a prediction, which Label Studio asks for again.
        return {"results": [[] if isinstance(result, GatewayError) else result for result in found]}

    @routes.post("/train", responses=responses())
    async def train(who: Annotating) -> None:
        """It is refused: this serves models."""
        raise _not_trained()

    @routes.post("/webhook", responses=responses())
    async def webhook(who: Annotating, event: Event) -> dict[str, str]:
        """What annotators do is of no use here; a training is refused."""
        if event.action == "START_TRAINING":
            raise _not_trained()
        return {}

    return routes


class _Pictures:
    """Of tasks, from the Label Studio at `url`."""

    def __init__(self, url: str, token: str, most: int):
        """most: bytes of a picture."""
        self._url = url
        self._access = Access(url, token)
        self._most = most

    async def fetch(self, address: object) -> bytes:
        """Raises GatewayError: 400 for what is not at that Label Studio or too large, 503 where it gives nothing."""
        url = picture_url(self._url, address)
        if url is None:
            raise GatewayError(
                400, "InvalidTask", f"the picture's address {str(address)[:200]!r} is not at {self._url}"
            )
        body = bytearray()
        try:
            async with (
                httpx.AsyncClient(auth=self._access, timeout=FETCH_TIMEOUT_S, follow_redirects=False) as client,
                client.stream("GET", url) as answer,
            ):
                if answer.status_code != 200:
                    raise _no_picture(f"Label Studio answers {answer.status_code} for it")
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > self._most:
                        raise GatewayError(400, "InvalidTask", f"the picture has more than {self._most} bytes")
        except httpx.HTTPError as error:
            raise _no_picture(f"Label Studio does not answer: {type(error).__name__}") from error
        return bytes(body)


def _no_picture(why: str) -> GatewayError:
    return GatewayError(503, "NoPicture", f"the picture cannot be had: {why}")


async def _predict(services: Services, model: Model, picture: bytes, control: Control) -> dict[str, Any]:
    """Raises GatewayError."""
    # Also so that the request has options of its own: it is no traffic to be captured, or measured for drift.
    classes = ",".join(str(index) for index, label in enumerate(model.labels) if label in control.labels)
    headers = {"Marina-Format": "detections", "Marina-Classes": classes}
    answer = await services.backend.predict(model.name, None, picture, BODY_TYPE, headers)
    content = json.loads(answer.body)
    if answer.status != 200:
        raise GatewayError(answer.status, content["type"], content["message"])
    regions = to_regions(content["detections"], content["width"], content["height"], control)
    return prediction(model_version(content["model"], content["version"]), regions)


def _control(config: str, model: Model) -> Control:
    """Raises GatewayError 400 for a project that the model cannot help in."""
    try:
        control = read_config(config)
    except ValueError as error:
        raise GatewayError(400, "InvalidProject", f"the labelling configuration does not fit: {error}") from error
    if not set(control.labels) & set(model.labels):
        raise GatewayError(
            400,
            "InvalidProject",
            f"none of the project's labels ({', '.join(control.labels)[:200]}) is one that the model knows"
            f" ({', '.join(model.labels)[:200]})",
        )
    return control


def _not_trained() -> GatewayError:
    return GatewayError(501, "NotTrainedHere", "the gateway serves models and trains none; use marina label pull")
