"""`multipart/form-data` with one picture and its options, read without temporary files."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from handlers.image import ACCEPTED, sniff
from handlers.options import ALLOWED
from tools.gateway.errors import GatewayError

MOST_PARTS = 20
MOST_FIELD_BYTES = 10_000
MOST_HEADER_BYTES = 20_000
# The picture is known by its own first bytes, whatever the client calls it.
BODY_TYPE = "application/octet-stream"

_FIELDS = {
    "file": {"type": "string", "format": "binary", "description": f"the picture: {ACCEPTED}"},
    "model": {"type": "string", "description": "may be left out where only one is served"},
    "version": {"type": "string", "description": "without it the one that the server serves by default"},
}


def form_schema(*options: str) -> dict[str, Any]:
    """For a route's `openapi_extra`: the fields, `options` among them."""
    fields = _FIELDS | {name: {"type": "string", "description": ALLOWED[name]} for name in options}
    schema = {"type": "object", "required": ["file"], "properties": fields, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass
class Form:
    """picture: encoded. filename: the client's, for people to read and for nothing else."""

    picture: bytes
    filename: str
    fields: dict[str, str]

    def headers(self, *options: str) -> dict[str, str]:
        """The options as headers of a prediction. Raises GatewayError 400 for a field that is none of `options`."""
        for name in self.fields:
            if name not in ("model", "version", *options):
                known = ", ".join(("file", "model", "version", *options))
                raise GatewayError(400, "InvalidOption", f"unknown field {name[:80]!r}; known: {known}")
        return {
            f"Marina-{name.replace('_', '-').title()}": value for name, value in self.fields.items() if name in options
        }


async def read_form(request: Request) -> Form:
    """Raises GatewayError: 400 for what is no form or has no picture, 415 for another type of body or of file."""
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise GatewayError(415, "UnsupportedMedia", "the body is no multipart/form-data; use curl -F file=@photo.jpg")
    parts = _Parts()
    try:
        parser = MultipartParser(
            parameters.get(b"boundary", b""),
            parts.callbacks(),
            max_header_count=8,
            max_header_size=MOST_HEADER_BYTES,
        )
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except MultipartParseError as error:
        raise GatewayError(400, "InvalidForm", f"the multipart body cannot be read: {error}") from error
    if not parts.complete:
        raise GatewayError(400, "InvalidForm", "the multipart body ends before its last boundary")
    return _as_form(parts)


def _as_form(parts: "_Parts") -> Form:
    files = [part for part in parts.found if part.name == "file"]
    if len(files) != 1 or not files[0].size:
        seen = f"{len(files)} parts named 'file'" if len(files) != 1 else "an empty part 'file'"
        raise GatewayError(400, "EmptyBody", f"there is {seen}; send one picture, curl -F file=@photo.jpg")
    picture = b"".join(files[0].chunks)
    if sniff(picture) is None:
        raise GatewayError(415, "UnsupportedMedia", f"the file is none of {ACCEPTED}; it begins with {picture[:8]!r}")
    fields = {}
    for part in parts.found:
        if part.name == "file":
            continue
        if part.name in fields:
            raise GatewayError(400, "InvalidOption", f"field {part.name[:80]!r} is there twice; send it once")
        fields[part.name] = b"".join(part.chunks).decode("utf-8", errors="replace")
    return Form(picture, files[0].filename, fields)


@dataclass
class _Part:
    name: str = ""
    filename: str = ""
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0


class _Parts:
    """What the parser finds, part by part. Raises GatewayError 400 when there are too many or too large ones."""

    def __init__(self) -> None:
        self.found: list[_Part] = []
        self.complete = False
        self._header = b""
        self._value = b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.found) == MOST_PARTS:
            raise GatewayError(400, "InvalidForm", f"the form has more than {MOST_PARTS} parts")
        self.found.append(_Part())

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, parameters = parse_options_header(self._value)
            self.found[-1].name = parameters.get(b"name", b"").decode("utf-8", errors="replace")
            self.found[-1].filename = parameters.get(b"filename", b"").decode("utf-8", errors="replace")
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self.found[-1]
        part.size += end - start
        if part.name != "file" and part.size > MOST_FIELD_BYTES:
            raise GatewayError(400, "InvalidForm", f"field {part.name[:80]!r} has more than {MOST_FIELD_BYTES} bytes")
        part.chunks.append(data[start:end])

    def _end(self) -> None:
        self.complete = True
