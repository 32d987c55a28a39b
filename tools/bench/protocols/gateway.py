"""`marina gateway` in a process of its own."""

import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import yaml

from tools.bench.protocols.doors import HOST
from tools.bench.protocols.ways import Address
from tools.errors import ToolError
from tools.gateway.auth import new_key
from tools.serve import process
from tools.serve.server import TorchServe

START_S = 120


@contextmanager
def gateway_before(server: TorchServe, model: str) -> Iterator[Address]:
    """A gateway that offers one model of `server`, once that answers through it. Raises ToolError."""
    key, line = new_key("bench")
    gateway = Address(process.bindable_port(HOST, 0), process.bindable_port(HOST, 0), key)
    with tempfile.TemporaryDirectory(prefix="marina-") as name:  # of mode 0700
        folder = Path(name)
        (folder / "tmp").mkdir()  # where its process has TMPDIR
        (folder / "keys").write_text(line)
        (folder / "gateway.yaml").write_text(yaml.safe_dump({"gateway": _settings(server, model, gateway)}))
        child = process.start([sys.executable, "-m", "tools.cli", "gateway", "--config", "gateway.yaml"], folder)
        assert child.stdout is not None
        said: deque[str] = deque(["no word why"], maxlen=1)
        reader = threading.Thread(target=said.extend, args=[child.stdout], daemon=True)
        reader.start()
        try:
            _await_ready(child, gateway)
            yield gateway
        except _Ended:
            reader.join()
            raise ToolError(f"the gateway ended with exit code {child.returncode}: {said[0].strip()}") from None
        finally:
            process.kill_group(child)
            reader.join()


def _settings(server: TorchServe, model: str, gateway: Address) -> dict[str, Any]:
    return {
        "backends": [{"url": server.url, "token_file": str(server.token_file), "models": [model]}],
        "port": gateway.http,
        "grpc_port": gateway.grpc,
        "keys_file": "keys",
        "storage": "uploads",
        "video": {"folder": "jobs"},
        # What it lets one caller do is not what is measured.
        "limits": {"requests_per_second": 1e6},
    }


class _Ended(Exception):
    """The process is no more."""


def _await_ready(child: Popen[str], gateway: Address) -> None:
    deadline = time.monotonic() + START_S
    url = f"http://{HOST}:{gateway.http}/readyz"
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise _Ended
        try:
            if httpx.get(url, trust_env=False, timeout=START_S).status_code == 200:
                return
        except httpx.TransportError:
            pass  # It does not listen yet.
        time.sleep(0.05)
    raise ToolError(f"the gateway is not ready within {START_S} s")
