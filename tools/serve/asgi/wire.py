"""Frames between the front and a worker, over a socket pair: a JSON object and the bytes that it speaks of."""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any

_SIZES = struct.Struct("!II")


def pack(head: Mapping[str, Any], size: int = 0) -> bytes:
    """The beginning of a frame whose body has `size` bytes."""
    text = json.dumps(head).encode()
    return _SIZES.pack(len(text), size) + text


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next one; None where the other side is gone."""
    sizes = stream.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        return None
    head_size, body_size = _SIZES.unpack(sizes)
    head, body = stream.read(head_size), stream.read(body_size)
    if len(head) + len(body) < head_size + body_size:
        return None
    return json.loads(head), body


class Frames:
    """Takes bytes as they come, and gives whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        self._buffer += data
        while len(self._buffer) >= _SIZES.size:
            head_size, body_size = _SIZES.unpack_from(self._buffer)
            start = _SIZES.size + head_size
            if len(self._buffer) < start + body_size:
                return
            head = json.loads(self._buffer[_SIZES.size : start])
            body = bytes(self._buffer[start : start + body_size])
            del self._buffer[: start + body_size]
            yield head, body
