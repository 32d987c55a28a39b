"""The connection that gRPC calls go over."""

import grpc

from tools.client.errors import ServerError, ServerFailed
from tools.client.transports import NOT_TRUSTED, distrusted
from tools.errors import ToolError

# Pictures may be large; the largest tensor that a server answers with has some ten MB.
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", 64 << 20)]
# gRPC's words for a server that does not speak HTTP/2.
NO_HTTP2 = "Expected SETTINGS frame"
TLS = {"grpc": False, "http": False, "grpcs": True, "https": True}


def open_channel(url: str, authority: str | None) -> grpc.aio.Channel:
    """authority: certificates, PEM, None for those of gRPC itself. Must be called where an event loop runs. Raises
    ToolError for what is no address."""
    scheme, separator, address = url.partition("://")
    address = address.rstrip("/")
    if not separator or scheme not in TLS or not address or "/" in address:
        raise ToolError(f"{url} is no address for gRPC; give one such as grpc://127.0.0.1:7070")
    if TLS[scheme]:
        roots = authority.encode() if authority else None
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots), options=OPTIONS)
    return grpc.aio.insecure_channel(address, options=OPTIONS)


def wrong_address(url: str, error: grpc.aio.AioRpcError) -> ServerError | None:
    """What speaks against `url` itself; None where a server of the right kind answers, or nobody."""
    details = error.details() or ""
    if NOT_TRUSTED in details:
        return distrusted(url)
    if NO_HTTP2 in details:
        return ServerFailed(f"{url} does not speak gRPC; give the port that does, or http:// for one of HTTP")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return ServerFailed(
            f"{url} does not know the call ({details}); use the protocol grpc for TorchServe, kserve for a gateway"
        )
    return None
