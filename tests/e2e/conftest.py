"""Real servers, each started once."""

import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from label_studio_server import label_studio as label_studio
from numpy.random import default_rng

from tools.archive.build import build_archive
from tools.archive.recipe import Recipe, load_recipe
from tools.data.draw import draw_scene
from tools.gateway.app import create_app
from tools.gateway.auth import new_key
from tools.gateway.settings import Server, Settings, Video
from tools.serve.asgi.server import AsgiServer
from tools.serve.base import ModelServer
from tools.serve.java import find_java
from tools.serve.server import TorchServe

# Width and height of `pictures`.
SIZES = ((200, 150), (320, 320), (320, 32))


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """JPEGs of drawn shapes, of different sizes."""
    found = []
    for seed, (width, height) in enumerate(SIZES):
        buffer = io.BytesIO()
        draw_scene(default_rng(seed), width, height)[0].save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def recipe_with(folder: Path, source: Path, **changes: object) -> Recipe:
    """The recipe in the folder `source`, changed, as `folder`/archive.yaml; what it names is linked."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.name != "archive.yaml":
            (folder / item.name).symlink_to(item)
    content = yaml.safe_load((source / "archive.yaml").read_text()) | changes
    (folder / "archive.yaml").write_text(yaml.safe_dump(content))
    return load_recipe(folder)


@pytest.fixture(scope="session")
def coco_store(shared: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official yolov5n.pt as two archives, yolov5n-square and yolov5n-rect."""
    root = tmp_path_factory.mktemp("coco")
    for shape in ("square", "rect"):
        recipe = recipe_with(
            root / shape,
            repository / "archives" / "yolov5n-coco",
            name=f"yolov5n-{shape}",
            preprocess={"size": 640, "shape": shape},
            serving={"batch_size": 8, "max_batch_delay_ms": 100},
            response={"format": "detections"},
        )
        build_archive(recipe, root / "store" / f"{recipe.name}.mar", shared / "real" / "agpl" / "yolov5n.pt")
    return root / "store"


