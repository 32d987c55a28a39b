"""KServe v2 through the gateway, asked by tritonclient, which nobody here wrote, in front of a real TorchServe."""

import asyncio
import base64
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from e2e.conftest import SIZES, free_port, run_gateway
from tritonclient.utils import InferenceServerException

from handlers.geometry import Letterbox, letterbox, plan_letterbox
from handlers.image import decode
from handlers.options import default_options
from handlers.pipeline import finish
from handlers.settings import Limits as PictureLimits
from handlers.settings import Preprocess
from model_defs.candidates import from_rows
from tools.archive.recipe import load_recipe
from tools.errors import ToolError
from tools.gateway.kserve.grpc import serve
from tools.gateway.settings import Limits, Server, Settings, Video
from tools.proto import open_inference_pb2 as pb
from tools.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e
# A busy machine is no fault of the code.
PATIENCE_S = 120


class Gateway(NamedTuple):
    """rest, grpc: clients of tritonclient with the same methods. stub: for what they cannot send."""

    address: str
    grpc_address: str
    stub: GRPCInferenceServiceStub
    headers: dict[str, str]
    rest: tritonclient.http.InferenceServerClient
    grpc: tritonclient.grpc.InferenceServerClient

    def post(self, **request: Any) -> httpx.Response:
        url = f"http://{self.address}/v2/models/shapes/infer"
        return httpx.post(url, headers=self.headers, timeout=PATIENCE_S, **request)


@pytest.fixture(scope="module")
def gateway(shapes_gateway: tuple[Settings, str]) -> Iterator[Gateway]:
    settings, key = shapes_gateway
    address, grpc_address = f"127.0.0.1:{settings.port}", f"127.0.0.1:{settings.grpc_port}"
    with (
        grpc.insecure_channel(grpc_address) as channel,
        tritonclient.http.InferenceServerClient(address, network_timeout=PATIENCE_S) as rest,
        tritonclient.grpc.InferenceServerClient(grpc_address) as over_grpc,
    ):
        stub = GRPCInferenceServiceStub(channel)
        yield Gateway(address, grpc_address, stub, {"authorization": f"Bearer {key}"}, rest, over_grpc)


@pytest.fixture(params=["rest", "grpc"])
def client(request: pytest.FixtureRequest, gateway: Gateway) -> "Client":
    return Client(
        getattr(tritonclient, request.param.replace("rest", "http")), getattr(gateway, request.param), gateway.headers
    )


class Client(NamedTuple):
    """One transport of tritonclient."""

    library: Any
    client: Any
    headers: dict[str, str]

    def ask(self, name: str, array: np.ndarray, datatype: str = "", shape: list[int] | None = None, **more: Any) -> Any:
        kind = datatype or ("BYTES" if array.dtype == object else "FP32")
        given = self.library.InferInput(name, list(array.shape), kind)
        given.set_data_from_numpy(array)
        given.set_shape(shape or list(array.shape))
        # A copy, since tritonclient adds to it.
        return self.client.infer(more.pop("model", "shapes"), [given], headers=dict(self.headers), **more)

    def detect(self, pictures: list[bytes], **more: Any) -> Any:
        array = np.empty(len(pictures), dtype=object)
        array[:] = pictures
        return self.ask("pictures", array, **more)


def direct(server: TorchServe, picture: bytes, **options: str) -> dict[str, Any]:
    headers = server.headers | {"Marina-Format": "detections"} | options
    return httpx.post(server.prediction_url("shapes"), headers=headers, content=picture, timeout=PATIENCE_S).json()


def as_detections(answer: Any, picture: int = 0) -> list[dict[str, Any]]:
    """The rows of one picture, in the digits that REST has."""
    mine = answer.as_numpy("picture") == picture
    columns = [answer.as_numpy(name)[mine] for name in ("labels", "label_indices", "scores", "boxes")]
    return [
        {
            "label": label.decode(),
            "index": int(index),
            "score": round(float(score), 6),
            "box": [round(float(x), 3) for x in box],
        }
        for label, index, score, box in zip(*columns, strict=True)
    ]


def tensor(picture: bytes, shape: str = "square") -> tuple[np.ndarray, Letterbox]:
    """Letterboxed as a client would, [1, 3, H, W] in 0..1, and where the picture lies on it."""
    pixels = torch.from_numpy(decode(picture, PictureLimits()).copy()).permute(2, 0, 1)
    plan = plan_letterbox(*pixels.shape[1:], Preprocess(size=320, shape=shape), 32)
    return letterbox(pixels, plan).numpy()[None] / np.float32(255), plan


