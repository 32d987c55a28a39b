"""Starts the peers, each in a process group of its own, and ends it."""

import json
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx

from tools.archive.closure import modules_for
from tools.archive.reader import MANIFEST, open_archive
from tools.bench.serve import Target
from tools.errors import ToolError
from tools.serve import process
from tools.serve.java import find_java

STOCK = "torchserve, stock"
STOCK_THREADS = "torchserve, stock, threads set"
# Names of packages, and where the pictures go.
OTHERS = {"fastapi": "/predict", "litserve": "/predict", "mosec": "/inference"}
START_S = 180
ANSWER_S = 60
JPEG = {"Content-Type": "image/jpeg"}


@contextmanager
def peer(name: str, network: Path, settings: dict[str, Any], body: bytes) -> Iterator[Target]:
    """One of `OTHERS` with an ONNX file, when it has answered a picture. Raises ToolError."""
    port = process.bindable_port("127.0.0.1", 0)
    with _private_folder() as folder:
        (folder / "peer.json").write_text(json.dumps(settings | {"network": str(network), "port": port}))
        # mosec takes its address from here, the others from the file.
        command = [sys.executable, "-m", f"{__package__}.{name}_onnx", "--address", "127.0.0.1", "--port", str(port)]
        with _running(name, command, folder, f"http://127.0.0.1:{port}{OTHERS[name]}", body) as target:
            yield target


@contextmanager
def stock(archive: Path, settings: dict[str, Any], body: bytes) -> Iterator[Target]:
    """TorchServe on its own defaults with `stock_handler` and the weights of our archive, when it has answered a
    picture. settings: with `threads` None for as many a worker as torch takes. Raises ToolError."""
    inference, management, metrics, grpc, grpc_management = (process.bindable_port("127.0.0.1", 0) for _ in range(5))
    with _private_folder() as folder:
        (folder / "store").mkdir()
        _write_stock_archive(folder / "store" / "stock.mar", archive, settings)
        properties = {
            "inference_address": f"http://127.0.0.1:{inference}",
            "management_address": f"http://127.0.0.1:{management}",
            "metrics_address": f"http://127.0.0.1:{metrics}",
            "grpc_inference_port": grpc,
            "grpc_management_port": grpc_management,
            "model_store": folder / "store",
            "load_models": "stock.mar",
            "disable_token_authorization": "true",
        }
        lines = [f"{key}={value}\n" for key, value in properties.items()]
        (folder / "config.properties").write_text("".join(lines))
        # Our settings of the log are not its own.
        command = [part for part in process.command_line(find_java(), folder) if "log4j" not in part]
        with _running(STOCK, command, folder, f"http://127.0.0.1:{inference}/predictions/stock", body) as target:
            yield target


def _write_stock_archive(path: Path, archive: Path, settings: dict[str, Any]) -> None:
    model = {"modelName": "stock", "modelVersion": "1.0", "handler": "stock_handler.py"}
    with open_archive(archive) as opened, zipfile.ZipFile(path, "w") as packed:
        assert opened.settings is not None
        packed.writestr(MANIFEST, json.dumps({"runtime": "python", "model": model}))
        packed.write(Path(__file__).with_name("stock_handler.py"), "stock_handler.py")
        packed.writestr("model.safetensors", opened.read(opened.settings["weights"]))
        packed.writestr("peer.json", json.dumps(settings))
        for name, module in modules_for(opened.settings["model"]["definition"], "torch").items():
            if name.startswith("model_defs/"):
                packed.write(module, name)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """As `tools.serve.process` wants one."""
    with tempfile.TemporaryDirectory(prefix="marina-") as name:
        for part in ("tmp", "logs"):
            (Path(name) / part).mkdir()
        yield Path(name)


@contextmanager
def _running(name: str, command: list[str], folder: Path, url: str, body: bytes) -> Iterator[Target]:
    """A process and all that it starts, until the block ends. What they print goes to a file in `folder`."""
    child = process.start(command, folder)
    reader = threading.Thread(target=_copy, args=(child, folder / "output.log"), daemon=True)
    reader.start()
    try:
        _await_answer(name, child, url, body, folder / "output.log")
        yield Target(url, None, child.pid)
    finally:
        process.kill_group(child)
        reader.join()


def _copy(child: Popen[str], log: Path) -> None:
    """A full pipe would stop it."""
    assert child.stdout is not None
    with log.open("w", encoding="utf-8", buffering=1) as sink:
        for line in child.stdout:
            sink.write(line)


def _await_answer(name: str, child: Popen[str], url: str, body: bytes, log: Path) -> None:
    deadline = time.monotonic() + START_S
    said = "it does not listen"
    with httpx.Client(headers=JPEG, timeout=ANSWER_S, trust_env=False) as client:
        while time.monotonic() < deadline:
            if child.poll() is not None:
                lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no word why"]
                raise ToolError(f"{name} ended with exit code {child.returncode}: {lines[-1]}")
            try:
                answer = client.post(url, content=body)
                if answer.status_code == 200:
                    return
                said = f"its last answer is {answer.status_code}"
            except httpx.TransportError as error:
                said = repr(error)
            time.sleep(0.05)
    raise ToolError(f"{name} does not answer a picture within {START_S} s; {said}")


def detections(target: Target, body: bytes) -> list[dict[str, Any]]:
    """What a server finds, as format `detections` has it. Raises ToolError when it does not answer so."""
    headers = JPEG | ({"Authorization": f"Bearer {target.token}"} if target.token else {})
    try:
        answer = httpx.post(target.url, content=body, headers=headers, timeout=ANSWER_S, trust_env=False)
        found: list[dict[str, Any]] = answer.json()["detections"]
    except (httpx.TransportError, ValueError, KeyError, TypeError) as error:
        raise ToolError(f"{target.url} does not answer a picture with detections ({error!r})") from error
    return found
