"""What each way sends for a picture, and how it reads the answer.

JSON and protobuf are made and read here, not in the doors, so that a round trip holds transport and server alone.
"""

import base64
import json
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from handlers.geometry import Letterbox, letterbox, plan_letterbox
from handlers.image import decode
from handlers.options import Options
from handlers.pipeline import finish
from handlers.settings import Limits, Preprocess
from model_defs.candidates import from_rows
from tools.bench.protocols.doors import Grpc, Http, Message
from tools.client.answer import Detection
from tools.client.transports import FORMAT, read_answer
from tools.client.transports.kserve import BOX_DIGITS, LENGTH, PICTURES, SCORE_DIGITS
from tools.proto.inference_pb2 import PredictionResponse, PredictionsRequest
from tools.proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse

PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
IMAGES, OUTPUT0 = "images", "output0"
NUMBERS = {"FP32": "<f4", "INT64": "<i8"}
OPAQUE = {"Content-Type": "application/octet-stream"}
JSON = {"Content-Type": "application/json"}
BOUNDARY = "marina-5f1c7e9a03d84b62"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}

Found: TypeAlias = tuple[Detection, ...]
# Reads an answer.
Read: TypeAlias = Callable[[bytes], Found]


@dataclass(frozen=True)
class Way:
    """ask: an encoded picture to the message about it and what reads its answer. tensor: the client letterboxes, while
    it makes the message, and suppresses, while it reads."""

    name: str
    door: Http | Grpc
    ask: Callable[[bytes], tuple[Message, Read]]
    tensor: bool = False


@dataclass(frozen=True)
class Address:
    """A server on this machine: its ports, and the token that it wants."""

    http: int
    grpc: int
    token: str


@dataclass(frozen=True)
class Model:
    """What is asked. All but the name is for clients that do the handler's work by themselves."""

    name: str
    labels: Sequence[str]
    options: Options
    preprocess: Preprocess
    stride: int


def all_ways(torchserve: Address, gateway: Address, model: Model) -> list[Way]:
    """The first is the one that the others are compared with."""
    name = urllib.parse.quote(model.name, safe="")
    headers = {"Authorization": f"Bearer {torchserve.token}", "Marina-Format": FORMAT}
    rest = Http(torchserve.http, f"/predictions/{name}", headers)
    rpc = Grpc(torchserve.grpc, PREDICTIONS, torchserve.token)
    key = {"Authorization": f"Bearer {gateway.token}"}
    v2_rest, v2_rpc = (
        Http(gateway.http, f"/v2/models/{name}/infer", key),
        Grpc(gateway.grpc, MODEL_INFER, gateway.token),
    )
    client = _Client(model)
    return [
        Way("REST picture", rest, lambda picture: (Message(picture, OPAQUE), _read)),
        Way("REST multipart", rest, lambda picture: (_form("data", picture), _read)),
        Way("REST base64 JSON", rest, lambda picture: (_base64(picture), _read)),
        Way("gRPC picture", rpc, client.predictions),
        Way("/detect multipart", Http(gateway.http, "/detect", key), lambda picture: (_form("file", picture), _read)),
        Way("v2 REST BYTES", v2_rest, client.v2_rest_bytes),
        Way("v2 gRPC BYTES", v2_rpc, client.v2_grpc_bytes),
        Way("v2 REST tensor", v2_rest, client.v2_rest_tensor, tensor=True),
        Way("v2 gRPC tensor", v2_rpc, client.v2_grpc_tensor, tensor=True),
        Way("v2 gRPC tensor, raw", v2_rpc, client.v2_grpc_raw, tensor=True),
    ]


def _read(answer: bytes) -> Found:
    return read_answer(answer).detections


def _form(field: str, picture: bytes) -> Message:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="picture"\r\n\r\n'
    return Message(head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode(), FORM)


def _base64(picture: bytes) -> Message:
    return Message(json.dumps({"b64": base64.b64encode(picture).decode()}).encode(), JSON)


