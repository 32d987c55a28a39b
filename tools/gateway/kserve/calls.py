"""What the calls of KServe v2 mean here, whichever way they came in.

A request has one input:

    pictures  BYTES [B]           encoded pictures -> detections, the rows of all pictures one after the other
    images    FP32 [B, 3, H, W]   RGB in 0..1, letterboxed -> output0, the rows of YOLOv5's head before suppression

The parameter `timing_ms` of an answer to pictures is JSON: for each picture the milliseconds of every stage.

Each picture is one request to TorchServe, so that its workers share them.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from typing import Any

import numpy as np

from handlers.image import ACCEPTED, sniff
from handlers.options import ALLOWED
from handlers.request import SHAPE_HEADER, TENSOR
from tools.gateway.backend import Backend, Model
from tools.gateway.errors import GatewayError
from tools.gateway.kserve.codec import MAX_PICTURES, NUMBERS, InferAnswer, InferRequest, Tensor, invalid

PICTURES = "pictures"
IMAGES = "images"
OUTPUT0 = "output0"
TIMING = "timing_ms"
# What a request's parameters may be; each becomes a header.
OPTIONS = tuple(name for name in ALLOWED if name != "format")
# Of one request's pictures at TorchServe at a time, whose queue has room for others too.
CONCURRENCY = 8
OPAQUE = "application/octet-stream"


@dataclass(frozen=True)
class ServerMetadata:
    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class TensorMetadata:
    """An input or output; -1 is a side of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMetadata:
    """A request has one of the inputs: `images` is answered with `output0`, `pictures` with the other outputs."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


SERVER = ServerMetadata("marina", installed("marina"), ("binary_tensor_data",))
PLATFORM = "marina_torchserve"
# boxes: x1, y1, x2, y2 in pixels of the upright original. picture: which of `pictures` a row belongs to.
# sizes: width and height of each picture in pixels.
DETECTIONS = (
    TensorMetadata("boxes", "FP32", (-1, 4)),
    TensorMetadata("scores", "FP32", (-1,)),
    TensorMetadata("label_indices", "INT64", (-1,)),
    TensorMetadata("labels", "BYTES", (-1,)),
    TensorMetadata("picture", "INT64", (-1,)),
    TensorMetadata("sizes", "INT64", (-1, 2)),
)


class Calls:
    """The calls that ask a model. All raise GatewayError."""

    def __init__(self, backend: Backend):
        self._backend = backend

    async def server_ready(self) -> bool:
        """Whether every model answers."""
        models = await self._backend.models()
        return bool(models) and all(model.healthy for model in models)

    async def model_ready(self, name: str, version: str | None) -> bool:
        try:
            return (await self._backend.model(name, version)).healthy
        except GatewayError as error:
            if error.status == 503:
                return False
            raise

    async def metadata(self, name: str, version: str | None) -> ModelMetadata:
        model = await self._backend.model(name, version)
        inputs, outputs = [TensorMetadata(PICTURES, "BYTES", (-1,))], list(DETECTIONS)
        if model.input.get("letterbox"):
            inputs.append(TensorMetadata(IMAGES, "FP32", (-1, 3, -1, -1)))
            outputs.append(TensorMetadata(OUTPUT0, "FP32", (-1, -1, _columns(model))))
        return ModelMetadata(model.name, (model.version,), PLATFORM, tuple(inputs), tuple(outputs))

    async def infer(self, name: str, version: str | None, request: InferRequest) -> InferAnswer:
        if len(request.inputs) != 1:
            raise invalid(f"the request has {len(request.inputs)} inputs; send one, {PICTURES} or {IMAGES}")
        (given,) = request.inputs
        headers = _headers(request.parameters)
        if isinstance(given.data, list):
            answers = await self._detect(name, version, given, given.data, headers)
            served, outputs = answers[0]["version"], detection_tensors(answers)
            told = {TIMING: json.dumps([answer[TIMING] for answer in answers])}
        elif headers:
            raise invalid(f"parameter {next(iter(request.parameters))!r} does not go with {IMAGES}: all rows are sent")
        else:
            served, outputs = await self._rows(name, version, given, given.data)
            told = {}
        return InferAnswer(name, served, request.id, _chosen(outputs, request.outputs), told)

    async def _detect(
        self, name: str, version: str | None, given: Tensor, pictures: Sequence[bytes], headers: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """An answer in format `detections` for each picture."""
        _check_input(given, PICTURES, "[B], a picture an element", len(given.shape) == 1)
        for index, picture in enumerate(pictures):
            if not picture:
                raise GatewayError(400, "EmptyBody", f"no picture arrived: {PICTURES}[{index}] is empty")
            # The handler would take JSON and base64 too, and options in them.
            if not sniff(picture):
                raise GatewayError(
                    415,
                    "UnsupportedMedia",
                    f"{PICTURES}[{index}] begins with {picture[:8]!r}, which is no {ACCEPTED} picture",
                )
        headers = {**headers, "Marina-Format": "detections"}
        bodies = await self._ask_all(name, version, given, pictures, OPAQUE, headers)
        return [json.loads(body) for body in bodies]

    async def _rows(self, name: str, version: str | None, given: Tensor, data: bytes) -> tuple[str, list[Tensor]]:
        """The version that answered, and all rows of its head."""
        fits = len(given.shape) == 4 and given.shape[1] == 3 and 0 < given.shape[0] <= MAX_PICTURES and len(data) > 0
        _check_input(given, IMAGES, f"[B, 3, height, width], B {MAX_PICTURES} at most", fits)
        size = len(data) // given.shape[0]
        images = [data] if size == len(data) else [data[start : start + size] for start in range(0, len(data), size)]
        headers = {SHAPE_HEADER: ",".join(map(str, given.shape[1:]))}
        bodies, model = await asyncio.gather(
            self._ask_all(name, version, given, images, TENSOR, headers), self._backend.model(name, version)
        )
        rows = len(bodies[0]) // (_columns(model) * NUMBERS["FP32"].itemsize)
        shape = (len(bodies), rows, _columns(model))
        return model.version, [Tensor(OUTPUT0, "FP32", shape, bodies[0] if len(bodies) == 1 else b"".join(bodies))]

    async def _ask_all(
        self,
        name: str,
        version: str | None,
        given: Tensor,
        bodies: Sequence[bytes],
        content_type: str,
        headers: Mapping[str, str],
    ) -> list[bytes]:
        """The answers to the elements of `given` in order; the first refusal is raised, with its place."""
        turn = asyncio.Semaphore(CONCURRENCY)

        async def ask(index: int, body: bytes) -> bytes:
            async with turn:
                answer = await self._backend.predict(name, version, body, content_type, headers)
            if answer.status != 200:
                raise _refusal(answer.status, answer.body, _place(given, index))
            return answer.body

        found = await asyncio.gather(*map(ask, range(len(bodies)), bodies), return_exceptions=True)
        answers = []
        for answer in found:
            if isinstance(answer, BaseException):
                raise answer
            answers.append(answer)
        return answers


def detection_tensors(answers: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Answers in format `detections` as the outputs that `DETECTIONS` lists."""
    rows = [row for answer in answers for row in answer["detections"]]
    found = [len(answer["detections"]) for answer in answers]
    return [
        _numbers("boxes", "FP32", (len(rows), 4), [row["box"] for row in rows]),
        _numbers("scores", "FP32", (len(rows),), [row["score"] for row in rows]),
        _numbers("label_indices", "INT64", (len(rows),), [row["index"] for row in rows]),
        Tensor("labels", "BYTES", (len(rows),), [row["label"].encode() for row in rows]),
        _numbers("picture", "INT64", (len(rows),), np.repeat(np.arange(len(answers)), found)),
        _numbers("sizes", "INT64", (len(answers), 2), [(answer["width"], answer["height"]) for answer in answers]),
    ]


