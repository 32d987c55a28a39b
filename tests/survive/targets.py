"""What reads foreign bytes, each as a function of them: it returns, or raises only what the reader says it raises.

An exception that comes out of a target is a finding.
"""

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from handlers.errors import BadSettings, MarinaError, RequestError
from handlers.image import decode
from handlers.options import ALLOWED, Options, parse_options
from handlers.request import read_request
from handlers.settings import Limits, parse_settings
from tools.archive.inspect import as_table, inspect_archive
from tools.archive.reader import MANIFEST, PROVENANCE
from tools.errors import ToolError
from tools.serve.store import find_archives

Target = Callable[[bytes], None]

LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)
DEFAULTS = Options(0.25, 0.45, 300, False, None, "detections")
LABELS = ["cat", "dog", "salt, pepper", "7", "__background__"]
LONGEST_MESSAGE = 2000
# Between the parts of an input.
CUT = b"\n--\n"


def picture(data: bytes) -> None:
    """An encoded picture."""
    try:
        decode(data, LIMITS)
    except RequestError as error:
        _check(error)


def options(data: bytes) -> None:
    """Lines `name=value`, the value as text and, where it is JSON, as that."""
    for line in data.split(b"\n"):
        name, _, value = line.decode(errors="replace").partition("=")
        for given in (value, value.encode(), *_as_json(value)):
            try:
                parse_options({name: given}, DEFAULTS, LABELS)
            except RequestError as error:
                _check(error)


def _as_json(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError):
        return []


def request(data: bytes) -> None:
    """Lines `name: value` of headers, then the body; or fields of a form, each with a body."""
    head, *bodies = data.split(CUT)
    pairs = [line.decode(errors="replace").partition(":") for line in head.split(b"\n")]
    headers = {name: value.strip() for name, _, value in pairs}
    for row in _rows(headers, bodies):
        try:
            for instance in read_request(row, headers, LIMITS).instances:
                parse_options(instance.options, DEFAULTS, LABELS)
        except RequestError as error:
            _check(error)


def _rows(headers: Mapping[str, str], bodies: list[bytes]) -> list[dict[str, Any]]:
    """As TorchServe's worker makes them: JSON and text by the content type, and what is neither as bytes."""
    if len(bodies) > 1:
        pairs = [body.partition(b"=") for body in bodies]
        return [{name.decode(errors="replace"): bytearray(value) for name, _, value in pairs}]
    body = bodies[0] if bodies else b""
    rows: list[dict[str, Any]] = [{"body": bytearray(body)}]
    rows += [{"body": value} for value in _as_json(body.decode(errors="replace"))]
    return [*rows, {"body": body.decode(errors="replace")}]


def settings(data: bytes) -> None:
    """The section `handler` of a model-config.yaml."""
    try:
        content = yaml.safe_load(data)
    except Exception:
        return  # not for this reader to judge
    try:
        parse_settings(content)
    except BadSettings as error:
        _check(error)


def manifest(data: bytes) -> None:
    """Manifest, model-config.yaml, provenance and labels of an archive that is otherwise in order."""
    names = (MANIFEST, "model-config.yaml", PROVENANCE, "index_to_name.json")
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as writer:
        for name, content in zip(names, data.split(CUT), strict=False):
            writer.writestr(name, content)
    archive(sink.getvalue())


def archive(data: bytes) -> None:
    """The bytes of a .mar."""
    with tempfile.TemporaryDirectory(prefix="marina-") as folder:
        path = Path(folder) / "a.mar"
        path.write_bytes(data)
        for read in (lambda: as_table(inspect_archive(path)), lambda: find_archives(path.parent)):
            try:
                read()
            except (MarinaError, ToolError) as error:
                _check(error)


def _check(error: Exception) -> None:
    text = str(error)
    if "\n" in text or "\r" in text or len(text) > LONGEST_MESSAGE:
        raise AssertionError(f"no one line for people: {text[:LONGEST_MESSAGE]!r}") from error


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (picture, options, request, settings, manifest, archive)
}

SEED_MANIFEST = {
    "createdOn": "01/01/1980 00:00:00",
    "runtime": "python",
    "archiverVersion": "0.12.0",
    "model": {"modelName": "m", "modelVersion": "1.0", "handler": "h.py", "configFile": "model-config.yaml"},
}
SEED_SETTINGS = {
    "name": "m",
    "version": "1.0",
    "model": {"definition": "yolov5", "args": {"size": "n"}},
    "weights": "w.safetensors",
    "labels": "index_to_name.json",
    "preprocess": {"size": 640, "shape": "rect"},
    "postprocess": {"score_threshold": 0.25, "iou_threshold": 0.45, "max_detections": 300, "class_agnostic": False},
    "limits": {"max_bytes": 1000, "max_pixels": 1000},
    "response": {"format": "coco"},
    "runtime": {"backend": "torch", "precision": "fp32"},
    "device": "cpu",
    "golden": [{"image": "a.jpg", "detections": "a.json"}],
}
SEED_PROVENANCE = {
    "entries": {MANIFEST: {"size": 1, "sha256": "0"}},
    "recipe": {"license": "x", "model": {"definition": "yolov5", "args": {}}, "runtime": {"backend": "torch"}},
    "weights": {"file": "w", "kind": "pickle", "parameters": 5, "sha256": "0"},
    "marina": {"version": "0.1.0", "revision": None},
    "verified_with": {"torch": "2.12.0"},
}


def seeds(name: str) -> list[bytes]:
    """Good inputs, from which the search for bad ones begins."""
    from survive.pictures import drawn_seeds

    config = yaml.safe_dump({"minWorkers": 1, "handler": SEED_SETTINGS}).encode()
    labels = json.dumps({"0": "cat", "1": "dog"}).encode()
    inside = CUT.join((json.dumps(SEED_MANIFEST).encode(), config, json.dumps(SEED_PROVENANCE).encode(), labels))
    if name == "picture":
        return drawn_seeds()
    if name == "options":
        return [
            f"{option}={value}".encode() for option in ALLOWED for value in ("0.5", "3", "cat,dog", "true", "[1,2]")
        ]
    if name == "request":
        return [
            CUT.join((b"Content-Type: image/jpeg\nMarina-Format: coco", b"\xff\xd8\xff")),
            CUT.join((b"Content-Type: application/json", b'{"instances": [{"b64": "/9j/"}], "classes": "cat"}')),
            CUT.join((b"Content-Type: text/plain", b"data:image/jpeg;base64,/9j/")),
            CUT.join((b"Content-Type: application/vnd.marina.tensor\nMarina-Shape: 3,32,32", bytes(8))),
            CUT.join((b"Content-Type: multipart/form-data", b"data=\xff\xd8\xff", b"score_threshold=0.5")),
        ]
    if name == "settings":
        return [yaml.safe_dump(SEED_SETTINGS).encode(), json.dumps(SEED_SETTINGS).encode()]
    return [inside] if name == "manifest" else [_zipped(inside, method) for method in (0, 8, 12, 14)]


def _zipped(content: bytes, method: int) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as writer:
        writer.writestr(MANIFEST, json.dumps(SEED_MANIFEST))
        writer.writestr("model-config.yaml", f"handler: {json.dumps(SEED_SETTINGS)}")
        writer.writestr("more", content)
    return sink.getvalue()
