"""What TorchServe hands over for one request, read into pictures and options.

The picture: a raw body, a multipart field `data` or `body`, JSON `{"instances": [{"b64": ...}]}` (KServe V1)
or `{"b64": ...}`, or base64 text, also as a data URL; or a tensor (`handlers.tensor`).
Options: headers `Marina-...`, multipart fields or query parameters, JSON members. A nearer one wins: a member over a
field or query parameter, that over a header.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.errors import EmptyBody, ImageTooLarge, InvalidImage, InvalidOption, RequestError, UnsupportedMedia
from handlers.image import sniff
from handlers.settings import Limits

PICTURE_FIELDS = ("data", "body")
OPTION_HEADER = "marina-"
# The content type of tensors and the header with their shape (`handlers.tensor`).
TENSOR = "application/vnd.marina.tensor"
SHAPE_HEADER = "Marina-Shape"
MAX_INSTANCES = 64
EXAMPLE = "curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg URL, or curl -T photo.jpg URL"

_BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
_WHITESPACE = b" \t\r\n\f\v"
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")


@dataclass(frozen=True)
class Instance:
    """One encoded picture, or a tensor, and the options given for it, unparsed."""

    body: bytes
    options: dict[str, Any] = field(default_factory=dict)
    tensor: bool = False


@dataclass(frozen=True)
class Request:
    """The pictures of one request. kserve: it asked in KServe V1's form and is answered in it."""

    instances: list[Instance]
    kserve: bool = False


def read_request(row: Mapping[str, Any], headers: Mapping[str, Any], limits: Limits) -> Request:
    """`row` and `headers` as TorchServe gives them for one item of a batch.

    Raises EmptyBody, InvalidImage, ImageTooLarge or InvalidOption.
    """
    given = [name for name in PICTURE_FIELDS if name in row]
    if len(given) > 1:
        raise InvalidOption("the request has both a field 'data' and a field 'body'; send the picture once")
    if not given:
        raise _nothing_sent(row, headers)
    options = _header_options(headers)
    # `/invocations` finds its model by this query parameter, and passes it on.
    options |= {name: value for name, value in row.items() if name not in (*PICTURE_FIELDS, "model_name")}
    value = row[given[0]]
    if _header(headers, "content-type").startswith(TENSOR):
        if not isinstance(value, bytes | bytearray):
            raise InvalidImage("the body says that it is a tensor, but is text; send its bytes")
        return Request([Instance(bytes(value), options, tensor=True)])
    if isinstance(value, bytes | bytearray):
        value = _parse_json(bytes(value), headers)
    if isinstance(value, dict):
        return _read_json(value, options, limits)
    if isinstance(value, list):
        raise InvalidImage('the body is a JSON list; send {"instances": [{"b64": "..."}]} or the picture itself')
    if isinstance(value, str):
        return Request([Instance(_from_text(value, limits), options)])
    if not isinstance(value, bytes):
        raise InvalidImage(f"the body is a JSON {type(value).__name__}; send the picture itself")
    return Request([Instance(_read_bytes(value, limits), options)])


def _nothing_sent(row: Mapping[str, Any], headers: Mapping[str, Any]) -> EmptyBody:
    content_type = _header(headers, "content-type")
    if "form-urlencoded" in content_type:
        return EmptyBody(f"no picture arrived: curl sent the body as a form for want of a content type; use {EXAMPLE}")
    if row:
        seen = ", ".join(sorted(map(str, row)))
        return EmptyBody(
            f"no picture arrived: no multipart field 'data' or 'body', only {seen[:200]}; use -F data=@photo.jpg"
        )
    return EmptyBody(f"no picture arrived: the body is empty; use {EXAMPLE}")


def _header(headers: Mapping[str, Any], wanted: str) -> str:
    return next((str(value).lower() for name, value in headers.items() if str(name).lower() == wanted), "")


