"""Every way in side by side: what each sends and reads, how rounds go, what ends them."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import Request
from model_folder import LABELS, ask, encode, scene
from tiny_archive import CONFIG, write_archive

from handlers.options import default_options
from handlers.pipeline import Pipeline
from tools.bench.protocols.compare import (
    TOLERANCE,
    Picture,
    ProtocolsReport,
    Row,
    difference,
    measure,
)
from tools.bench.protocols.doors import Grpc, Http, Message
from tools.bench.protocols.gateway import gateway_before
from tools.bench.protocols.ways import Address, Model, Way, all_ways
from tools.cli import main
from tools.client.answer import Detection
from tools.client.transports import read_answer
from tools.errors import ToolError
from tools.gateway.backend import BackendAnswer
from tools.gateway.backend import Model as Described
from tools.gateway.form import read_form
from tools.gateway.kserve.calls import Calls
from tools.gateway.kserve.codec import InferAnswer, InferRequest, read_grpc, read_rest, write_grpc, write_rest
from tools.proto.inference_pb2 import PredictionResponse, PredictionsRequest
from tools.proto.open_inference_pb2 import ModelInferRequest
from tools.serve.process import bindable_port

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
PICTURES = [encode(scene(150, 260, seed=1), "JPEG"), encode(scene(320, 320, seed=2), "JPEG")]
DETECTION = Detection("cat", 0, 0.9, (1.0, 2.0, 3.0, 4.0))


class InProcess:
    """Answers the messages of each way as TorchServe and gateway would, with their own code but without a network."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def answer(self, way: Way, message: Message) -> bytes:
        return self._by_grpc(way.door, message.body) if isinstance(way.door, Grpc) else self._by_http(way.door, message)

    def _by_grpc(self, door: Grpc, body: bytes) -> bytes:
        if "pytorch" not in door.method:
            return write_grpc(self._infer(read_grpc(ModelInferRequest.FromString(body)))).SerializeToString()
        asked = PredictionsRequest.FromString(body)
        assert asked.model_name == "small"
        return PredictionResponse(prediction=self._torchserve(dict(asked.input), {})).SerializeToString()

    def _by_http(self, door: Http, message: Message) -> bytes:
        headers = {**door.headers, **message.headers}
        if door.path == "/v2/models/small/infer":
            request = read_rest(message.body, headers.get("Inference-Header-Content-Length"))
            return write_rest(self._infer(request), request)[0]
        body: Any = message.body
        if "form-data" in headers["Content-Type"]:
            # TorchServe takes other names, which its own test on a real server sees to.
            body = read_picture(body.replace(b'name="data"', b'name="file"'), headers["Content-Type"])
        elif "json" in headers["Content-Type"]:
            body = json.loads(body)
        return self._torchserve({"body": body}, {"Marina-Format": "detections"} | headers)

    def _torchserve(self, row: dict[str, Any], headers: dict[str, str]) -> bytes:
        (answer,) = ask(self.pipeline, (row, headers))
        return answer.body

    def _infer(self, request: InferRequest) -> InferAnswer:
        return asyncio.run(Calls(self).infer("small", None, request))  # type: ignore[arg-type]

    async def predict(
        self, name: str, version: str | None, body: bytes, kind: str, headers: dict[str, str]
    ) -> BackendAnswer:
        return BackendAnswer(200, kind, self._torchserve({"body": body}, {"Content-Type": kind, **headers}))

    async def model(self, name: str, version: str | None) -> Described:
        return Described(**self.pipeline.describe() | {"checksum": "of no archive"})


def read_picture(body: bytes, kind: str) -> bytes:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())], "query_string": b""}
    return asyncio.run(read_form(Request(scope, receive))).picture


@pytest.fixture(scope="module")
def ways(small_pipeline: Pipeline) -> list[Way]:
    settings = small_pipeline.settings
    model = Model("small", LABELS, default_options(settings), settings.preprocess, small_pipeline.network.stride)
    return all_ways(Address(1, 2, "token"), Address(3, 4, "key"), model)


def test_all_ways_find_the_same(ways: list[Way], small_pipeline: Pipeline) -> None:
    server = InProcess(small_pipeline)
    for picture in PICTURES:
        expected = read_answer(server._torchserve({"body": picture}, {"Marina-Format": "detections"})).detections
        assert len(expected) > 3
        for way in ways:
            message, read = way.ask(picture)
            found = read(server.answer(way, message))
            assert difference(expected, found, TOLERANCE if way.tensor else 0) is None, way.name


def test_each_server_gets_its_own_token_and_each_way_its_place(ways: list[Way]) -> None:
    assert len({way.name for way in ways}) == len(ways) == 10
    # As long as a chart shows them whole, with " ×16".
    assert max(len(way.name) for way in ways) <= 24
    for way in ways:
        door = way.door
        token = door.token if isinstance(door, Grpc) else door.headers["Authorization"].removeprefix("Bearer ")
        assert {1: "token", 2: "token", 3: "key", 4: "key"}[door.port] == token
    assert [way.door.port for way in ways] == [1, 1, 1, 2, 3, 3, 4, 3, 4, 4]
    assert [way.name for way in ways if way.tensor] == ["v2 REST tensor", "v2 gRPC tensor", "v2 gRPC tensor, raw"]


