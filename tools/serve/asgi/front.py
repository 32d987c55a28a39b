"""The process in front of the workers: HTTP, on the ports that it is told, until SIGTERM; then it drains.

    python -m tools.serve.asgi.front front.json

Prints what the workers print and what becomes of them. Ends with 1 and one line when a model does not come up.
"""

import json
import math
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from tools.gateway.protocol import GuardedProtocol
from tools.serve.asgi.app import App
from tools.serve.asgi.counters import Counters
from tools.serve.asgi.model import Model, Settings

LOOPBACK = "127.0.0.1"
# Longer than clients keep a connection that they mean to use again: a minute, for most.
KEEP_S = 75.0
BACKLOG = 2048


class Protocol(GuardedProtocol):
    """As the gateway's, with more patience."""

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(KEEP_S, self.transport.close)


async def serve(settings: dict[str, Any]) -> None:
    counters = Counters()
    models = [Model(Settings(**model), counters, _end) for model in settings["models"]]
    app = App(models, counters, settings["token"], settings["most_bytes"], settings["metrics_port"])
    listeners = [_listener(settings["host"], settings["port"])]
    if settings["metrics_port"] is not None:
        listeners.append(_listener(LOOPBACK, settings["metrics_port"]))
    for model in models:
        await model.start()
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=int(KEEP_S) + 1,
        # Where nobody is left who would end it.
        timeout_graceful_shutdown=math.ceil(settings["grace"]),
    )
    # uvicorn raises the signal once more when it is done, for whoever else wants it.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    await uvicorn.Server(config).serve(listeners)
    for model in models:
        model.close()


def _listener(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), backlog=BACKLOG)


def _end(reason: str) -> None:
    print(reason, flush=True)
    # The workers end by themselves, without a front.
    os._exit(1)


if __name__ == "__main__":
    uvloop.run(serve(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
