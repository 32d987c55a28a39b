"""The gateway in a process of its own before a real TorchServe."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import boto3
import httpx
import pytest
import schemathesis
import yaml
from e2e.conftest import free_port
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from moto.server import ThreadedMotoServer
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_command import Command

from tools.gateway.auth import new_key
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e


CHECKED = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Gateway:
    """`marina gateway` with two keys, and what it prints."""

    def __init__(
        self, repository: Path, folder: Path, server: TorchServe, environment: dict[str, str], **changes: object
    ):
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (self.key, line), (self.other_key, other_line) = new_key("ada"), new_key("bob")
        (folder / "keys").write_text(f"{line}\n{other_line}\n")
        self.token_file = folder / "token"
        self.token_file.write_text(server.token)
        content = {
            "backends": [{"url": server.url, "token_file": "token", "models": ["shapes"]}],
            "port": self.port,
            "keys_file": "keys",
            "storage": "uploads",
            "video": {"folder": "jobs"},
            "limits": {"requests_per_second": 10_000},
        } | changes
        (folder / "gateway.yaml").write_text(yaml.safe_dump({"gateway": content}))
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.cli", "gateway", "--config", folder / "gateway.yaml"],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(repository)} | environment,
            )
        self.client = self.as_caller(self.key)

    def as_caller(self, key: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def await_up(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.client.get("/healthz")
                return
            except httpx.TransportError:
                time.sleep(0.1)
        pytest.fail(self.log.read_text())

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[ThreadedMotoServer, dict[str, str]]]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="marina")
        yield server, environment
    server.stop()


@pytest.fixture(scope="module")
def gateway(repository: Path, shapes_server: TorchServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(repository, tmp_path_factory.mktemp("gateway"), shapes_server, {})
    gateway.await_up()
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def picture(repository: Path) -> bytes:
    return (repository / "archives" / "shapes" / "golden" / "scene.jpg").read_bytes()


def detect(gateway: Gateway, picture: bytes, headers: dict[str, str] | None = None, **fields: str) -> httpx.Response:
    return gateway.client.post("/detect", files={"file": ("x.jpg", picture)}, data=fields, headers=headers or {})


def test_detect_answers_as_torchserve_itself(gateway: Gateway, shapes_server: TorchServe, picture: bytes) -> None:
    headers = shapes_server.headers | {"Content-Type": "image/jpeg", "Marina-Format": "detections"}
    direct = httpx.post(shapes_server.prediction_url("shapes"), content=picture, headers=headers, timeout=60).json()
    for fields in ({}, {"model": "shapes"}, {"model": "shapes", "version": "1.0"}):
        through = detect(gateway, picture, **fields).json()
        assert direct | {"timing_ms": None} == through | {"timing_ms": None}
    assert len(direct["detections"]) == 5


def test_options_are_fields_and_the_form_is_format_or_accept(gateway: Gateway, picture: bytes) -> None:
    few = detect(gateway, picture, classes="star", score_threshold="0.9").json()
    assert [detection["label"] for detection in few["detections"]] == ["star"]
    for answer in (detect(gateway, picture, format="image"), detect(gateway, picture, {"Accept": "image/jpeg"})):
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(BytesIO(answer.content)).size == (640, 480)
    assert detect(gateway, picture, {"Accept": "image/jpeg"}, format="coco").json()[0]["category_id"] == 0
    assert detect(gateway, picture, format="yolo").headers["content-type"].startswith("text/plain")


def test_options_are_query_parameters_too(gateway: Gateway, picture: bytes) -> None:
    def post(path: str, **fields: str) -> httpx.Response:
        return gateway.client.post(path, files={"file": picture}, data=fields)

    for path, status in (("/detect", 200), ("/uploads", 201)):
        answer = post(f"{path}?classes=star&score_threshold=0.9", score_threshold="0.8")
        assert answer.status_code == status
        assert {detection["label"] for detection in answer.json()["detections"]} == {"star"}
        assert len(answer.json()["detections"]) > len(
            detect(gateway, picture, classes="star", score_threshold="0.9").json()["detections"]
        )
        refused = post(f"{path}?speed=1")
        assert refused.status_code == 400 and "query parameter 'speed'" in refused.json()["message"]
        if status == 201:
            gateway.client.delete(f"/uploads/{answer.json()['id']}")


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"model": "nope"}, 404, "no model 'nope'; known: shapes"),
        ({"model": "../../models"}, 404, "no model"),
        ({"version": "9"}, 404, "no version '9'"),
        ({"version": "1.0/../../x"}, 404, "no version"),
        ({"score_threshold": "2"}, 400, "score_threshold"),
        ({"score_threshold": "1\r\nX: y"}, 400, "Marina-Score-Threshold"),
        ({"classes": "dog"}, 400, "unknown class"),
        ({"classes": "Straße"}, 400, "Marina-Classes"),
        ({"nonsense": "1"}, 400, "unknown field or query parameter 'nonsense'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    gateway: Gateway, picture: bytes, fields: dict[str, str], status: int, says: str
) -> None:
    answer = detect(gateway, picture, **fields)
    assert answer.status_code == status == answer.json()["code"] and says in answer.json()["message"]


def test_a_damaged_picture_is_the_callers_fault(gateway: Gateway, picture: bytes) -> None:
    answer = detect(gateway, picture[: len(picture) // 2])
    assert answer.status_code == 400 and answer.json()["type"] == "InvalidImage"


def test_a_form_that_cannot_be_read_is_the_callers_alone(gateway: Gateway) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = gateway.client.post("/detect", content=b"nonsense", headers=headers)
    assert answer.status_code == 400 and "cannot be read" in answer.json()["message"]
    assert "boundary" not in gateway.log.read_text()


def test_models_say_what_is_live(gateway: Gateway) -> None:
    (model,) = gateway.client.get("/models").json()["models"]
    assert model["name"] == "shapes" and model["version"] == "1.0" and model["healthy"]
    assert "star" in model["labels"] and model["postprocess"]["score_threshold"] == 0.4
    assert re.fullmatch("[0-9a-f]{64}", model["checksum"]) and model["since"] and model["input"]["size"] == 320


def test_health_and_documentation_are_open_and_all_else_is_not(gateway: Gateway, picture: bytes) -> None:
    with gateway.as_caller(None) as nobody, gateway.as_caller("marina_wrong") as stranger:
        for path in ("/healthz", "/readyz", "/docs", "/docs/swagger-ui-bundle.js", "/openapi.json", "/playground/"):
            assert nobody.get(path).status_code == 200, path
        assert "//" not in re.sub(r"<!--.*?-->", "", nobody.get("/docs").text).replace("://", "")
        for client in (nobody, stranger):
            for path in ("/models", "/metrics", "/uploads", "/uploads/" + "0" * 32):
                assert client.get(path).status_code == 401, path
            assert client.post("/detect", files={"file": picture}).status_code == 401
            assert client.post("/uploads", files={"file": picture}).status_code == 401
        assert "access-control-allow-origin" not in nobody.get("/healthz", headers={"Origin": "https://x.org"}).headers
    assert gateway.client.get("/readyz").json() == {"ready": True, "models": {"shapes": True}}


def test_metrics_count_by_route_and_log_and_metrics_hold_no_token(gateway: Gateway, shapes_server: TorchServe) -> None:
    gateway.client.get("/uploads/" + "0" * 32)
    figures = gateway.client.get("/metrics").text
    assert 'marina_gateway_requests_total{method="GET",route="/uploads/{id}",status="404"}' in figures
    assert 'marina_gateway_model_up{model="shapes"} 1.0' in figures
    for text in (figures, gateway.log.read_text()):
        for token in (gateway.key, gateway.other_key, shapes_server.token):
            assert token not in text


NAMES = ["../../x.jpg", "/etc/x.jpg", "a\0b.jpg", "x" * 10_000, "..\\..\\x.jpg", "", "%2e%2e%2fx", "\u202egpj.exe"]


def test_names_of_clients_never_reach_the_file_system(gateway: Gateway, picture: bytes) -> None:
    folder = gateway.log.parent
    ids = []
    for name in NAMES:
        answer = gateway.client.post("/uploads", files={"file": (name or "x", picture)})
        assert answer.status_code in (201, 400), answer.text
        if answer.status_code == 201:
            ids.append(answer.json()["id"])
    assert len(ids) >= 6
    for path in folder.rglob("*"):
        assert re.fullmatch(
            r"(keys|token|log|gateway\.yaml|jobs(/.*)?|uploads(/uploads(/[0-9a-f]{32}(/[0-9a-f]{32}(/(original|record\.json))?)?)?)?)",
            str(path.relative_to(folder)),
        ), path
    for name in NAMES:
        at = f"/uploads/{urllib.parse.quote(name or '.', safe='')}"
        assert gateway.client.get(f"{at}/original").status_code == 404, name
    for upload in ids:
        assert gateway.client.delete(f"/uploads/{upload}").status_code == 204


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_an_upload_from_its_birth_to_its_end(
    where: str,
    gateway: Gateway,
    repository: Path,
    shapes_server: TorchServe,
    s3: tuple[ThreadedMotoServer, dict[str, str]],
    tmp_path: Path,
    picture: bytes,
) -> None:
    if where == "bucket":
        gateway = Gateway(repository, tmp_path, shapes_server, s3[1], storage="s3://marina/yard")
        gateway.await_up()
    try:
        made = gateway.client.post("/uploads", files={"file": ("yard.jpg", picture)}, data={"classes": "star, circle"})
        assert made.status_code == 201
        upload = made.json()
        assert upload["counts"] == {"star": 2, "circle": 1} and len(upload["detections"]) == 3
        assert upload["filename"] == "yard.jpg" and upload["content_type"] == "image/jpeg"
        path = f"/uploads/{upload['id']}"
        assert gateway.client.get(path).json() == upload
        assert gateway.client.get("/uploads").json() == {"uploads": [upload], "next": None}
        assert gateway.client.get(f"{path}/original").content == picture
        drawn = gateway.client.get(f"{path}/annotated")
        assert drawn.headers["content-type"] == "image/jpeg" and Image.open(BytesIO(drawn.content)).size == (640, 480)
        with gateway.as_caller(gateway.other_key) as other:
            for method, at in (
                ("GET", path),
                ("GET", f"{path}/original"),
                ("GET", f"{path}/annotated"),
                ("DELETE", path),
            ):
                assert other.request(method, at).status_code == 404
            assert other.get("/uploads").json()["uploads"] == []
        assert gateway.client.delete(path).status_code == 204
        assert gateway.client.get(path).status_code == gateway.client.delete(path).status_code == 404
        assert gateway.client.get("/uploads").json()["uploads"] == []
        if where == "bucket":
            assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket="marina")
    finally:
        if where == "bucket":
            gateway.stop()


@schemathesis.serializer("video/mp4", "application/octet-stream")
def as_it_is(context: schemathesis.SerializationContext, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def test_nobody_gets_a_server_error_by_what_the_documentation_allows(gateway: Gateway) -> None:
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis_settings(
            max_examples=8,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def probe(case: schemathesis.Case) -> None:
            answer = case.call(headers={"Authorization": f"Bearer {gateway.key}"}, timeout=30)
            seen.add((case.operation.label, answer.status_code))
            case.validate_response(answer, checks=CHECKED)

        probe()
    assert {"POST /detect", "GET /models", "POST /uploads", "GET /uploads/{id}"} <= {label for label, _ in seen}
    assert not [status for _, status in seen if status >= 500]


def test_a_start_that_cannot_be_is_one_line(
    gateway: Gateway, repository: Path, shapes_server: TorchServe, tmp_path: Path
) -> None:
    """Another gateway works on the videos of that folder."""
    folder = str(gateway.log.parent / "jobs")
    second = Gateway(repository, tmp_path / "gateway", shapes_server, {}, video={"folder": folder})
    assert second.process.wait(60) == 1
    said = second.log.read_text()
    assert re.search(rf"^marina: .*{re.escape(folder)}", said, re.MULTILINE) and "Traceback" not in said


def test_a_body_that_stops_and_one_that_is_too_large_do_not_hold_the_gateway(gateway: Gateway) -> None:
    head = (
        "POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Authorization: Bearer {gateway.key}\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), 30) as large:
        large.sendall(f"{head}Content-Length: 20000001\r\n\r\nx".encode())
        assert large.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", gateway.port), 30) as half:
        half.sendall(f"{head}Content-Length: 1000\r\n\r\n--b".encode())
        half.shutdown(socket.SHUT_WR)
        half.recv(100)
    with socket.create_connection(("127.0.0.1", gateway.port), 30) as endless:
        endless.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 200_000)
        assert endless.recv(100).startswith(b"HTTP/1.1 400")
    assert gateway.client.get("/healthz").status_code == 200
    assert "Traceback" not in gateway.log.read_text()


def test_a_torchserve_that_is_killed_is_503_and_comes_back_by_itself(
    repository: Path, shapes_server: TorchServe, tmp_path: Path, picture: bytes
) -> None:
    """Started again, it has another token, in the same file."""
    token = tmp_path / "token"
    served = ("--store", str(shapes_server.archives[0].path.parent), "--token-file", str(token), "--port")
    answers = r"shapes.* (http://127.0.0.1:(\d+))/predictions"
    command = Command(repository, tmp_path / "first", *served, "0")
    gateway = None
    try:
        url, port = command.await_line(answers).groups()
        backends = [{"url": url, "token_file": str(token), "models": ["shapes"]}]
        gateway = Gateway(repository, tmp_path / "gateway", shapes_server, {}, backends=backends)
        gateway.await_up()
        assert detect(gateway, picture).status_code == 200
        command.kill()
        for answer in (detect(gateway, picture), detect(gateway, picture)):
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["type"] == "BackendDown" and port not in answer.text
        assert gateway.client.get("/readyz").status_code == 503
        assert gateway.client.get("/healthz").status_code == 200
        (model,) = gateway.client.get("/models").json()["models"]
        assert not model["healthy"] and model["version"] == "1.0"
        first_token = token.read_text()
        command = Command(repository, tmp_path / "second", *served, port)
        command.await_line(answers)
        assert token.read_text() != first_token
        deadline = time.monotonic() + 30
        while detect(gateway, picture).status_code != 200:
            assert time.monotonic() < deadline, gateway.log.read_text()
            time.sleep(0.1)
        assert gateway.client.get("/readyz").status_code == 200
        assert url in gateway.log.read_text() and "is down" in gateway.log.read_text()
    finally:
        command.kill()
        if gateway is not None:
            gateway.stop()
