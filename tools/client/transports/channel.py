"""The connection that gRPC calls go over."""

import grpc

from tools.errors import ToolError

# Pictures may be large; the largest tensor that a server answers with has some ten MB.
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", 64 << 20)]
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
