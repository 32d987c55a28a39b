"""`marina gateway` in a process of its own, before a TorchServe that can be cut off."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import yaml

from tools.gateway.auth import new_key
from tools.serve.server import TorchServe


class Relay:
    """A TCP port that leads to another one, until it is cut; then connections to it are refused."""

    def __init__(self, port: int):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listen()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                pair = near, socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._pairs.append(pair)
            threading.Thread(target=_pump, args=pair, daemon=True).start()

    def cut(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self._pairs:
            for end in pair:
                _shut(end)
        self._pairs.clear()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listen()


def _pump(near: socket.socket, far: socket.socket) -> None:
    other = {near: far, far: near}
    with near, far:
        while True:
            try:
                for ready in select.select([near, far], [], [])[0]:
                    chunk = ready.recv(65536)
                    if not chunk:
                        return
                    other[ready].sendall(chunk)
            except (OSError, ValueError):
                return


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class GatewayProcess:
    """Started by `start` as often as wanted, always on the same folder, with the keys `key` and `other_key`."""

    def __init__(self, folder: Path, repository: Path, server: TorchServe, **settings: object):
        folder.mkdir()
        self.folder = folder
        self.relay = Relay(server.port)
        self.key, one = new_key("one")
        self.other_key, other = new_key("other")
        (folder / "keys").write_text(f"{one}\n{other}\n")
        (folder / "token").write_text(server.token or "")
        backend = {"url": f"http://127.0.0.1:{self.relay.port}", "token_file": "token", "models": ["shapes"]}
        content = {"backends": [backend], "port": 0, "keys_file": "keys", "storage": "uploads"}
        self.jobs = folder / "jobs"
        content |= {"video": {"folder": "jobs"} | settings}
        (folder / "config.yaml").write_text(yaml.safe_dump({"gateway": content}))
        self._repository = repository
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "gateway", "--config", str(self.folder / "config.yaml")],
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log").open("ab"),
            text=True,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self._repository)},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().removesuffix("/docs")
        assert self.url, self.log
        return self

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def end(self, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(30)
            self.process = None


def until(condition: Callable[[], object], what: str, limit_s: float = 120) -> None:
    """Waits for `condition` to be true."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not reached in {limit_s} s: {what}"
        time.sleep(0.05)