def test_a_picture_is_encoded_nowhere_but_in_base64(ways: list[Way]) -> None:
    picture = PICTURES[0]
    for way in ways:
        body = way.ask(picture)[0].body
        assert (picture in body) == (not way.tensor and way.name != "REST base64 JSON"), way.name
    sizes = {way.name: len(way.ask(picture)[0].body) for way in ways if way.tensor}
    values = 3 * 192 * 320  # a rectangle of multiples of the stride
    assert 0 < sizes["v2 gRPC tensor, raw"] - 4 * values < 100
    assert 0 < sizes["v2 gRPC tensor"] - 4 * values < 100
    assert sizes["v2 REST tensor"] > 8 * values


def test_a_refusal_that_grpc_calls_ok_is_an_error(ways: list[Way], small_pipeline: Pipeline) -> None:
    server = InProcess(small_pipeline)
    (way,) = (way for way in ways if way.name == "gRPC picture")
    message, read = way.ask(b"no picture")
    with pytest.raises(ToolError, match=r"no JPEG, PNG.* \(415 UnsupportedMedia\)"):
        read(server.answer(way, message))


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([DETECTION], None),
        ([], "0 detections in place of 1"),
        ([DETECTION] * 2, "2 detections in place of 1"),
        ([replace(DETECTION, score=0.9 + 9e-4)], None),
        ([replace(DETECTION, score=0.9 + 2e-3)], "'score': 0.902"),
        ([replace(DETECTION, box=(1.0, 2.0, 3.0, 4.0009))], None),
        ([replace(DETECTION, box=(1.0, 2.0, 3.0, 4.002))], "4.002"),
        ([replace(DETECTION, label="dog")], "'dog'.* in place of .*'cat'"),
        ([replace(DETECTION, index=1)], "'index': 1"),
        ([replace(DETECTION, score=float("nan"))], "nan"),
    ],
)
def test_what_is_a_difference(found: list[Detection], problem: str | None) -> None:
    if problem is None:
        assert difference((DETECTION,), tuple(found), 1e-3) is None
        assert (difference((DETECTION,), tuple(found), 0) is None) == (found == [DETECTION])
    else:
        assert re.search(problem, difference((DETECTION,), tuple(found), 1e-3) or "")


class Listener:
    """An HTTP server that answers every path with a cat, those in `others` with another detection, all with the status
    that `status` tells."""

    others = {  # noqa: RUF012  # never changed
        "/dog": replace(DETECTION, label="dog"),
        "/near": replace(DETECTION, score=DETECTION.score + 5e-4),
        "/far": replace(DETECTION, score=DETECTION.score + 2e-3),
    }

    def __init__(self) -> None:
        # Path, port of the client, body.
        self.seen: list[tuple[str, int, bytes]] = []
        self.status: Callable[[str, bytes], int] = lambda path, body: 200
        listener = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.seen.append((self.path, self.client_address[1], body))
                found = listener.others.get(self.path, DETECTION).to_json()
                told = {"model": "m", "version": "1", "width": 8, "height": 8, "detections": [found], "timing_ms": {}}
                answer = json.dumps(told).encode()
                self.send_response(listener.status(self.path, body))
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def way(self, name: str, tensor: bool = False) -> Way:
        def read(answer: bytes) -> tuple[Detection, ...]:
            return read_answer(answer).detections

        return Way(name, Http(self.port, f"/{name}", {}), lambda picture: (Message(picture), read), tensor)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    thread = threading.Thread(target=listener.server.serve_forever)
    thread.start()
    yield listener
    listener.server.shutdown()
    thread.join()
    listener.server.server_close()


SENT = [Picture("a.jpg", b"a" * 10), Picture("b.jpg", b"b" * 21), Picture("c.jpg", b"c" * 20)]


def test_rounds_go_by_turns_over_connections_that_stay(listener: Listener) -> None:
    rows = measure([listener.way(name) for name in ("one", "two")], SENT, [1, 2], 2)

    turns = [list(turn) for _, turn in groupby(listener.seen, key=lambda seen: seen[0])]
    assert [turn[0][0] for turn in turns] == ["/one", "/two"] * 5
    # A first, warming round, then one question for each connection before the clock starts.
    assert [len(turn) for turn in turns] == [3] * 2 + [4] * 4 + [5] * 4
    assert [len({port for _, port, _ in turn}) for turn in turns] == [1] * 6 + [2] * 4
    for turn in turns:
        assert sorted(body for _, _, body in turn[-3:]) == sorted(picture.body for picture in SENT)
    assert [(row.way, row.connections, row.calls) for row in rows] == [
        ("one", 1, 6),
        ("two", 1, 6),
        ("one", 2, 6),
        ("two", 2, 6),
    ]
    for row in rows:
        assert row.bytes_out == 17
        assert 100 < row.bytes_back < 300
        assert 0 < row.p50_ms <= row.p99_ms
        assert row.difference is None


