"""TorchServe's gRPC service org.pytorch.serve.grpc.inference.InferenceAPIsService.

Options go into the input map beside the picture, from which the handler takes them as it takes multipart fields. A
refused picture arrives with the status OK, since TorchServe drops the statuses of single items: its body tells. What
TorchServe itself refuses arrives as INTERNAL, whose text tells. Its streaming calls are left alone: they end the
worker of an ordinary handler.
"""

from collections.abc import Mapping

import grpc

from tools.client.answer import Answer
from tools.client.errors import TOO_LARGE, ServerError, ServerFailed, ServerUnavailable
from tools.client.transports import FORMAT, WORKER_DIED, WRONG_KEY, bearer, read_answer, refused, short
from tools.client.transports.channel import open_channel, wrong_address
from tools.proto.inference_pb2 import PredictionsRequest
from tools.proto.inference_pb2_grpc import InferenceAPIsServiceStub

NO_WORKER = "has no worker to serve inference request"  # what a full queue is called, too
NOT_FOUND = ("ModelVersionNotFoundException", "ModelNotFoundException")


class TorchServeGrpcTransport:
    """url: host and port, as grpc://HOST:PORT, or grpcs:// for TLS."""

    def __init__(self, url: str, model: str, version: str | None, token: str | None, authority: str | None):
        self._url = url
        self._model, self._version = model, version or ""
        self._metadata = (("authorization", bearer(token)),) if token else ()
        self._channel = open_channel(url, authority)
        self._stub = InferenceAPIsServiceStub(self._channel)

    async def predict(self, body: bytes, options: Mapping[str, str]) -> Answer:
        given = {name: value.encode() for name, value in options.items()}
        request = PredictionsRequest(
            model_name=self._model,
            model_version=self._version,
            input={**given, "format": FORMAT.encode(), "data": body},
        )
        try:
            answer = await self._stub.Predictions(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._reason(error, len(body)) from error
        return read_answer(answer.prediction)

    def use_token(self, token: str) -> None:
        self._metadata = (("authorization", bearer(token)),)

    async def aclose(self) -> None:
        await self._channel.close()

    def _reason(self, error: grpc.aio.AioRpcError, size: int) -> ServerError:
        if wrong := wrong_address(self._url, error):
            return wrong
        code, text = error.code(), short(error.details() or "")
        if code is grpc.StatusCode.UNAVAILABLE or NO_WORKER in text or WORKER_DIED in text:
            return ServerUnavailable(f"{self._url} is busy, down or not to be reached: {text}")
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return refused(403, WRONG_KEY, text)
        for name in NOT_FOUND:
            if name in text:
                return refused(404, name, text.replace(f"org.pytorch.serve.archive.model.{name}", "").strip())
        if code is grpc.StatusCode.CANCELLED:
            return refused(TOO_LARGE, "Cancelled", f"the server cut off a picture of {size:,} bytes: too large for it")
        return ServerFailed(f"{self._url} fails: {code.name} {text}")