def test_six_calls(client: Client, pictures: list[bytes]):
    triton, more = client.client, {"headers": client.headers}
    as_json = {} if client.library is tritonclient.http else {"as_json": True}

    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("shapes", **more) and triton.is_model_ready("shapes", "1.0", **more)
    assert triton.get_server_metadata(**as_json)["name"] == "marina"
    metadata = triton.get_model_metadata("shapes", "1.0", **more, **as_json)
    assert (metadata["name"], metadata["versions"]) == ("shapes", ["1.0"])
    answer = client.detect(pictures[:1], request_id="seven")
    response = answer.get_response(**as_json)
    assert (response["model_name"], response["model_version"], response["id"]) == ("shapes", "1.0", "seven")


def test_metadata_describe_the_answers(client: Client, pictures: list[bytes]):
    as_json = {} if client.library is tritonclient.http else {"as_json": True}
    metadata = client.client.get_model_metadata("shapes", headers=client.headers, **as_json)
    inputs = {one["name"]: (one["datatype"], [int(side) for side in one["shape"]]) for one in metadata["inputs"]}
    outputs = {one["name"]: (one["datatype"], [int(side) for side in one["shape"]]) for one in metadata["outputs"]}

    assert inputs == {"pictures": ("BYTES", [-1]), "images": ("FP32", [-1, 3, -1, -1])}
    answers = [client.detect(pictures), client.ask("images", tensor(pictures[0])[0])]
    response = [answer.get_response(**as_json)["outputs"] for answer in answers]
    told = {one["name"]: (one["datatype"], one["shape"]) for answer in response for one in answer}
    assert told.keys() == outputs.keys()
    for name, (datatype, shape) in outputs.items():
        assert told[name][0] == datatype
        assert len(told[name][1]) == len(shape)
        assert all(side in (-1, int(found)) for side, found in zip(shape, told[name][1], strict=True))


def test_pictures_are_answered_as_by_torchserve(client: Client, pictures: list[bytes], shapes_server: TorchServe):
    answer = client.detect(pictures)

    assert answer.as_numpy("sizes").tolist() == [list(size) for size in SIZES]
    parameters = answer.get_response(**({} if client.library is tritonclient.http else {"as_json": True}))["parameters"]
    told = parameters["timing_ms"]
    timings = json.loads(told if isinstance(told, str) else told["string_param"])
    for index, picture in enumerate(pictures):
        alone = client.detect([picture])
        expected = direct(shapes_server, picture)
        assert as_detections(answer, index) == as_detections(alone) == expected["detections"]
        assert timings[index].keys() == expected["timing_ms"].keys()
    assert len(timings) == len(pictures)
    assert len(answer.as_numpy("scores")) > 3


def test_picture_without_detections_has_empty_outputs(client: Client, pictures: list[bytes]):
    answer = client.detect(pictures[:1], parameters={"score_threshold": "1"})

    assert answer.as_numpy("boxes").shape == (0, 4)
    assert answer.as_numpy("labels").shape == (0,)


def test_parameters_are_the_options_of_torchserve(client: Client, pictures: list[bytes], shapes_server: TorchServe):
    options = {"max_detections": 1, "classes": "circle,star", "class_agnostic": False}
    answer = client.detect(pictures, parameters=options)

    as_headers = {"Marina-Max-Detections": "1", "Marina-Classes": "circle,star", "Marina-Class-Agnostic": "false"}
    for index, picture in enumerate(pictures):
        assert as_detections(answer, index) == direct(shapes_server, picture, **as_headers)["detections"]


def test_outputs_that_are_asked_for_come_alone(client: Client, pictures: list[bytes]):
    wanted = [client.library.InferRequestedOutput(name) for name in ("scores", "labels")]

    answer = client.detect(pictures[:1], outputs=wanted)

    assert answer.as_numpy("boxes") is None
    assert len(answer.as_numpy("scores")) == len(answer.as_numpy("labels")) > 0


