"""The engine asgi: the same answers as TorchServe's, byte for byte, and what becomes of requests where workers die."""

import base64
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from e2e.conftest import as_instances, free_port, run_gateway
from PIL import Image
from tiny_core import write_archive

from handlers.request import SHAPE_HEADER, TENSOR
from tools.errors import ToolError
from tools.gateway.auth import new_key
from tools.gateway.settings import Server, Settings
from tools.serve import supervise
from tools.serve.asgi.server import AsgiServer
from tools.serve.base import Interrupted, ModelServer
from tools.serve.server import TorchServe
from tools.serve.store import gradient_jpeg

pytestmark = pytest.mark.e2e

JPEG = {"Content-Type": "image/jpeg"}
JSON = {"Content-Type": "application/json"}
# Measured anew for each request.
TIMING = re.compile(rb'"timing_ms": \{[^}]*\}')


def untimed(answer: httpx.Response) -> tuple[int, str, bytes]:
    return answer.status_code, answer.headers["content-type"], TIMING.sub(b"", answer.content)


def forms(picture: bytes) -> dict[str, dict[str, Any]]:
    """Requests in every form, good and bad."""
    b64 = base64.b64encode(picture).decode()
    grey = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("L").save(grey, "PNG")
    pixels = np.random.default_rng(0).random((3, 320, 320), dtype=np.float32).tobytes()
    found: dict[str, dict[str, Any]] = {
        "body": {"content": picture, "headers": JPEG},
        "no type": {"content": picture},
        "another format": {"content": grey.getvalue(), "headers": {"Content-Type": "image/png"}},
        "field data": {"files": {"data": picture}},
        "field body": {"files": {"body": ("a b.jpg", picture, "image/jpeg")}, "data": {"max_detections": "1"}},
        "both fields": {"files": {"body": picture, "data": picture}},
        "other field": {"files": {"image": picture}},
        "base64 in a file of text": {"files": {"data": ("a.txt", b64, "text/plain")}},
        "JSON in a file": {"files": {"data": ("a.json", json.dumps({"b64": b64}), "application/json")}},
        "JSON": {"json": {"b64": b64, "format": "coco"}},
        "KServe": {"content": as_instances(b64, classes="star"), "headers": JSON},
        "JSON with a charset": {
            "content": as_instances(b64),
            "headers": {"Content-Type": "application/json; charset=x"},
        },
        "JSON list": {"content": b"[1]", "headers": JSON},
        "JSON cut": {"content": b'{"b64": "', "headers": JSON},
        "JSON number": {"content": b"1", "headers": JSON},
        "text": {"content": b64, "headers": {"Content-Type": "text/plain"}},
        "data URL": {"content": f"data:image/jpeg;base64,{b64}", "headers": {"Content-Type": "text/plain"}},
        "text that is none": {"content": b"\xff\xfe", "headers": {"Content-Type": "text/plain"}},
        "form": {"data": {"data": b64, "max_detections": "2"}},
        "form of curl": {"content": b"\x89PNG", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        "empty": {"content": b"", "headers": JPEG},
        "truncated": {"content": picture[:2000], "headers": JPEG},
        "tensor": {"content": pixels, "headers": {"Content-Type": TENSOR, SHAPE_HEADER: "3,320,320"}},
        "tensor of another size": {"content": pixels, "headers": {"Content-Type": TENSOR, SHAPE_HEADER: "3,320,321"}},
        "two options of one name": {"content": picture, "headers": [*JPEG.items(), *[("marina-classes", "star")] * 2]},
    }
    for name, value in {"Score-Threshold": "0.9", "Iou-Threshold": "2", "Classes": "unicorn", "Colour": "red"}.items():
        found[name] = {"content": picture, "headers": JPEG | {f"Marina-{name}": value}}
    for name in ("torchserve", "detections", "coco", "yolo", "image", "xml"):
        found[f"format {name}"] = {"content": picture, "headers": JPEG | {"Marina-Format": name}}
    return found


def test_answers_to_all_forms_are_the_same(shapes_server: TorchServe, shapes_asgi: AsgiServer) -> None:
    def ask(server: ModelServer, request: dict[str, Any]) -> tuple[int, str, bytes]:
        with httpx.Client(headers=server.headers, timeout=60) as client:
            return untimed(client.post(server.prediction_url("shapes"), **request))

    requests = forms(shapes_server.archives[0].image)
    differ = [name for name, each in requests.items() if ask(shapes_server, each) != ask(shapes_asgi, each)]
    assert differ == []


def test_answers_on_other_ways_are_the_same(shapes_server: TorchServe, shapes_asgi: AsgiServer) -> None:
    picture = shapes_server.archives[0].image
    ways = {
        "version": ("POST", "/predictions/shapes/1.0", picture),
        "PUT": ("PUT", "/predictions/shapes", picture),
        "GET": ("GET", "/predictions/shapes", b""),
        "query dropped": ("POST", "/predictions/shapes?max_detections=1", picture),
        "explanations": ("POST", "/explanations/shapes", picture),
        "KServe": ("POST", "/v1/models/shapes:predict", as_instances(base64.b64encode(picture).decode())),
        "invoke": ("POST", "/models/shapes/invoke?max_detections=1&format=coco", picture),
        "invocations": ("POST", "/invocations?model_name=shapes&max_detections=2", picture),
    }
    for way, (method, path, content) in ways.items():
        headers = JSON if way == "KServe" else JPEG
        found = [
            httpx.request(method, server.url + path, content=content, headers=server.headers | headers, timeout=60)
            for server in (shapes_server, shapes_asgi)
        ]
        assert untimed(found[0]) == untimed(found[1]), way
    for path in ("/predictions/none", "/predictions/shapes/9.9"):
        statuses = [
            httpx.post(server.url + path, content=b"x", headers=server.headers).status_code
            for server in (shapes_server, shapes_asgi)
        ]
        assert statuses == [404, 404]


@pytest.mark.real
@pytest.mark.parametrize("model", ["yolov5n-square", "yolov5n-rect"])
def test_answers_to_all_photographs_are_the_same(
    model: str,
    coco_server: TorchServe,
    coco_asgi: AsgiServer,
    ask_photograph: Callable[[ModelServer, str, Path], httpx.Response],
    shared: Path,
) -> None:
    real = shared / "real"
    photographs = sorted([*(real / "photos").glob("*.jpg"), *(real / "agpl").glob("*.jpg")])
    assert len(photographs) >= 28
    for photograph in photographs:
        one, other = (ask_photograph(server, model, photograph) for server in (coco_server, coco_asgi))
        assert untimed(one) == untimed(other), photograph.name
        assert one.status_code == 200


def test_gateway_and_client_and_health_check_take_it_for_torchserve(
    shapes_asgi: AsgiServer, shapes_store: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = shapes_asgi.archives[0].image
    key, line = new_key("tester")
    (tmp_path / "keys").write_text(line)
    backend = Server(url=shapes_asgi.url, token_file=shapes_asgi.token_file, models=["shapes"])
    settings = Settings(backends=[backend], keys_file=tmp_path / "keys", port=free_port(), storage=str(tmp_path / "up"))
    with run_gateway(settings):
        url = f"http://127.0.0.1:{settings.port}/detect"
        answer = httpx.post(url, files={"file": picture}, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert (answer.status_code, answer.json()["model"]) == (200, "shapes")

    (tmp_path / "a.jpg").write_bytes(picture)
    command = [sys.executable, "-m", "tools.cli", "predict", str(tmp_path / "a.jpg"), "--url", shapes_asgi.url]
    command += ["--model", "shapes", "--token-file", str(shapes_asgi.token_file), "--format", "coco"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["annotations"]) == len(answer.json()["detections"])

    spec = importlib.util.spec_from_file_location("healthcheck", repository / "docker/healthcheck.py")
    assert spec and spec.loader
    healthcheck = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(healthcheck)
    (tmp_path / "key_file.json").write_text(json.dumps({"inference": {"key": shapes_asgi.token}}))
    monkeypatch.setattr(healthcheck, "KEY_FILE", tmp_path / "key_file.json")
    monkeypatch.setenv("MODEL_STORE", str(shapes_store))
    connect = healthcheck.http.client.HTTPConnection
    # In the container the port is 8080.
    monkeypatch.setattr(
        healthcheck.http.client, "HTTPConnection", lambda host, port, **more: connect(host, shapes_asgi.port, **more)
    )
    assert healthcheck.main() == 0


# Kills its worker at a request that says so, once where that names a file.
DIES = """
import json
import os
import signal
import time
from pathlib import Path


def handle(data, context):
    if data is None:
        return None
    for index, row in enumerate(data):
        headers = context.get_all_request_header(index)
        time.sleep(float(headers.get("sleep", 0)))
        sign = Path(headers.get("dies", "/"))
        if "dies" in headers and not sign.is_file():
            if sign.name:
                sign.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        context.set_response_content_type(index, "application/json")
    return [json.dumps(os.getpid()).encode() for _ in data]
"""
TWO_WORKERS = "minWorkers: 2\nmaxWorkers: 2\nbatchSize: 1\nresponseTimeout: 4\nstartupTimeout: 60\njobQueueSize: 2\n"


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsgiServer]:
    """Two workers, 4 s for an answer, two places in the queue beside the four that workers hold."""
    store = tmp_path_factory.mktemp("mortal")
    write_archive(store / "m.mar", "m", handler=DIES, config=TWO_WORKERS)
    with AsgiServer(store, port=0, auth=False) as server:
        yield server


def ask(server: AsgiServer, **headers: str) -> httpx.Response:
    return httpx.post(server.prediction_url("m"), content=b"x", headers=headers, timeout=60)


def workers(server: ModelServer) -> list[psutil.Process]:
    return psutil.Process(server.pid).children()


def await_workers(server: ModelServer, count: int) -> None:
    """Until so many have said that they are up."""
    deadline = time.monotonic() + 60
    while server.log_file.read_text().count(" is up") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_request_whose_worker_is_killed_is_answered_by_another(mortal: AsgiServer, tmp_path: Path) -> None:
    before = {process.pid for process in workers(mortal)}
    assert len(before) == 2
    answer = ask(mortal, dies=str(tmp_path / "died"))
    assert answer.status_code == 200 and (tmp_path / "died").exists()
    await_workers(mortal, 3)
    assert len({process.pid for process in workers(mortal)} - before) == 1


def test_a_request_that_kills_two_workers_is_refused_and_the_server_goes_on(mortal: AsgiServer) -> None:
    started = mortal.log_file.read_text().count(" is up")
    answer = ask(mortal, dies="/")
    assert (answer.status_code, answer.json()["type"]) == (500, "WorkerDied")
    assert ask(mortal).status_code == 200
    await_workers(mortal, started + 2)


def test_kills_under_load_cost_no_answer(mortal: AsgiServer) -> None:
    stop = threading.Event()

    def client(_: int) -> list[int]:
        with httpx.Client(timeout=60) as session:
            found = []
            while not stop.is_set():
                found.append(session.post(mortal.prediction_url("m"), content=b"x").status_code)
            return found

    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(client, index) for index in range(4)]
        for _ in range(3):
            started = mortal.log_file.read_text().count(" is up")
            workers(mortal)[0].send_signal(signal.SIGKILL)
            await_workers(mortal, started + 1)
        stop.set()
        statuses = [status for each in clients for status in each.result()]
    assert set(statuses) == {200}


def test_a_full_queue_refuses_at_once(mortal: AsgiServer) -> None:
    with httpx.Client(headers={"sleep": "1"}, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        url = mortal.prediction_url("m")
        statuses = [answer.status_code for answer in pool.map(lambda _: client.post(url, content=b"x"), range(16))]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 6


def test_a_worker_that_hangs_is_ended(mortal: AsgiServer) -> None:
    started = mortal.log_file.read_text().count(" is up")
    answer = ask(mortal, sleep="60")
    assert (answer.status_code, answer.json()["type"]) == (500, "WorkerTimeout")
    await_workers(mortal, started + 1)
    assert ask(mortal).status_code == 200


def test_ctrl_c_while_it_is_started_again(tmp_path: Path) -> None:
    write_archive(tmp_path / "m.mar", "m")
    told: list[str] = []

    def report(line: str) -> None:
        told.append(line)
        if "starting it again" in line:
            server.request_stop()

    with AsgiServer(tmp_path, port=0, supervise=True, report=report) as server:
        psutil.Process(server.pid).kill()
        with pytest.raises(Interrupted):
            server.wait()
    assert told[-1].endswith(
        "was ended by signal 9: by somebody, or by the system for want of memory; starting it again"
    )


FAILS_LATER = """
import os


def handle(data, context):
    if data is None and os.path.exists({path!r}):
        raise RuntimeError("no longer")
    return None if data is None else [b"[]" for _ in data]
"""


def test_a_server_that_does_not_come_up_again_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "MOST_STARTS", 2)
    sign = tmp_path / "sign"
    write_archive(tmp_path / "m.mar", "m", handler=FAILS_LATER.format(path=str(sign)), golden=gradient_jpeg())
    told: list[str] = []
    with AsgiServer(tmp_path, port=0, supervise=True, report=told.append) as server:
        sign.touch()
        psutil.Process(server.pid).kill()
        with pytest.raises(ToolError, match=r"m 1\.0: its worker failed to start: .*no longer; .* did not stay up"):
            server.wait()
    assert [line for line in told if "starting it again in 1 s" in line]


SAYS = """
def handle(data, context):
    return None if data is None else [b"{word}" for _ in data]
"""


@pytest.mark.parametrize("engine", [AsgiServer, TorchServe])
def test_what_was_vetted_is_what_is_served(engine: type[ModelServer], tmp_path: Path) -> None:
    """Also when the server is started again, after somebody has put another archive in the place of it."""
    store = tmp_path / "store"
    store.mkdir()
    vetted: list[bytes] = []
    answers: list[str] = []

    def report(line: str) -> None:
        if "answers again" in line:
            answers.append(ask(server).text)
            server.request_stop()

    def vet(paths: Sequence[Path]) -> None:
        vetted.extend(path.read_bytes() for path in paths)

    before = write_archive(store / "m.mar", "m", handler=SAYS.format(word="one")).read_bytes()
    with engine(store, port=0, auth=False, supervise=True, vet=vet, report=report) as server:
        write_archive(tmp_path / "other.mar", "m", handler=SAYS.format(word="another")).replace(store / "m.mar")
        psutil.Process(server.pid).kill()
        server.wait()
    assert vetted == [before] and answers == ["one"]


def test_what_is_refused_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "m.mar", "m")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    def vet(paths: Sequence[Path]) -> None:
        raise ToolError("no")

    server = AsgiServer(tmp_path, port=0, vet=vet)
    with pytest.raises(ToolError, match=r"^no$"):
        server.start()
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(ToolError, match="cannot be copied"):
        server.start()
    with pytest.raises(ToolError, match="is not running"):
        _ = server.folder