@pytest.fixture(scope="session")
def coco_server(coco_store: Path) -> Iterator[TorchServe]:
    with TorchServe(coco_store, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def coco_asgi(coco_store: Path) -> Iterator[AsgiServer]:
    with AsgiServer(coco_store, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def ask_photograph() -> Callable[[ModelServer, str, Path], httpx.Response]:
    """What a model answers to a photograph; each is asked once."""
    answers: dict[tuple[str, str, Path], httpx.Response] = {}

    def ask(server: ModelServer, model: str, photograph: Path) -> httpx.Response:
        key = (server.url, model, photograph)
        if key not in answers:
            headers = server.headers | {"Content-Type": "image/jpeg"}
            content = photograph.read_bytes()
            answers[key] = httpx.post(server.prediction_url(model), content=content, headers=headers, timeout=60)
        return answers[key]

    return ask


@pytest.fixture(scope="session")
def shapes_store(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("shapes-store")
    build_archive(load_recipe(repository / "archives" / "shapes"), store / "shapes.mar")
    return store


@pytest.fixture(scope="session")
def shapes_server(shapes_store: Path) -> Iterator[TorchServe]:
    with TorchServe(shapes_store, port=0, grpc_port=0) as server:
        yield server


@pytest.fixture(scope="session")
def shapes_asgi(shapes_store: Path) -> Iterator[AsgiServer]:
    with AsgiServer(shapes_store, port=0, metrics_port=0) as server:
        yield server


# Where they stand for each other, by the names of `marina serve --engine`.
SERVERS = {
    "torchserve": {"shapes": "shapes_server", "coco": "coco_server"},
    "asgi": {"shapes": "shapes_asgi", "coco": "coco_asgi"},
}


@pytest.fixture(scope="session", params=SERVERS)
def shapes_engine(request: pytest.FixtureRequest) -> ModelServer:
    """`shapes` on each engine."""
    return request.getfixturevalue(SERVERS[request.param]["shapes"])


@pytest.fixture(scope="session", params=SERVERS)
def coco_engine(request: pytest.FixtureRequest) -> ModelServer:
    """yolov5n-square and yolov5n-rect on each engine."""
    return request.getfixturevalue(SERVERS[request.param]["coco"])


@contextmanager
def run_gateway(settings: Settings) -> Iterator[None]:
    """Until the block ends, in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=settings.port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def shapes_gateway(
    shapes_server: TorchServe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Settings, str]]:
    """In front of `shapes_server`, over HTTP and gRPC; and a key."""
    folder = tmp_path_factory.mktemp("gateway")
    key, line = new_key("tester")
    (folder / "keys").write_text(line)
    settings = Settings(
        backends=[Server(url=shapes_server.url, token_file=shapes_server.token_file, models=["shapes"])],
        keys_file=folder / "keys",
        port=free_port(),
        grpc_port=free_port(),
        storage=str(folder / "uploads"),
        video=Video(folder=folder / "jobs"),
    )
    with run_gateway(settings):
        yield settings, key


@dataclass(frozen=True)
class Stock:
    """A stock TorchServe, started by its own launcher from an environment without any code of ours; or what stands in
    for it, by the name of its engine."""

    url: str
    log: Path
    engine: str = "torchserve"

    def post(self, model: str, path: str = "predictions", **request: object) -> httpx.Response:
        return httpx.post(f"{self.url}/{path}/{model}", timeout=120, **request)


@pytest.fixture(scope="session")
def stock_environment(repository: Path) -> Path:
    folder = repository / ".venv-stock"
    if not (folder / ".installed").is_file():
        pytest.fail("no stock environment; `make test` makes it as .venv-stock")
    listed = subprocess.run(
        [
            folder / "bin" / "python",
            "-c",
            "import importlib.util as u; print(u.find_spec('handlers'), u.find_spec('tools'))",
        ],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.split() == ["None", "None"]
    return folder


def start_stock(environment: Path, store: Path, folder: Path) -> Iterator[Stock]:
    """All archives of `store`, without tokens, in the private `folder`."""
    ports = [free_port() for _ in range(5)]
    inference, management, metrics, grpc, grpc_management = ports
    (folder / "tmp").mkdir(parents=True)
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\n"
        f"grpc_management_port={grpc_management}\ndisable_system_metrics=true\n"
    )
    java = find_java().path
    variables = {
        "PATH": f"{environment / 'bin'}:{java.parent}:/usr/bin:/bin",
        "JAVA_HOME": str(java.parent.parent),
        "TMPDIR": str(folder / "tmp"),
        "TEMP": str(folder / "tmp"),
        "LOG_LOCATION": str(folder),
        "METRICS_LOCATION": str(folder),
        "HOME": str(folder),
    }
    command = [environment / "bin" / "torchserve", "--start", "--foreground", "--ncs", "--disable-token-auth"]
    command += ["--model-store", store, "--models", "all", "--ts-config", folder / "config.properties"]
    log = folder / "torchserve.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Stock(f"http://127.0.0.1:{inference}", log)
    finally:
        # The launcher would leave its JVM behind.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_answers(stock: Stock, model: str, picture: bytes, limit_s: float = 240) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            answer = stock.post(model, content=picture, headers={"Content-Type": "image/jpeg"})
            if answer.status_code == 200:
                return
            said = answer.text
        except httpx.TransportError as error:
            said = repr(error)
        if time.monotonic() > deadline or "Traceback" in stock.log.read_text(errors="replace"):
            tail = "\n".join(stock.log.read_text(errors="replace").splitlines()[-40:])
            pytest.fail(f"{model} does not answer: {said}\n{tail}")
        time.sleep(0.3)


def same_detections(one: list[dict], other: list[dict], tolerance: float = 1e-2) -> bool:
    """Two answers of format `torchserve`, boxes within `tolerance` pixels."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a.keys() != b.keys() or abs(a["score"] - b["score"]) > 1e-4:
            return False
        (label,) = a.keys() - {"score"}
        if max(abs(x - y) for x, y in zip(a[label], b[label], strict=True)) > tolerance:
            return False
    return True


def as_instances(b64: str, **options: object) -> bytes:
    return json.dumps({"instances": [{"b64": b64, **options}]}).encode()