def test_tensors_give_the_detections_of_pictures(
    client: Client, pictures: list[bytes], shapes_server: TorchServe, repository: Path
):
    options = default_options(load_recipe(repository / "archives" / "shapes"))
    for picture in pictures:
        image, plan = tensor(picture, "rect")
        (rows,) = torch.from_numpy(client.ask("images", image).as_numpy("output0").copy())

        (candidates,) = from_rows(rows, torch.zeros(len(rows)), 1, options.score_threshold)
        found = finish(candidates, options, plan, plan.height, plan.width)

        expected = direct(shapes_server, picture)["detections"]
        assert found.labels.tolist() == [one["index"] for one in expected]
        np.testing.assert_allclose(found.scores, [one["score"] for one in expected], atol=1e-3)
        np.testing.assert_allclose(found.boxes, [one["box"] for one in expected], atol=1e-3)


def test_tensors_of_a_batch_are_answered_in_order(client: Client, pictures: list[bytes]):
    images = [tensor(picture)[0] for picture in pictures]

    together = client.ask("images", np.concatenate(images)).as_numpy("output0")

    assert together.shape == (3, 3 * (40 * 40 + 20 * 20 + 10 * 10), 5 + 6)
    for index, image in enumerate(images):
        np.testing.assert_allclose(together[index], client.ask("images", image).as_numpy("output0")[0], atol=1e-3)


def test_all_forms_of_a_tensor_give_the_same_bits(gateway: Gateway, pictures: list[bytes]):
    images, _ = tensor(pictures[0])
    told = {"name": "images", "datatype": "FP32", "shape": images.shape}
    ask = gateway.stub.ModelInfer
    metadata = tuple(gateway.headers.items())

    raw = ask(
        pb.ModelInferRequest(model_name="shapes", inputs=[told], raw_input_contents=[images.tobytes()]),
        metadata=metadata,
    )
    contents = told | {"contents": {"fp32_contents": images.ravel().tolist()}}
    listed = ask(pb.ModelInferRequest(model_name="shapes", inputs=[contents]), metadata=metadata)
    # What the clients of the model servers before us send: nested lists.
    as_json = gateway.post(json={"inputs": [told | {"data": images.tolist()}]})

    rows = np.frombuffer(raw.raw_output_contents[0], "<f4")
    assert (np.frombuffer(listed.raw_output_contents[0], "<f4") == rows).all()
    (output,) = as_json.json()["outputs"]
    assert output["shape"] == list(raw.outputs[0].shape)
    assert (np.array(output["data"], np.float32) == rows).all()


PICTURE = np.array([b"\xff\xd8\xff"], dtype=object)
BAD: list[tuple[Callable[[Client], Any], int, str, str]] = [
    (lambda c: c.ask("pictures", PICTURE, model="nobody"), 404, "NOT_FOUND", "no model 'nobody'"),
    (lambda c: c.ask("pictures", PICTURE, model_version="9"), 404, "NOT_FOUND", "no version '9'"),
    (lambda c: c.ask("pictures", PICTURE, model_version="-9"), 404, "NOT_FOUND", "no version"),
    (lambda c: c.ask("image", PICTURE), 400, "INVALID_ARGUMENT", "no input 'image'"),
    (lambda c: c.ask("pictures", PICTURE), 400, "INVALID_ARGUMENT", "picture"),
    (lambda c: c.detect([]), 400, "INVALID_ARGUMENT", "has the shape"),
    (lambda c: c.detect([b'{"b64": "AAAA"}']), 415, "INVALID_ARGUMENT", "no JPEG, PNG"),
    (lambda c: c.detect([b""]), 400, "INVALID_ARGUMENT", r"no picture arrived: pictures\[0\] is empty"),
    (lambda c: c.detect([b"BM" + bytes(90)] * 2), 400, "INVALID_ARGUMENT", r"pictures\[0\]: "),
    (lambda c: c.detect([b"BM" + bytes(30_000_000)]), 413, "INVALID_ARGUMENT", "answers 413"),
    (lambda c: c.detect([b"BM"] * 65), 400, "INVALID_ARGUMENT", "64 at most"),
    (lambda c: c.detect([b"BM"], parameters={"format": "yolo"}), 400, "INVALID_ARGUMENT", "unknown parameter 'format'"),
    (lambda c: c.detect([b"BM"], parameters={"classes": "a\r\nb"}), 400, "INVALID_ARGUMENT", "Marina-Classes"),
    (
        lambda c: c.ask("images", np.zeros((1, 3, 32, 32), np.float32), parameters={"classes": "0"}),
        400,
        "INVALID_ARGUMENT",
        "does not go",
    ),
    (
        lambda c: c.ask("images", np.zeros((1, 3, 32, 33), np.float32)),
        400,
        "INVALID_ARGUMENT",
        r"images of shape \[1, 3, 32, 33\]: .*multiples of 32",
    ),
    (
        lambda c: c.ask("images", np.full((1, 3, 32, 32), 255, np.float32)),
        400,
        "INVALID_ARGUMENT",
        r"images of shape .*: the tensor holds values up to 255; send RGB in 0\.\.1",
    ),
    (
        lambda c: c.ask("images", np.full((2, 3, 32, 32), np.nan, np.float32)),
        400,
        "INVALID_ARGUMENT",
        r"images\[0\] of shape .*: .*finite",
    ),
    (
        lambda c: c.ask("images", np.zeros((1, 32, 32, 3), np.float32)),
        400,
        "INVALID_ARGUMENT",
        "send .B, 3, height, width",
    ),
    (
        lambda c: c.ask("images", np.zeros((3, 32, 32), np.float32)),
        400,
        "INVALID_ARGUMENT",
        "send .B, 3, height, width",
    ),
    (
        lambda c: c.ask("images", np.zeros((0, 3, 32, 32), np.float32)),
        400,
        "INVALID_ARGUMENT",
        "send .B, 3, height, width",
    ),
    (
        lambda c: c.ask("images", np.zeros((1, 3, 0, 32), np.float32)),
        400,
        "INVALID_ARGUMENT",
        "send .B, 3, height, width",
    ),
    (lambda c: c.ask("images", np.zeros((1, 3, 32, 32), np.float16), "FP16"), 400, "INVALID_ARGUMENT", "'FP16'; taken"),
    (
        lambda c: c.ask("images", np.zeros((1, 3, 32, 32), np.float32), shape=[1, 3, 64, 64]),
        400,
        "INVALID_ARGUMENT",
        "12288 bytes",
    ),
]