def _numbers(name: str, datatype: str, shape: tuple[int, ...], values: Any) -> Tensor:
    return Tensor(name, datatype, shape, np.asarray(values, NUMBERS[datatype]).tobytes())


def _columns(model: Model) -> int:
    """Of YOLOv5's head: box, objectness, classes."""
    return 5 + len(model.labels)


def _check_input(given: Tensor, name: str, shape: str, fits: bool) -> None:
    if given.name != name:
        raise invalid(
            f"no input {given.name[:80]!r} of datatype {given.datatype}; send {PICTURES} BYTES or {IMAGES} FP32"
        )
    if not fits or given.shape[0] == 0:
        raise invalid(f"{name} has the shape {str(list(given.shape))[:80]}; send {shape}")


def _headers(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The handler's options. What it says to their values is passed on."""
    headers = {}
    for name, value in parameters.items():
        if name not in OPTIONS:
            raise invalid(f"unknown parameter {name[:80]!r}; known: {', '.join(OPTIONS)}")
        if not isinstance(value, str | bool | int | float) or len(str(value)) > 1000:
            raise invalid(f"parameter {name!r} is {str(value)[:80]}; send a text, a number or a boolean")
        headers["Marina-" + name.title().replace("_", "-")] = str(value)
    return headers


def _place(given: Tensor, index: int) -> str:
    number = f"[{index}]" if given.shape[0] > 1 else ""
    shape = f" of shape {list(given.shape)}" if len(given.shape) > 1 else ""
    return f"{given.name}{number}{shape}: "


def _refusal(status: int, body: bytes, where: str) -> GatewayError:
    """TorchServe's answer that is none."""
    try:
        told = json.loads(body)
        return GatewayError(status, told["type"], where + told["message"])
    except (ValueError, TypeError, KeyError):
        # Its own 413 has no body.
        return GatewayError(status, "Refused", f"{where}the server of the model answers {status} and says no more")


def _chosen(outputs: Iterable[Tensor], names: Sequence[str]) -> list[Tensor]:
    known = {tensor.name: tensor for tensor in outputs}
    for name in names:
        if name not in known:
            raise invalid(f"no output {name[:80]!r}; this request is answered with {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())
