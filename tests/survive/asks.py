"""Requests that are broken in every way, around pictures that are, or are not.

Each is the bytes of HTTP/1.1 that go over the wire, so that headers too may be what no client would send.
"""

import base64
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from survive.pictures import flip_bits, mutated, set_number, truncate

MODEL = "shapes"
PREDICTIONS = f"/predictions/{MODEL}"
JSON_TYPE = "application/json"
TENSOR = "application/vnd.marina.tensor"
OPTIONS = ("score_threshold", "iou_threshold", "max_detections", "classes", "class_agnostic", "format")
VALUES = (
    "0", "1", "-1", "0.3", "1e999", "nan", "inf", "", " ", "true", "False", "1000", "1001", "0x10", "９", "10**9",
    "circle", "star,ring", ",", "0,0,5", "7", "-0", "__background__", "coco", "yolo", "image", "detections",
    "torchserve", "\t", "é", "a" * 300, "9" * 5000, "[1]", "{}", "null", "\x7f", "'; --", "../../etc/passwd", "%00",
    "ring;star",
)  # fmt: skip
JSON_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "circle",
    [],
    {},
    [[]],
    ["ring", 1],
    {"b64": ""},
    "\ud800",
)
NOISY_TYPES = (
    "image/jpeg", "application/octet-stream", "", "image/*", "text/plain", "text/plain; charset=utf-16", "a/b;;=;",
    "application/jsonp", "application/json; charset=latin-1", "multipart/related; boundary=x", TENSOR, "x" * 3000,
)  # fmt: skip
PATHS = (
    PREDICTIONS, PREDICTIONS, f"{PREDICTIONS}/1.0", f"/models/{MODEL}/invoke", f"/v1/models/{MODEL}:predict",
    f"/v2/models/{MODEL}/infer", f"/invocations?model_name={MODEL}",
)  # fmt: skip
DEEPEST = 3000


class Ask(NamedTuple):
    """kind: which of `KINDS` made it. content_type: as it is sent. wire: all of it but the line with the token, which
    goes in front of the first header."""

    kind: str
    content_type: str
    start: bytes
    rest: bytes

    def wire(self, token: str | None) -> bytes:
        return self.start + (f"Authorization: Bearer {token}\r\n".encode() if token else b"") + self.rest


def ask(kind: str, body: bytes, content_type: str | None, path: str = PREDICTIONS, *headers: tuple[str, str]) -> Ask:
    lines = [f"{name}: {value}" for name, value in headers]
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    rest = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("latin-1", "replace") + body
    return Ask(kind, content_type or "", f"POST {path} HTTP/1.1\r\nHost: survive\r\n".encode(), rest)


def broken_ask(rng: Random, seeds: Sequence[bytes]) -> Ask:
    """Three of five are a broken picture as the body."""
    if rng.random() < 0.6:
        kind = rng.choice(("image/jpeg", "application/octet-stream", None))
        return ask("picture", mutated(rng, seeds), kind, rng.choice(PATHS))
    return rng.choice(KINDS)(rng, seeds)


def _picture(rng: Random, seeds: Sequence[bytes]) -> bytes:
    return rng.choice(seeds) if rng.random() < 0.5 else mutated(rng, seeds)


def multipart(rng: Random, seeds: Sequence[bytes]) -> Ask:
    boundary = rng.choice(("x", "----WebKitFormBoundary7MA4YWxk", "a b", "'()+_,-./:=?", "b" * 70))
    fields = [("data", _picture(rng, seeds))]
    for _ in range(rng.choice((0, 0, 1, 3))):
        fields.append((rng.choice((*OPTIONS, "body", "data", "x\ny", "")), rng.choice(VALUES).encode()))
    rng.shuffle(fields)
    body = b"".join(_part(rng, boundary, name, value) for name, value in fields) + f"--{boundary}--\r\n".encode()
    if rng.random() < 0.3:
        body = rng.choice((truncate, flip_bits))(rng, body)
    told = rng.choice((boundary, boundary, boundary, "y", "")) if rng.random() < 0.9 else None
    content_type = "multipart/form-data" + ("" if told is None else f"; boundary={told}")
    return ask("multipart", body, content_type, rng.choice(PATHS))


