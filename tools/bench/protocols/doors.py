"""What takes bytes to a server on this machine and brings back bytes.

As thin as Python has it, so that protocols are compared and no client libraries: for HTTP, http.client on a connection
that stays open; for gRPC, a channel that takes and gives messages as bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from typing import Any, TypeAlias

import grpc

from tools.client.transports import short
from tools.client.transports.channel import OPTIONS
from tools.errors import ToolError

HOST = "127.0.0.1"
ANSWER_S = 120


@dataclass(frozen=True)
class Message:
    """headers: of HTTP, beside those of the door."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


# Raises ToolError for all but a good answer.
Send: TypeAlias = Callable[[Message], bytes]


@dataclass(frozen=True)
class Http:
    """A path that is posted to. An answer is good with the status 200."""

    port: int
    path: str
    headers: Mapping[str, str]

    @contextmanager
    def open(self, count: int) -> Iterator[list[Send]]:
        """`count` connections, each for one request at a time."""
        with ExitStack() as stack:
            connections = [HTTPConnection(HOST, self.port, timeout=ANSWER_S) for _ in range(count)]
            yield [partial(self._send, stack.enter_context(closing(connection))) for connection in connections]

    def _send(self, connection: HTTPConnection, message: Message) -> bytes:
        try:
            connection.request("POST", self.path, message.body, {**self.headers, **message.headers})
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, HTTPException) as error:
            raise ToolError(f"no answer ({error!r})") from error
        if answer.status != 200:
            raise ToolError(f"answer {answer.status} {short(body)}")
        return body


@dataclass(frozen=True)
class Grpc:
    """A call of one message each way. An answer is good with the status OK."""

    port: int
    method: str
    token: str

    @contextmanager
    def open(self, count: int) -> Iterator[list[Send]]:
        """One channel, which takes any number of calls at a time, `count` times."""
        with grpc.insecure_channel(f"{HOST}:{self.port}", OPTIONS) as channel:
            yield [partial(self._send, channel.unary_unary(self.method))] * count

    def _send(self, call: Any, message: Message) -> bytes:
        metadata = (("authorization", f"Bearer {self.token}"),)
        try:
            answer: bytes = call(message.body, timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            raise ToolError(f"answer {error.code().name} {short(error.details() or '')}") from error
        return answer
