"""The gateway's uvicorn: tells its addresses once it listens, and in one line why it cannot."""

import logging
import socket
import sys

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handlers.errors import MarinaError
from tools.gateway.protocol import GuardedProtocol
from tools.gateway.settings import Settings

GRACE_S = 20


def serve(app: ASGIApp, settings: Settings, port: int) -> None:
    """Until a signal comes. Raises what hinders the application from starting."""
    starting = _Starting(app)
    config = uvicorn.Config(
        starting,
        host=settings.host,
        port=port,
        http=GuardedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=GRACE_S,
    )
    lines = [f"{'https' if settings.tls_key else 'http'}://{settings.host}:{port}/docs"]
    if settings.grpc_port is not None:
        lines.insert(0, f"gRPC  {settings.host}:{settings.grpc_port}" + ", TLS" * bool(settings.tls_key))
    # What hinders the start is told by who called.
    logging.getLogger("uvicorn.error").addFilter(lambda record: starting.failure is None)
    try:
        _Server(config, lines).run()
    except SystemExit:
        if starting.failure is None:
            raise
        raise starting.failure from None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, lines: list[str]):
        super().__init__(config)
        self._lines = lines

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(*self._lines, sep="\n", flush=True)


class _Starting:
    """Keeps what hinders the application from starting, which uvicorn would print as a stack trace."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self.failure: MarinaError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def quietly(message: Message) -> None:
            failure = sys.exception()
            if isinstance(failure, MarinaError):
                self.failure = failure
                message = {"type": message["type"]}
            await send(message)

        await self._app(scope, receive, quietly)
