"""`multipart/form-data` with one picture and its options, read without temporary files.

Options may be query parameters too; a field is nearer and wins, as in `handlers.request`.
"""

from collections.abc import Iterable
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

_FILE = {"type": "string", "format": "binary", "description": f"the picture: {ACCEPTED}"}
_MODEL = {
    "model": "may be left out where only one is served",
    "version": "without it the one that the server serves by default",
}


def form_schema(*options: str) -> dict[str, Any]:
    """For a route's `openapi_extra`: the fields, and the query parameters that say the same."""
    texts = _MODEL | {name: ALLOWED[name] for name in options}
    fields = {"file": _FILE} | {name: {"type": "string", "description": text} for name, text in texts.items()}
    schema = {"type": "object", "required": ["file"], "properties": fields, "additionalProperties": False}
    query = [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": "in place of the field"}
        for name in texts
    ]
    body = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return {"parameters": query, "requestBody": body}


@dataclass
class Form:
    """picture: encoded. filename: the client's, for people to read and for nothing else. fields: the query parameters
    among them."""

    picture: bytes
    filename: str
    fields: dict[str, str]

    def headers(self, *options: str) -> dict[str, str]:
        """The options as headers of a prediction. Raises GatewayError 400 for a field that is none of `options`."""
        for name in self.fields:
            if name not in (*_MODEL, *options):
                known = ", ".join(("file", *_MODEL, *options))
                raise GatewayError(
                    400, "InvalidOption", f"unknown field or query parameter {name[:80]!r}; known: {known}"
                )
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
    form = _as_form(parts)
    form.fields = _once("query parameter", request.query_params.multi_items()) | form.fields
    return form


def _once(what: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Raises GatewayError 400 for a name that is there twice."""
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise GatewayError(400, "InvalidOption", f"{what} {name[:80]!r} is there twice; send it once")
        found[name] = value
    return found


def _as_form(parts: "_Parts") -> Form:
    files = [part for part in parts.found if part.name == "file"]
    if len(files) > 1:
        raise GatewayError(400, "InvalidForm", f"the form has {len(files)} parts named 'file'; send one picture")
    if not files or not files[0].size:
        seen = "the part named 'file' is empty" if files else "the form has no part named 'file'"
        raise GatewayError(400, "EmptyBody", f"no picture arrived: {seen}; use curl -F file=@photo.jpg")
    picture = b"".join(files[0].chunks)
    if sniff(picture) is None:
        raise GatewayError(415, "UnsupportedMedia", f"the file is none of {ACCEPTED}; it begins with {picture[:8]!r}")
    others = [part for part in parts.found if part.name != "file"]
    texts = ((part.name, b"".join(part.chunks).decode("utf-8", errors="replace")) for part in others)
    return Form(picture, files[0].filename, _once("field", texts))


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