def _header_options(headers: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: str(name).lower() for name in headers}
    return {
        lower.removeprefix(OPTION_HEADER).replace("-", "_"): headers[name]
        for name, lower in names.items()
        if lower.startswith(OPTION_HEADER)
    }


def _parse_json(body: bytes, headers: Mapping[str, Any]) -> Any:
    """TorchServe passes JSON on as bytes when it does not parse, or when no content type says that it is JSON."""
    declared = "json" in _header(headers, "content-type")
    if not body or sniff(body) or not (declared or body.lstrip(_WHITESPACE).startswith(b"{")):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        if declared:
            raise InvalidImage(f'the body says it is JSON but is not: {error}; send {{"b64": "..."}}') from error
        return body


def _read_bytes(body: bytes, limits: Limits) -> bytes:
    if not body:
        raise EmptyBody(f"no picture arrived: the body is empty; use {EXAMPLE}")
    if sniff(body):
        return body
    if body.startswith(b"data:"):
        return _from_base64(body.decode("ascii", errors="replace"), limits)
    return _picture_in(body, limits) or body


def _picture_in(text: bytes, limits: Limits) -> bytes | None:
    """A picture that is base64 without saying so. Many a word is base64 by chance."""
    if not _is_base64(text):
        return None
    body = _from_base64(text.decode("ascii"), limits)
    return body if sniff(body) else None


def _is_base64(body: bytes) -> bool:
    compact = body.translate(None, _WHITESPACE)
    return len(compact) % 4 == 0 and _BASE64.fullmatch(compact) is not None


def _from_text(text: str, limits: Limits) -> bytes:
    if not text.strip() or _DATA_URL.match(text):
        return _from_base64(text, limits)
    body = _picture_in(text.encode(errors="replace"), limits)
    if body is None:
        raise UnsupportedMedia(
            f"the body is text that begins with {text[:20]!r}, neither a picture nor one in base64; use {EXAMPLE}"
        )
    return body


def _read_json(value: dict[str, Any], options: dict[str, Any], limits: Limits) -> Request:
    if "instances" not in value:
        return Request([_read_instance(value, options, limits)])
    instances = value["instances"]
    if not isinstance(instances, list) or not instances:
        raise EmptyBody('"instances" must be a list with at least one {"b64": "..."}')
    if len(instances) > MAX_INSTANCES:
        raise InvalidOption(
            f'"instances" has {len(instances)} pictures, more than the {MAX_INSTANCES} allowed; send less'
        )
    options = options | {name: member for name, member in value.items() if name != "instances"}
    read = []
    for index, instance in enumerate(instances):
        try:
            read.append(_read_instance(instance, options, limits))
        except RequestError as error:
            raise type(error)(f"instances[{index}]: {error}") from error
    return Request(read, kserve=True)


def _read_instance(value: Any, options: dict[str, Any], limits: Limits) -> Instance:
    if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
        raise EmptyBody('no picture arrived: JSON must hold it as base64 text, {"instances": [{"b64": "..."}]}')
    own = {name: member for name, member in value.items() if name != "b64"}
    return Instance(_from_base64(value["b64"], limits), options | own)


def _from_base64(text: str, limits: Limits) -> bytes:
    if prefix := _DATA_URL.match(text):
        text = text[prefix.end() :]
    size = len(text) * 3 // 4
    # Line breaks are allowed, hence the slack; the exact size is checked when the picture is decoded.
    if size > limits.max_bytes * 1.1 + 1024:
        raise ImageTooLarge(f"the picture has about {size} bytes, more than the {limits.max_bytes} allowed; shrink it")
    try:
        body = base64.b64decode(text.encode("ascii").translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(
            f"the base64 text {text[:20]!r}... cannot be decoded ({error}); send standard base64 (RFC 4648 section 4)"
        ) from error
    if not body:
        raise EmptyBody("no picture arrived: the base64 text is empty")
    return body
