"""The gRPC transports against services of our own that misbehave as TorchServe and the gateway do."""

import asyncio
import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import pytest

from tools.client import retry
from tools.client.answer import Detection
from tools.client.client import AsyncClient, Client
from tools.client.errors import ServerError, ServerFailed, ServerRefused, ServerUnavailable
from tools.client.transports.channel import open_channel
from tools.errors import ToolError
from tools.proto import inference_pb2, inference_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc

FOUND = {"label": "dog", "index": 3, "score": 0.912345, "box": [1.5, 2.001, 3000.125, 40.0]}
CONTENT = {"model": "dogs", "version": "1.0", "width": 4000, "height": 50, "detections": [FOUND], "timing_ms": {}}
DETECTION = Detection("dog", 3, 0.912345, (1.5, 2.001, 3000.125, 40.0))
Says = Callable[[Any, grpc.ServicerContext], Any]


class TorchServe(inference_pb2_grpc.InferenceAPIsServiceServicer):
    def __init__(self, says: Says):
        self._says = says

    def Predictions(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # as the protocol names it
        return inference_pb2.PredictionResponse(prediction=json.dumps(self._says(request, context)).encode())


class Gateway(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, says: Says):
        self._says = says

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # as the protocol names it
        return self._says(request, context)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Says], str]]:
    """Serves both services, and returns the URL."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    servers = []

    def start(says: Says) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 1 << 20)])
        inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(TorchServe(says), server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Gateway(says), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"grpc://127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def tensors(request: Any) -> Any:
    """What the gateway answers."""
    outputs = {
        "boxes": ("FP32", [1, 4], np.array([FOUND["box"]], "<f4").tobytes()),
        "scores": ("FP32", [1], np.array([FOUND["score"]], "<f4").tobytes()),
        "label_indices": ("INT64", [1], np.array([3], "<i8").tobytes()),
        "labels": ("BYTES", [1], struct.pack("<I", 3) + b"dog"),
        "picture": ("INT64", [1], np.array([0], "<i8").tobytes()),
        "sizes": ("INT64", [1, 2], np.array([[4000, 50]], "<i8").tobytes()),
    }
    return open_inference_pb2.ModelInferResponse(
        model_name=request.model_name,
        model_version="1.0",
        outputs=[{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape, _) in outputs.items()],
        raw_output_contents=[raw for _, _, raw in outputs.values()],
    )


def abort(code: str, details: str, *trailers: tuple[str, str]) -> Says:
    def says(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata(trailers)
        context.abort(grpc.StatusCode[code], details)

    return says


def ask(url: str, protocol: str, picture: bytes = b"picture", **settings: Any) -> Any:
    with Client(url, "dogs", protocol=protocol, **settings) as client:
        return client.predict(picture)


def test_the_picture_and_options_go_into_torchserves_input_map(serve):
    seen = []

    def says(request: Any, context: grpc.ServicerContext) -> Any:
        seen.append((request, dict(context.invocation_metadata())["authorization"]))
        return CONTENT

    got = ask(serve(says), "grpc", version="1.0", token="s3cret", options={"classes": "Straße", "iou_threshold": 0.5})
    assert (got.model, got.width, got.height, got.detections) == ("dogs", 4000, 50, (DETECTION,))
    ((request, authorization),) = seen
    assert (request.model_name, request.model_version, authorization) == ("dogs", "1.0", "Bearer s3cret")
    assert dict(request.input) == {
        "data": b"picture",
        "format": b"detections",
        "classes": "Straße".encode(),
        "iou_threshold": b"0.5",
    }


def test_a_refused_picture_that_arrives_as_ok_is_raised_from_its_body(serve):
    url = serve(lambda request, context: {"code": 415, "type": "UnsupportedMedia", "message": "no picture"})
    with pytest.raises(ServerRefused, match="no picture") as caught:
        ask(url, "grpc")
    assert (caught.value.status, caught.value.kind, caught.value.of_picture) == (415, "UnsupportedMedia", True)


@pytest.mark.parametrize(
    ("code", "details", "status"),
    [
        ("INTERNAL", "Model not found: dogs\norg.pytorch.serve.archive.model.ModelNotFoundException", 404),
        ("INTERNAL", "Model version: 9\norg.pytorch.serve.archive.model.ModelVersionNotFoundException", 404),
        ("PERMISSION_DENIED", "Token Authorization failed", 403),
        ("CANCELLED", "Stream removed (RST_STREAM)", 413),
    ],
)
def test_what_torchserve_itself_refuses_is_told_by_its_text(serve, code, details, status):
    with pytest.raises(ServerRefused) as caught:
        ask(serve(abort(code, details)), "grpc")
    assert caught.value.status == status
    assert "org.pytorch" not in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "code", "details", "status"),
    [
        ("kserve", "INVALID_ARGUMENT", "torn", 400),
        ("kserve", "UNAUTHENTICATED", "no token", 401),
        ("kserve", "NOT_FOUND", "no model", 404),
        ("kserve", "INTERNAL", "the model failed", 500),
    ],
)
def test_what_the_gateway_refuses_is_told_by_its_code(serve, protocol, code, details, status):
    with pytest.raises(ServerRefused, match=details) as caught:
        ask(serve(abort(code, details)), protocol)
    assert caught.value.status == status
    assert caught.value.of_picture == (status in (400, 500))


def test_the_gateway_names_what_it_refuses_in_metadata(serve):
    told = (("marina-status", "415"), ("marina-type", "UnsupportedMedia"))
    with pytest.raises(ServerRefused, match=r"no picture \(415 UnsupportedMedia\)") as caught:
        ask(serve(abort("INVALID_ARGUMENT", "no picture", *told)), "kserve")
    assert caught.value.of_picture
    with pytest.raises(ServerRefused, match=r"no such option \(400 InvalidOption\)") as caught:
        ask(serve(abort("INVALID_ARGUMENT", "no such option", ("marina-type", "InvalidOption"))), "kserve")
    assert not caught.value.of_picture


@pytest.mark.parametrize(
    ("protocol", "code", "details"),
    [
        ("grpc", "INTERNAL", 'Model "dogs" has no worker to serve inference request. Please use scale workers API'),
        ("grpc", "UNAVAILABLE", "going down"),
        ("kserve", "UNAVAILABLE", "model down"),
        ("kserve", "RESOURCE_EXHAUSTED", "too many requests"),
    ],
)
def test_a_busy_server_is_asked_again(serve, protocol, code, details):
    left = [None] * 3

    def says(request: Any, context: grpc.ServicerContext) -> Any:
        if left:
            left.pop()
            context.abort(grpc.StatusCode[code], details)
        return CONTENT if protocol == "grpc" else tensors(request)

    url = serve(says)
    assert ask(url, protocol).detections == (DETECTION,)
    left += [None] * 3
    with pytest.raises(ServerUnavailable, match=details[:10]):
        ask(url, protocol, retries=1)
    assert len(left) == 1


def test_the_gateway_says_how_long_to_wait(serve):
    async def wish(url: str) -> float | None:
        async with AsyncClient(url, "dogs", protocol="kserve") as client:
            with pytest.raises(ServerUnavailable) as caught:
                await client._transport.predict(b"x", {})
            return caught.value.retry_after

    assert asyncio.run(wish(serve(abort("UNAVAILABLE", "down", ("retry-after", "7"))))) == 7.0
    assert asyncio.run(wish(serve(abort("UNAVAILABLE", "down")))) is None


@pytest.mark.parametrize("protocol", ["grpc", "kserve"])
def test_a_server_of_another_kind_is_told_at_once(serve, protocol):
    told = pytest.raises(ServerFailed, match="does not speak gRPC; give the port that does")
    with http_server() as url, Client(url, "dogs", protocol=protocol, timeout=60) as client, told:
        client.predict(b"x")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    told = pytest.raises(ServerFailed, match="use the protocol grpc for TorchServe, kserve for a gateway")
    with Client(f"grpc://127.0.0.1:{port}", "dogs", protocol=protocol) as client, told:
        client.predict(b"x")
    server.stop(None).wait()


@contextmanager
def http_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"grpc://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("protocol", "code"), [("grpc", "INTERNAL"), ("kserve", "UNKNOWN")])
def test_other_failures_are_not_tried_again(serve, protocol, code):
    asked = []

    def says(request: Any, context: grpc.ServicerContext) -> Any:
        asked.append(request)
        context.abort(grpc.StatusCode[code], "oh no")

    with pytest.raises(ServerFailed, match="oh no"):
        ask(serve(says), protocol)
    assert len(asked) == 1


def test_kserve_sends_the_picture_as_raw_bytes_and_reads_the_tensors(serve):
    seen = []

    def says(request: Any, context: grpc.ServicerContext) -> Any:
        seen.append(request)
        return tensors(request)

    got = ask(serve(says), "kserve", version="1.0", options={"score_threshold": 0.5})
    assert (got.model, got.version, got.width, got.height, got.detections) == ("dogs", "1.0", 4000, 50, (DETECTION,))
    assert got.timing_ms == {}
    (request,) = seen
    (given,) = request.inputs
    assert (given.name, given.datatype, list(given.shape), request.model_version) == ("pictures", "BYTES", [1], "1.0")
    assert list(request.raw_input_contents) == [struct.pack("<I", 7) + b"picture"]
    assert request.parameters["score_threshold"].string_param == "0.5"


def test_a_picture_larger_than_the_gateway_takes_is_refused_alone(serve):
    with pytest.raises(ServerRefused, match="too large") as caught:
        ask(serve(lambda request, context: tensors(request)), "kserve", b"x" * (2 << 20))
    assert caught.value.of_picture


def test_the_times_of_the_stages_come_with_the_answer(serve):
    told = open_inference_pb2.InferParameter(string_param='[{"decode": 1.5, "network": 20.25}]')

    def says(request: Any, context: grpc.ServicerContext) -> Any:
        answer = tensors(request)
        answer.parameters["timing_ms"].CopyFrom(told)
        return answer

    url = serve(says)
    assert ask(url, "kserve").timing_ms == {"decode": 1.5, "network": 20.25}
    for wrong in ("[]", "no JSON", "7", "[7]"):
        told.string_param = wrong
        with pytest.raises(ServerFailed, match="does not answer as Marina's gateway"):
            ask(url, "kserve")


@pytest.mark.parametrize("broken", ["boxes", "sizes", "labels"])
def test_answers_without_sense_are_told(serve, broken):
    def says(request: Any, context: grpc.ServicerContext) -> Any:
        answer = tensors(request)
        index = [output.name for output in answer.outputs].index(broken)
        answer.raw_output_contents[index] = answer.raw_output_contents[index][:-3]
        return answer

    with pytest.raises(ServerFailed, match="does not answer as Marina's gateway"):
        ask(serve(says), "kserve")


def test_a_server_that_is_not_there(serve):
    for protocol in ("grpc", "kserve"):
        with pytest.raises(ServerError, match="not to be reached"):
            ask("grpc://127.0.0.1:1", protocol, retries=0)


@pytest.mark.parametrize("url", ["127.0.0.1:7070", "ftp://host:1", "grpc://", "grpc://host:1/path"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ToolError, match="give one such as grpc://"):
        open_channel(url, None)


def test_a_grpc_port_asked_by_rest_is_told(serve):
    url = serve(lambda request, context: CONTENT).replace("grpc://", "http://")
    with pytest.raises(ServerFailed, match=r"does not speak HTTP/1\.1; where it is a gRPC port, say --protocol grpc"):
        ask(url, protocol="rest")