@pytest.mark.parametrize(("ask", "status", "code", "line"), BAD)
def test_bad_input_is_one_clear_line(client: Client, ask: Callable, status: int, code: str, line: str):
    with pytest.raises(InferenceServerException, match=line) as caught:
        ask(client)
    # What tritonclient says of an answer that is no error of the protocol.
    assert "exception occurred in the client" not in str(caught.value)

    assert caught.value.status() == (str(status) if client.library is tritonclient.http else f"StatusCode.{code}")


def test_unknown_models_are_not_found_by_every_call(client: Client, gateway: Gateway):
    with pytest.raises(InferenceServerException) as caught:
        client.client.get_model_metadata("nobody", headers=client.headers)
    assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")

    assert (
        httpx.get(
            f"http://{gateway.address}/v2/models/nobody/ready", headers=client.headers, timeout=PATIENCE_S
        ).status_code
        == 404
    )
    with pytest.raises(grpc.RpcError) as refused:
        gateway.stub.ModelReady(pb.ModelReadyRequest(name="nobody"), metadata=tuple(client.headers.items()))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_outputs_that_there_are_not_are_refused(client: Client, pictures: list[bytes]):
    with pytest.raises(InferenceServerException, match="no output 'output0'; this request is answered with boxes"):
        client.detect(pictures[:1], outputs=[client.library.InferRequestedOutput("output0")])


def test_one_input_is_taken(gateway: Gateway):
    assert "has 0 inputs" in gateway.post(json={"inputs": []}).json()["error"]


def test_contents_beside_raw_contents_are_refused_and_the_server_lives(gateway: Gateway):
    told = {"name": "images", "datatype": "FP32", "shape": [1, 3, 1, 1], "contents": {"fp32_contents": [1, 2, 3]}}
    message = pb.ModelInferRequest(model_name="shapes", inputs=[told], raw_input_contents=[bytes(12)])

    with pytest.raises(grpc.RpcError) as caught:
        gateway.stub.ModelInfer(message, metadata=tuple(gateway.headers.items()))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert gateway.grpc.is_server_ready()


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic abc"}])
def test_models_answer_nobody_without_a_key(client: Client, headers: dict[str, str], pictures: list[bytes]):
    with pytest.raises(InferenceServerException) as caught:
        client._replace(headers=headers).detect(pictures[:1])

    assert caught.value.status() in ("401", "StatusCode.UNAUTHENTICATED")
    assert client.client.is_server_live()
    with pytest.raises(InferenceServerException) as caught:
        client.client.get_model_metadata("shapes", headers=headers)
    assert caught.value.status() in ("401", "StatusCode.UNAUTHENTICATED")