def test_the_first_difference_is_told(listener: Listener) -> None:
    rows = measure([listener.way(name) for name in ("cat", "dog")], SENT, [1], 1)

    report = ProtocolsReport("m 1", ["a.jpg"], 1, rows)
    assert rows[0].difference is None
    assert len(report.failures) == 1
    assert report.failures[0].startswith("dog differs from cat: a.jpg: {'label': 'dog'")
    assert report.as_table().splitlines()[-1].split()[:2] == ["dog", "DIFFERS:"]
    assert list(report.as_bars()) == ["cat ×1"]


@pytest.mark.parametrize("fails", [1, 2, 3, 5])
def test_an_error_ends_it_naming_way_and_picture(listener: Listener, fails: int) -> None:
    asked = 0

    def status(path: str, body: bytes) -> int:
        nonlocal asked
        asked += path == "/bad" and body == SENT[1].body
        return 503 if path == "/bad" and asked >= fails and body == SENT[1].body else 200

    listener.status = status
    with pytest.raises(ToolError, match=r"^bad, b\.jpg: answer 503 \{"):
        measure([listener.way("good"), listener.way("bad")], SENT, [1, 2], 2)


def test_a_server_that_is_not_there() -> None:
    port = bindable_port("127.0.0.1", 0)
    for door, line in ((Http(port, "/", {}), "no answer .*refused"), (Grpc(port, "/a/b", "t"), "answer UNAVAILABLE")):
        way = Way("nobody", door, lambda picture: (Message(picture), lambda answer: ()))
        with pytest.raises(ToolError, match=rf"^nobody, a\.jpg: {line}"):
            measure([way], SENT, [1], 1)


def test_a_client_of_tensors_may_differ_a_little(listener: Listener) -> None:
    ways = [
        listener.way("cat"),
        listener.way("near"),
        listener.way("near", tensor=True),
        listener.way("far", tensor=True),
    ]
    rows = measure([replace(way, name=f"{index} {way.name}") for index, way in enumerate(ways)], SENT, [1], 1)
    assert [row.way for row in rows if row.difference] == ["1 near", "3 far"]


def test_threads_of_torch_are_as_before(listener: Listener) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    threads: list[int] = []
    way = listener.way("one")
    counted = replace(way, ask=lambda picture: (threads.append(torch.get_num_threads()), way.ask(picture))[1])
    measure([counted], SENT, [1], 1)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert set(threads) == {1} and after == 3


def row(way: str, p50_ms: float, connections: int = 1, **more: Any) -> Row:
    return Row(way, connections, 62, 60_000, 1_200, 0.01, p50_ms, 90.0, 0.2, 20.0, **more)


def test_the_table_has_a_part_for_each_concurrency() -> None:
    rows = [row("REST picture", 40.0), row("gRPC picture", 50.0), row("REST picture", 90.0, 4)]
    report = ProtocolsReport("yolov5n 7.0", ["a.jpg"] * 62, 3, rows)
    lines = report.as_table().splitlines()
    assert lines[:2] == ["yolov5n 7.0, 62 pictures, 3 rounds", ""]
    assert lines[2].startswith("1 at a time") and lines[6].startswith("4 at a time")
    assert " ".join(lines[4].split()) == "gRPC picture 60,000 1,200 0.01 50.00 90.00 1.25 0.20 20.00"
    assert lines[7].split()[-3] == "1.00"
    assert report.failures == []
    assert report.as_bars() == {"REST picture ×1": 20.0, "gRPC picture ×1": 20.0, "REST picture ×4": 20.0}


def test_a_gateway_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = SimpleNamespace(url="nowhere", token_file=tmp_path / "token")
    with (
        pytest.raises(ToolError, match=r"the gateway ended with exit code 1: marina: .*must be an address"),
        gateway_before(server, "m"),  # type: ignore[arg-type]
    ):
        pass


def test_refusals_in_one_line(
    tmp_path: Path, small_model: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(PICTURES[0])
    settings = small_model[1]["handler"] | {"model": {"definition": "ssd300_vgg16"}}
    other = write_archive(tmp_path / "other.mar", "other", config=f"{CONFIG}handler: {json.dumps(settings)}\n# ")
    plain = write_archive(tmp_path / "plain.mar", "plain")
    for arguments, words in (
        ([tmp_path / "none.mar", "--image", picture], "none.mar"),
        ([plain, "--image", tmp_path / "none.jpg"], "none.jpg cannot be read"),
        ([plain, "--image", picture], "handler.version: missing"),
        ([other, "--image", picture], "other.mar holds a ssd300_vgg16, which takes no tensors; give a yolov5"),
    ):
        assert main(["bench", "protocols", *map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert words in error, (arguments, error)
        assert error.count("\n") == 1
