"""A real server of `shapes`, what its processes hold, and one request to it as bytes."""

import http.client
import socket
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tools.archive.build import build_archive
from tools.archive.recipe import load_recipe
from tools.serve.asgi.server import AsgiServer
from tools.serve.base import ModelServer
from tools.serve.server import TorchServe

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = REPOSITORY / "archives" / "shapes"
SHARED = REPOSITORY.parent / "shared"
ENGINES: dict[str, type[ModelServer]] = {"torchserve": TorchServe, "asgi": AsgiServer}
# In the command lines of their workers.
WORKERS = ("model_service_worker", "tools.serve.asgi.worker")
# Of the processes of a server: those that answer, and the one in front of them.
KINDS = ("worker", "front")
LATEST_S = 120
MB = 1_000_000


def write_store(folder: Path, *, workers: int = 1, batch_size: int = 8) -> Path:
    """A model store with `shapes`. The batches are such that requests have neighbours."""
    recipe, store = folder / "recipe", folder / "store"
    recipe.mkdir()
    for item in SHAPES.iterdir():
        if item.name != "archive.yaml":
            (recipe / item.name).symlink_to(item)
    content = yaml.safe_load((SHAPES / "archive.yaml").read_text())
    content["serving"] = {
        "min_workers": workers, "max_workers": workers, "batch_size": batch_size, "max_batch_delay_ms": 5
    }  # fmt: skip
    content["response"] = {"format": "detections"}
    (recipe / "archive.yaml").write_text(yaml.safe_dump(content))
    build_archive(load_recipe(recipe), store / "shapes.mar")
    return store


@contextmanager
def serving(folder: Path, *, workers: int = 1, engine: str = "torchserve") -> Iterator[ModelServer]:
    with ENGINES[engine](write_store(folder, workers=workers), port=0) as server:
        yield server


@dataclass(frozen=True)
class Held:
    """What a process holds. memory: what of it is in memory (RSS), bytes; neighbours that come and go
    do not change it, as they do one's share of what is mapped."""

    pid: int
    name: str
    memory: int
    descriptors: int


def held(pid: int) -> list[Held]:
    """By the process `pid` and all those that it has started."""
    front = psutil.Process(pid)
    found = []
    for process in (front, *front.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            name = "worker" if is_worker(process) else "front"
            found.append(Held(process.pid, name, process.memory_info().rss, process.num_fds()))
    return found


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        command = " ".join(process.cmdline())
        return any(worker in command for worker in WORKERS)
    return False


def workers(pid: int) -> list[psutil.Process]:
    return [process for process in psutil.Process(pid).children(recursive=True) if is_worker(process)]


def memory_of(state: Sequence[Held], name: str) -> int:
    """Of all processes of one kind, bytes."""
    return sum(one.memory for one in state if one.name == name)


def growth(states: Sequence[Sequence[Held]], name: str) -> float:
    """How much more memory the processes of one kind held at the least in the second half of the states than in the
    first, as a share of that. What an allocator keeps of large pictures comes and goes; a leak lifts the least too."""
    course = [memory_of(state, name) for state in states]
    return min(course[len(course) // 2 :]) / min(course[: (len(course) + 1) // 2]) - 1


def exchange(url: str, wire: bytes) -> tuple[int, bytes]:
    """The status and the body that a request is answered with, on a connection of its own.

    Raises OSError or http.client.HTTPException where there is no whole answer.
    """
    parts = urllib.parse.urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), LATEST_S) as connection:
        # A server may refuse, and close, before it has all of it; its answer is there then.
        with suppress(ConnectionError):
            connection.sendall(wire)
        response = http.client.HTTPResponse(connection, method="POST")
        response.begin()
        return response.status, response.read()