class _Client:
    """The ways whose messages name the model, or whose answers are more than the detections."""

    def __init__(self, model: Model):
        self._model = model

    def predictions(self, picture: bytes) -> tuple[Message, Read]:
        request = PredictionsRequest(model_name=self._model.name, input={"data": picture, "format": FORMAT.encode()})
        return Message(request.SerializeToString()), lambda answer: _read(
            PredictionResponse.FromString(answer).prediction
        )

    def v2_rest_bytes(self, picture: bytes) -> tuple[Message, Read]:
        """The picture behind the JSON: Triton's binary tensor data extension."""
        element = LENGTH.pack(len(picture)) + picture
        told = {"name": PICTURES, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(element)}}
        head = json.dumps({"inputs": [told]}).encode()
        headers = OPAQUE | {"Inference-Header-Content-Length": str(len(head))}
        return Message(head + element, headers), lambda answer: self._columns(_rest_outputs(answer))

    def v2_grpc_bytes(self, picture: bytes) -> tuple[Message, Read]:
        told = {"name": PICTURES, "datatype": "BYTES", "shape": [1]}
        raw = [LENGTH.pack(len(picture)) + picture]
        return self._infer(told, raw), lambda answer: self._columns(_grpc_outputs(answer))

    def v2_rest_tensor(self, picture: bytes) -> tuple[Message, Read]:
        """Nested lists of numbers, as the clients of model servers before us send them."""
        told, images, plan = self._letterboxed(picture)
        body = json.dumps({"inputs": [told | {"data": images.tolist()}]}).encode()
        return Message(body, JSON), lambda answer: self._suppressed(_rest_outputs(answer), plan)

    def v2_grpc_tensor(self, picture: bytes) -> tuple[Message, Read]:
        told, images, plan = self._letterboxed(picture)
        message = self._infer(told | {"contents": {"fp32_contents": images.ravel().tolist()}}, [])
        return message, lambda answer: self._suppressed(_grpc_outputs(answer), plan)

    def v2_grpc_raw(self, picture: bytes) -> tuple[Message, Read]:
        told, images, plan = self._letterboxed(picture)
        return self._infer(told, [images.tobytes()]), lambda answer: self._suppressed(_grpc_outputs(answer), plan)

    def _infer(self, told: Mapping[str, Any], raw: Sequence[bytes]) -> Message:
        request = ModelInferRequest(model_name=self._model.name, inputs=[told], raw_input_contents=raw)
        return Message(request.SerializeToString())

    def _letterboxed(self, picture: bytes) -> tuple[dict[str, Any], np.ndarray, Letterbox]:
        """The head of the tensor, `[1, 3, H, W]` float32 of RGB in 0..1, and how the picture lies on it."""
        pixels = decode(picture, Limits())
        plan = plan_letterbox(pixels.shape[0], pixels.shape[1], self._model.preprocess, self._model.stride)
        images = letterbox(torch.from_numpy(pixels).permute(2, 0, 1), plan).numpy()[None] / np.float32(255)
        return {"name": IMAGES, "datatype": "FP32", "shape": images.shape}, images, plan

    def _suppressed(self, outputs: Mapping[str, Any], plan: Letterbox) -> Found:
        rows = torch.from_numpy(np.asarray(outputs[OUTPUT0], np.float32)).reshape(-1, 5 + len(self._model.labels))
        one_picture = torch.zeros(len(rows), dtype=torch.int64)
        (candidates,) = from_rows(rows, one_picture, 1, self._model.options.score_threshold)
        found = finish(candidates, self._model.options, plan, plan.height, plan.width)
        return self._found(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist())

    def _columns(self, outputs: Mapping[str, Any]) -> Found:
        """The numbers are FP32, in which the server's decimals are not exact: rounded, they are the same again."""
        boxes = np.asarray(outputs["boxes"], np.float64).round(BOX_DIGITS).reshape(-1, 4)
        scores = np.asarray(outputs["scores"], np.float64).round(SCORE_DIGITS)
        return self._found(boxes.tolist(), np.asarray(outputs["label_indices"]).tolist(), scores.tolist())

    def _found(self, boxes: Sequence[Sequence[float]], labels: Sequence[int], scores: Sequence[float]) -> Found:
        return tuple(
            Detection(self._model.labels[label], label, score, (x1, y1, x2, y2))
            for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True)
        )


def _rest_outputs(answer: bytes) -> dict[str, Any]:
    """KServe's outputs by name, flat."""
    return {output["name"]: output["data"] for output in json.loads(answer)["outputs"]}


def _grpc_outputs(answer: bytes) -> dict[str, Any]:
    """The same, without those that are no numbers."""
    message = ModelInferResponse.FromString(answer)
    pairs = zip(message.outputs, message.raw_output_contents, strict=True)
    return {told.name: np.frombuffer(raw, NUMBERS[told.datatype]) for told, raw in pairs if told.datatype in NUMBERS}
