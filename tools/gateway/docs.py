"""Swagger UI at /docs, with nothing loaded from elsewhere."""

from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from tools.gateway.errors import GatewayError
from tools.gateway.services import Services

# fastapi-offline brings swagger-ui's files with it.
ASSETS = files("fastapi_offline") / "static"
TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}


def router(services: Services) -> APIRouter:
    """Open to everybody: it shows what the gateway can, and asks for a key where one is needed."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="Marina",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon.png",
        )

    @routes.get("/docs/{name}")
    async def asset(name: str) -> Response:
        if name not in TYPES:
            raise GatewayError(404, "NotFound", "the documentation has no such file")
        return Response((ASSETS / name).read_bytes(), media_type=TYPES[name])

    return routes
