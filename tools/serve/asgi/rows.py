"""A request's body as TorchServe hands it to a handler: a dict of fields, or of one, `body`."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

MOST_FIELDS = 100
MOST_HEADERS = 8
MOST_HEADER_BYTES = 20_000


class BadForm(Exception):
    """A multipart body cannot be read; the text says why."""


def read_row(headers: Mapping[str, str], query: str, body: bytes) -> dict[str, Any]:
    """The fields of a request. headers: with names in lower case. query: the parameters that become fields, encoded;
    one of the body wins over one of these. Of a name that is there twice the last one counts. Raises BadForm.
    """
    row: dict[str, Any] = _urlencoded(query.encode())
    kind, parameters = parse_options_header(headers.get("content-type"))
    if kind == b"multipart/form-data":
        return row | _multipart(parameters.get(b"boundary", b""), body)
    if kind == b"application/x-www-form-urlencoded":
        return row | _urlencoded(body)
    return row | {"body": _value(kind, body)}


def _value(kind: bytes, body: bytes) -> Any:
    """Parsed where its type says what it is; as it came where that is not so."""
    try:
        if kind == b"application/json":
            return json.loads(body.decode())
        if kind.startswith(b"text"):
            return body.decode()
    except (ValueError, RecursionError):
        pass
    return body


def _urlencoded(text: bytes) -> dict[str, Any]:
    """Nothing for a picture that a client calls a form, as curl does by default; it is told how to send one."""
    try:
        # Latin-1 keeps the bytes that stand for themselves.
        pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, encoding="latin-1", max_num_fields=MOST_FIELDS)
    except ValueError:
        return {}
    return {name.encode("latin-1").decode(errors="replace"): value.encode("latin-1") for name, value in pairs}


def _multipart(boundary: bytes, body: bytes) -> dict[str, Any]:
    parts = _Parts()
    try:
        parser = MultipartParser(
            boundary, parts.callbacks(), max_header_count=MOST_HEADERS, max_header_size=MOST_HEADER_BYTES
        )
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise BadForm(f"the multipart body cannot be read: {error}") from error
    if not parts.complete:
        raise BadForm("the multipart body ends before its last boundary")
    return parts.row


class _Parts:
    """What the parser finds, part by part."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}
        self.complete = False
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def _part_end(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition"))
        name = parameters.get(b"name", b"").decode(errors="replace")
        if name not in self.row and len(self.row) == MOST_FIELDS:
            raise BadForm(f"the form has more than {MOST_FIELDS} fields")
        # Of a field that is no file TorchServe forgets the type.
        kind = self._headers.get(b"content-type", b"") if b"filename" in parameters else b""
        self.row[name] = _value(parse_options_header(kind)[0], b"".join(self._chunks))
        self._headers, self._chunks = {}, []

    def _end(self) -> None:
        self.complete = True
