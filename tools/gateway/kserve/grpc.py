"""KServe v2 over gRPC: the service `inference.GRPCInferenceService`.

The metadata behind a refusal tell it as REST does: `marina-status`, `marina-type`, and `retry-after` where there is
one.
"""

import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import wraps
from typing import Any, TypeAlias

import grpc

from tools.errors import ToolError
from tools.gateway.errors import GatewayError
from tools.gateway.kserve.calls import SERVER, Calls
from tools.gateway.kserve.codec import read_grpc, write_grpc
from tools.gateway.services import Services
from tools.proto import open_inference_pb2 as pb
from tools.proto.open_inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
# gRPC drops a status whose headers have more than 8 KiB.
MAX_DETAILS = 2000

Context: TypeAlias = grpc.aio.ServicerContext
Call: TypeAlias = Callable[[Any, Any, Context], Coroutine[Any, Any, Any]]


async def serve(services: Services) -> grpc.aio.Server:
    """A server that listens on `grpc_port`; `stop` ends it. Raises ToolError when the port cannot be had."""
    settings = services.settings
    server = grpc.aio.server(
        maximum_concurrent_rpcs=settings.limits.concurrency,
        options=[
            ("grpc.max_receive_message_length", settings.limits.max_tensor_bytes),
            # Otherwise two gateways could share a port unnoticed.
            ("grpc.so_reuseport", 0),
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(_Service(services), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_certificate is not None and settings.tls_key is not None:
            pair = settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes()
            server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise ToolError(f"gRPC cannot listen on {address}; is the port in use?") from error
    await server.start()
    return server


def _answered(call: Call) -> Call:
    """`call`, its GatewayErrors as statuses of gRPC, counted and timed as requests over HTTP are."""
    route = f"/inference.GRPCInferenceService/{call.__name__}"

    @wraps(call)
    async def answer(service: "_Service", request: Any, context: Context) -> Any:
        figures = service.services.figures
        began, code = time.perf_counter(), grpc.StatusCode.UNKNOWN
        figures.under_way.inc()
        try:
            answered = await call(service, request, context)
            code = grpc.StatusCode.OK
            return answered
        except GatewayError as error:
            code = CODES.get(error.status, grpc.StatusCode.INTERNAL)
            told = [("marina-status", str(error.status)), ("marina-type", error.type)]
            if error.retry_after is not None:
                told.append(("retry-after", str(math.ceil(error.retry_after))))
            await context.abort(code, error.message[:MAX_DETAILS], tuple(told))
        finally:
            figures.under_way.dec()
            figures.seconds.labels(route).observe(time.perf_counter() - began)
            figures.requests.labels("gRPC", route, code.name).inc()

    return answer


class _Service(GRPCInferenceServiceServicer):
    def __init__(self, services: Services):
        self.services = services
        self._calls = Calls(services.backend)

    @_answered
    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> Any:  # noqa: N802  # as the protocol names it
        return pb.ServerLiveResponse(live=True)

    @_answered
    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> Any:  # noqa: N802  # as the protocol names it
        return pb.ServerReadyResponse(ready=await self._calls.server_ready())

    @_answered
    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> Any:  # noqa: N802  # as the protocol names it
        return pb.ServerMetadataResponse(**asdict(SERVER))

    @_answered
    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> Any:  # noqa: N802  # as the protocol names it
        await self._admit(context)
        return pb.ModelReadyResponse(ready=await self._calls.model_ready(request.name, request.version or None))

    @_answered
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> Any:  # noqa: N802  # as the protocol names it
        await self._admit(context)
        return pb.ModelMetadataResponse(**asdict(await self._calls.metadata(request.name, request.version or None)))

    @_answered
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> Any:  # noqa: N802  # as the protocol names it
        await self._admit(context)
        asked = read_grpc(request)
        return write_grpc(await self._calls.infer(request.model_name, request.model_version or None, asked))

    async def _admit(self, context: Context) -> None:
        """Raises GatewayError 401 or 429."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = given.partition(" ")
        caller = await self.services.authenticator.authenticate(token if scheme.lower() == "bearer" else None)
        self.services.rates.count(caller.id)