def _part(rng: Random, boundary: str, name: str, value: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if rng.random() < 0.5:
        disposition += f'; filename="{rng.choice(("a.jpg", "../../x", "", "a" * 500, "é"))}"'
    extra = rng.choice(("", "", "", "\r\nContent-Transfer-Encoding: base64", "\r\nContent-Length: 3", "\r\nX"))
    return f"--{boundary}\r\n{disposition}{extra}\r\n\r\n".encode() + value + b"\r\n"


def as_json(rng: Random, seeds: Sequence[bytes]) -> Ask:
    """KServe V1's form or ours, with members that are none, and now and then text that is no JSON."""
    items = [_instance(rng, seeds) for _ in range(rng.choice((1, 1, 2, 5)))]
    content = rng.choice(
        (
            items[0],
            {"instances": items},
            {"instances": items, **_members(rng)},
            items,
            {"instances": items[0]},
            _nested(rng),
        )
    )
    text = json.dumps(content).encode()
    if rng.random() < 0.3:
        text = rng.choice((truncate, flip_bits))(rng, text)
    return ask("JSON", text, rng.choice((JSON_TYPE, JSON_TYPE, f"{JSON_TYPE}; charset=utf-8", None)), rng.choice(PATHS))


def _instance(rng: Random, seeds: Sequence[bytes]) -> object:
    if rng.random() < 0.1:
        return rng.choice(JSON_VALUES)
    return {rng.choice(("b64", "b64", "b64", "B64", "data")): _base64(rng, _picture(rng, seeds)), **_members(rng)}


def _members(rng: Random) -> dict[str, object]:
    count = rng.choice((0, 0, 1, 2))
    return {rng.choice((*OPTIONS, "x", "")): rng.choice((*JSON_VALUES, *VALUES)) for _ in range(count)}


def _nested(rng: Random) -> object:
    value: object = rng.choice(JSON_VALUES)
    for _ in range(rng.choice((10, 300))):
        value = [value] if rng.random() < 0.5 else {"b64": value}
    return value


def _base64(rng: Random, picture: bytes) -> str:
    text = base64.b64encode(picture).decode()
    if rng.random() < 0.4:
        place = rng.randrange(len(text) + 1)
        text = (
            text[:place] + rng.choice(("", "=", "\n", "-_", "é", "\0", " " * 100)) + text[place + rng.choice((0, 1)) :]
        )
    return rng.choice(("", "", "data:image/jpeg;base64,", "data:;base64,", "data:")) + text


def deep_json(rng: Random, seeds: Sequence[bytes]) -> Ask:
    opening = rng.choice((b"[", b'{"b64":', b'{"instances":['))
    return ask("deep JSON", opening * rng.choice((100, 1000, DEEPEST)), JSON_TYPE, rng.choice(PATHS))


def as_text(rng: Random, seeds: Sequence[bytes]) -> Ask:
    text = _base64(rng, _picture(rng, seeds)).encode()
    return ask("text", text, rng.choice(("text/plain", None, "image/jpeg")), rng.choice(PATHS))


def tensor(rng: Random, seeds: Sequence[bytes]) -> Ask:
    """Of zeros, of noise, of the wrong size."""
    shape = rng.choice(
        ("3,64,64", "3,32,320", "3, 64 ,64", "1,64,64", "3,63,64", "3,0,0", "3,99999,99999", "3,-32,32", "x", "")
    )
    size = 3 * 64 * 64 * 4
    body = rng.choice((bytes(size), bytes([0, 0, 0, 63]) * (size // 4), rng.randbytes(size), bytes(size - 1), b""))
    if rng.random() < 0.3:
        body = set_number(rng, body)
    return ask("tensor", body, TENSOR, rng.choice(PATHS), ("Marina-Shape", shape), *_option_headers(rng))


def _option_headers(rng: Random) -> list[tuple[str, str]]:
    """Without what would end a header's line."""
    names = [rng.choice((*OPTIONS, "shape", "x", "")) for _ in range(rng.choice((0, 1, 3)))]
    return [(f"Marina-{name.replace('_', '-').title()}", rng.choice(VALUES)) for name in names]


def options(rng: Random, seeds: Sequence[bytes]) -> Ask:
    """A good picture, options of any kind in headers and in the query."""
    path = rng.choice(PATHS)
    if rng.random() < 0.5:
        pairs = [f"{rng.choice(OPTIONS)}={rng.choice(VALUES[:16])}" for _ in range(rng.choice((1, 4)))]
        path = f"/models/{MODEL}/invoke?" + rng.choice(("&", "&&", ";")).join(pairs).replace(" ", "+")
        path = path.encode("ascii", "ignore").decode()
    return ask("options", rng.choice(seeds), "image/jpeg", path, *_option_headers(rng))


def headers(rng: Random, seeds: Sequence[bytes]) -> Ask:
    """Content types of any kind, headers that TorchServe itself gives a meaning."""
    names = ("explain", "describe", "url_path", "body", "data", "Accept", "Content-Encoding", "x-request-id", "Cookie")
    extra = [(rng.choice(names), rng.choice((*VALUES, "True", "gzip"))) for _ in range(rng.choice((0, 1, 4)))]
    return ask("headers", _picture(rng, seeds), rng.choice(NOISY_TYPES), rng.choice(PATHS), *extra)


def form(rng: Random, seeds: Sequence[bytes]) -> Ask:
    """As curl sends what has no content type."""
    body = rng.choice((b"a=1&data=x", b"data=%zz", b"&&=&", rng.randbytes(200), _picture(rng, seeds)))
    return ask("form", body, "application/x-www-form-urlencoded", rng.choice(PATHS))


def noise(rng: Random, seeds: Sequence[bytes]) -> Ask:
    body = rng.randbytes(rng.choice((0, 1, 7, 1000, 100_000)))
    return ask("noise", body, rng.choice(NOISY_TYPES), rng.choice(PATHS))


KINDS: tuple[Callable[[Random, Sequence[bytes]], Ask], ...] = (
    multipart, multipart, as_json, as_json, as_json, deep_json, as_text, tensor, options, options, headers, form, noise
)  # fmt: skip
