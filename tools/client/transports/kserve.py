"""KServe v2, the Open Inference Protocol, as Marina's gateway answers it: the encoded picture goes as BYTES `pictures`.

Over REST the picture follows the JSON as bytes (Triton's binary tensor data extension), over gRPC it goes as
`raw_input_contents`, so that it is encoded nowhere. Options are parameters of the request. Numbers come back as FP32;
they are rounded to the digits that the server gives. The parameter `timing_ms` of the answer is a list as JSON, of the
stages' times for each picture.
"""

import json
import math
import struct
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tools.client.answer import Answer, Detection
from tools.client.errors import TOO_LARGE, UNNAMED, ServerError, ServerFailed, ServerUnavailable
from tools.client.transports import ERROR_FIELDS, Transport, bearer, refused, retry_after, short

if TYPE_CHECKING:
    import httpx

PICTURES = "pictures"
TIMING = "timing_ms"
NO_TIMING = "[{}]"
BOX_DIGITS, SCORE_DIGITS = 3, 6
LENGTH = struct.Struct("<I")  # before each element of BYTES
NUMBERS = {"FP32": "f", "INT64": "q"}
BUSY = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
# Of what else a server says no to, as HTTP has it; the gateway tells its own status, and a name, in metadata.
STATUSES = {"INVALID_ARGUMENT": 400, "UNAUTHENTICATED": 401, "NOT_FOUND": 404, "INTERNAL": 500}


def kserve_transport(
    url: str, model: str, version: str | None, token: str | None, authority: str | None, connections: int
) -> Transport:
    """By gRPC for grpc:// and grpcs://, else by REST."""
    if url.startswith("grpc"):
        return KServeGrpcTransport(url, model, version, token, authority)
    return KServeRestTransport(url, model, version, token, authority, connections)


class KServeRestTransport:
    def __init__(
        self, url: str, model: str, version: str | None, token: str | None, authority: str | None, connections: int
    ):
        from tools.client.transports.rest import session

        parts = ["v2", "models", model, *(["versions", version] if version else []), "infer"]
        self._url = "/".join([url.rstrip("/"), *(urllib.parse.quote(part, safe="") for part in parts)])
        self._session = session(token, authority, connections)

    async def predict(self, body: bytes, options: Mapping[str, str]) -> Answer:
        from tools.client.transports.rest import post

        picture = LENGTH.pack(len(body)) + body
        told = {"name": PICTURES, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(picture)}}
        head = json.dumps({"inputs": [told], "parameters": dict(options)}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        answer = await post(self._session, self._url, content=head + picture, headers=headers)
        if answer.status_code != 200:
            raise _error(answer)
        try:
            content = answer.json()
            columns = {output["name"]: output["data"] for output in content["outputs"]}
            timing = content.get("parameters", {}).get(TIMING, NO_TIMING)
            return _answer(content["model_name"], content.get("model_version", ""), columns, timing)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise _strange(self._url, error) from error

    def use_token(self, token: str) -> None:
        self._session.headers["Authorization"] = bearer(token)

    async def aclose(self) -> None:
        await self._session.aclose()


class KServeGrpcTransport:
    def __init__(self, url: str, model: str, version: str | None, token: str | None, authority: str | None):
        from tools.client.transports.channel import open_channel
        from tools.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

        self._url = url
        self._model, self._version = model, version or ""
        self._metadata = (("authorization", bearer(token)),) if token else ()
        self._channel = open_channel(url, authority)
        self._stub = GRPCInferenceServiceStub(self._channel)

    async def predict(self, body: bytes, options: Mapping[str, str]) -> Answer:
        import grpc

        from tools.proto.open_inference_pb2 import InferParameter, ModelInferRequest

        request = ModelInferRequest(
            model_name=self._model,
            model_version=self._version,
            inputs=[{"name": PICTURES, "datatype": "BYTES", "shape": [1]}],
            parameters={name: InferParameter(string_param=value) for name, value in options.items()},
            raw_input_contents=[LENGTH.pack(len(body)) + body],
        )
        try:
            answer = await self._stub.ModelInfer(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._reason(error, len(body)) from error
        try:
            pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
            columns = {output.name: _unpacked(output.datatype, output.shape, raw) for output, raw in pairs}
            timing = answer.parameters[TIMING].string_param if TIMING in answer.parameters else NO_TIMING
            return _answer(answer.model_name, answer.model_version, columns, timing)
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise _strange(self._url, error) from error

    def use_token(self, token: str) -> None:
        self._metadata = (("authorization", bearer(token)),)

    async def aclose(self) -> None:
        await self._channel.close()

    def _reason(self, error: Any, size: int) -> ServerError:
        from tools.client.transports.channel import wrong_address

        if wrong := wrong_address(self._url, error):
            return wrong
        code, text = error.code().name, short(error.details() or "")
        told = dict(error.trailing_metadata() or ())
        if "larger than max" in text:
            return refused(TOO_LARGE, UNNAMED, f"a picture of {size:,} bytes is too large for the server")
        if code in BUSY:
            wait = retry_after(told.get("retry-after"))
            return ServerUnavailable(f"{self._url} is busy, down or not to be reached: {text}", wait)
        if code in STATUSES:
            status = told.get("marina-status", "")
            return refused(
                int(status) if status.isdecimal() else STATUSES[code], told.get("marina-type", UNNAMED), text
            )
        return ServerFailed(f"{self._url} fails: {code} {text}")


def _error(response: "httpx.Response") -> ServerError:
    """The reason in the protocol's form `{"error": "…"}`, beside which our gateway puts its name; in another one it is
    a TorchServe, asked by mistake."""
    try:
        content = response.json()
        if content.keys() >= ERROR_FIELDS:
            return ServerFailed(
                f"{response.url} is of a TorchServe, which says: {content['message']}; use the protocol rest"
            )
        return refused(response.status_code, str(content.get("type", UNNAMED)), str(content["error"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return refused(response.status_code, UNNAMED, short(response.content) or "the server gives no reason")


def _unpacked(datatype: str, shape: Sequence[int], raw: bytes) -> list[Any]:
    """A tensor's elements in C order. Raises KeyError, ValueError or struct.error for what is none."""
    if datatype == "BYTES":
        return [element.decode() for element in _elements(raw)]
    return list(struct.unpack(f"<{math.prod(shape)}{NUMBERS[datatype]}", raw))


def _elements(raw: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(raw):
        (size,) = LENGTH.unpack_from(raw, start)
        yield struct.unpack_from(f"{size}s", raw, start + LENGTH.size)[0]
        start += LENGTH.size + size


def _answer(model: str, version: str, columns: Mapping[str, Sequence[Any]], timing: str) -> Answer:
    """columns: the outputs of one picture, flat. Raises LookupError, TypeError or ValueError for anything else."""
    coordinates = [round(float(value), BOX_DIGITS) for value in columns["boxes"]]
    boxes = zip(*(coordinates[side::4] for side in range(4)), strict=True)
    rows = zip(columns["labels"], columns["label_indices"], columns["scores"], boxes, strict=True)
    width, height = columns["sizes"]
    return Answer(
        model=model,
        version=version,
        width=int(width),
        height=int(height),
        detections=tuple(
            Detection(str(label), int(index), round(float(score), SCORE_DIGITS), box)
            for label, index, score, box in rows
        ),
        timing_ms=dict(json.loads(timing)[0]),
        source="",
    )


def _strange(url: str, error: Exception) -> ServerFailed:
    return ServerFailed(f"{url} does not answer as Marina's gateway does ({error!r}); is a model of Marina behind it?")
