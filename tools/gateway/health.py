"""Whether the gateway lives, whether its models answer, and its metrics."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from tools.gateway.auth import Who
from tools.gateway.errors import responses
from tools.gateway.services import Services
from tools.serve.store import gradient_jpeg

# Probes of several load balancers share one round of pictures.
FRESH_S = 1.0


_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


class Alive(BaseModel):
    status: str = "ok"


class Ready(BaseModel):
    """models: whether each answered a picture just now."""

    ready: bool
    models: dict[str, bool]


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["health"])
    picture = gradient_jpeg()
    lock = asyncio.Lock()
    latest = Ready(ready=False, models={})
    asked = float("-inf")

    @routes.get("/healthz")
    async def alive() -> Alive:
        """The gateway runs."""
        return Alive()

    @routes.get("/readyz", responses={503: {"model": Ready, "description": "A model does not answer."}})
    async def ready(response: Response) -> Ready:
        """200 when every model on every server answers a picture, else 503."""
        nonlocal latest, asked
        async with lock:
            if time.monotonic() > asked + FRESH_S:
                models = await services.backend.probe(picture)
                latest, asked = Ready(ready=all(models.values()), models=models), time.monotonic()
        response.status_code = 200 if latest.ready else 503
        return latest

    @routes.get(
        "/metrics",
        response_class=Response,
        responses=_TEXT | responses(),
    )
    async def metrics(who: Who) -> Response:
        """For Prometheus, which needs a key as everybody does."""
        for name, up in services.backend.up().items():
            services.figures.up.labels(name).set(up)
        return Response(generate_latest(services.figures.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
