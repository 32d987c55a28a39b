"""The playground: a page that tries a model in the browser. Static files of our own, and nothing from elsewhere.

The samples are `tools.data.draw.draw_scene(default_rng(seed), 640, 480)` of the seeds 1, 22 and 21, JPEG quality 80.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse

from tools.gateway.errors import GatewayError
from tools.gateway.services import Services

FOLDER = Path(__file__).with_name("playground")
FILES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "boxes.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "sample-1.jpg": "image/jpeg",
    "sample-2.jpg": "image/jpeg",
    "sample-3.jpg": "image/jpeg",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Asked again each time, answered with 304: a new release is seen at once.
    "Cache-Control": "no-cache",
}


def router(services: Services) -> APIRouter:
    """`/playground/` and its files, open to everybody: they hold no data, and ask for a key where one is needed."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/playground")
    async def without_slash() -> RedirectResponse:
        return RedirectResponse("playground/", headers=HEADERS)

    @routes.get("/playground/")
    async def index() -> FileResponse:
        return _answer("index.html")

    @routes.get("/playground/{name}")
    async def file(name: str) -> FileResponse:
        if name not in FILES:
            raise GatewayError(404, "NotFound", "the playground has no such file")
        return _answer(name)

    return routes


def _answer(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, media_type=FILES[name], headers=HEADERS)
