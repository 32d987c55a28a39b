"""The gateway as an ASGI application."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from tools.gateway import detect, docs, health, jobs, label_studio, page, shadow, uploads
from tools.gateway.auth import authenticator
from tools.gateway.errors import handle_errors
from tools.gateway.kserve import grpc, rest
from tools.gateway.limits import Door, Rates
from tools.gateway.metrics import Figures, Measured
from tools.gateway.services import Services
from tools.gateway.settings import Settings
from tools.gateway.shadowing import ShadowedBackend
from tools.gateway.storage import Storage

GRPC_GRACE_S = 5
ROUTERS: list[Callable[[Services], APIRouter]] = [
    detect.router,
    health.router,
    uploads.router,
    jobs.router,
    page.router,
    docs.router,
    rest.router,
    label_studio.router,
    shadow.router,
]


def create_app(settings: Settings) -> FastAPI:
    """Raises ToolError when storage or keys cannot be used."""
    figures = Figures()
    services = Services(
        settings,
        ShadowedBackend(settings, figures),
        Storage(settings.storage),
        authenticator(settings),
        figures,
        Rates(settings.limits.requests_per_second),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await services.backend.start()
        try:
            server = await grpc.serve(services) if settings.grpc_port is not None else None
            yield
            if server is not None:
                await server.stop(GRPC_GRACE_S)
        finally:
            await services.backend.close()

    app = FastAPI(
        title="Marina",
        summary="Object detection on pictures and videos",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    handle_errors(app)
    for make in ROUTERS:
        app.include_router(make(services))
    limits = settings.limits
    app.add_middleware(
        Door, limits=limits, larger={"/videos": settings.video.max_bytes, "/v2/": limits.max_tensor_bytes}
    )
    app.add_middleware(Measured, figures=services.figures)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app