def test_half_a_request_leaves_the_gateway_well(gateway: Gateway):
    host, port = gateway.address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: x\r\nAuthorization: {gateway.headers['authorization']}\r\n"
        )
        connection.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)

    assert gateway.rest.is_server_ready()


class Dead(NamedTuple):
    """A gateway without keys whose TorchServe is not there."""

    url: str
    stub: GRPCInferenceServiceStub


@contextmanager
def dead_gateway(folder: Path, limits: Limits) -> Iterator[Dead]:
    settings = Settings(
        backends=[Server(url=f"http://127.0.0.1:{free_port()}", models=["shapes"])],
        no_auth=True,
        port=free_port(),
        grpc_port=free_port(),
        storage=str(folder / "uploads"),
        video=Video(folder=folder / "jobs"),
        limits=limits,
    )
    with run_gateway(settings), grpc.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel:
        yield Dead(f"http://127.0.0.1:{settings.port}/v2", GRPCInferenceServiceStub(channel))


def test_dead_backend_is_unavailable_and_says_when_to_ask_again(tmp_path: Path, pictures: list[bytes]):
    given = {"name": "pictures", "datatype": "BYTES", "shape": [1]}
    as_json = given | {"data": [base64.b64encode(pictures[0]).decode()]}
    contents = given | {"contents": {"bytes_contents": pictures[:1]}}

    with dead_gateway(tmp_path, Limits()) as (url, stub):
        assert httpx.get(f"{url}/health/live", timeout=PATIENCE_S).json() == {"live": True}
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert httpx.get(f"{url}/health/ready", timeout=PATIENCE_S).status_code == 503
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        ready = httpx.get(f"{url}/models/shapes/ready", timeout=PATIENCE_S)
        assert (ready.status_code, ready.json()) == (503, {"name": "shapes", "ready": False})
        assert not stub.ModelReady(pb.ModelReadyRequest(name="shapes")).ready
        refused = httpx.post(f"{url}/models/shapes/infer", json={"inputs": [as_json]}, timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(pb.ModelInferRequest(model_name="shapes", inputs=[contents]))
        figures = httpx.get(url.replace("/v2", "/metrics"), timeout=PATIENCE_S).text

    for call, status in (("ServerLive", "OK"), ("ModelInfer", "UNAVAILABLE")):
        route = f"/inference.GRPCInferenceService/{call}"
        assert f'requests_total{{method="gRPC",route="{route}",status="{status}"}} 1.0' in figures
    assert 'requests_total{method="POST",route="/v2/models/{name}/infer",status="503"} 1.0' in figures
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0 and "error" in refused.json()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert int(dict(caught.value.trailing_metadata())["retry-after"]) > 0


def test_callers_are_held_to_their_rate_on_both_transports(tmp_path: Path):
    with dead_gateway(tmp_path, Limits(requests_per_second=0.01)) as (url, stub):
        assert not stub.ModelReady(pb.ModelReadyRequest(name="shapes")).ready
        refused = httpx.get(f"{url}/models/shapes/ready", timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelReady(pb.ModelReadyRequest(name="shapes"))

    assert refused.status_code == 429 and "error" in refused.json()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(caught.value.trailing_metadata())["retry-after"]) > 0


def test_requests_are_held_to_their_size_on_both_transports(tmp_path: Path):
    with dead_gateway(tmp_path, Limits(max_tensor_bytes=10_000)) as (url, stub):
        refused = httpx.post(f"{url}/models/shapes/infer", content=bytes(10_001), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(pb.ModelInferRequest(raw_input_contents=[bytes(10_001)]))

    assert refused.status_code == 413 and "error" in refused.json()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_port_in_use_is_one_clear_line(gateway: Gateway, tmp_path: Path):
    port = int(gateway.grpc_address.split(":")[1])
    settings = Settings(backends=[Server(url="http://127.0.0.1:9", models=["m"])], no_auth=True, grpc_port=port)

    with pytest.raises(ToolError, match=f"gRPC cannot listen on 127.0.0.1:{port}"):
        asyncio.run(serve(SimpleNamespace(settings=settings, backend=None)))
