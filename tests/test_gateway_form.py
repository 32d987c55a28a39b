"""Multipart bodies, Accept headers, settings: what the gateway reads before it asks a model."""

import argparse
import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from tools.errors import ToolError
from tools.gateway import command
from tools.gateway.detect import preferred_format
from tools.gateway.errors import GatewayError
from tools.gateway.form import Form, form_schema, read_form
from tools.gateway.settings import Settings

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40 + b"\r\n--b\r\n--b--"
FORM = "multipart/form-data; boundary=edge"


def part(name: str, body: bytes, more: str = "") -> bytes:
    return f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + body + b"\r\n"


def read(body: bytes, content_type: str = FORM, size: int = 1000, query: bytes = b"") -> Form:
    pieces: Iterator[bytes] = (body[start : start + size] for start in range(0, max(1, len(body)), size))
    left = -(-max(1, len(body)) // size)

    async def receive() -> dict:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": next(pieces), "more_body": left > 0}

    headers = [(b"content-type", content_type.encode("latin-1"))]
    scope = {"type": "http", "method": "POST", "headers": headers, "query_string": query}
    return asyncio.run(read_form(Request(scope, receive)))


def refused(body: bytes, content_type: str = FORM) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        read(body, content_type)
    return caught.value


@given(st.integers(1, 12_000))
def test_a_picture_arrives_byte_by_byte_however_it_is_cut(size: int) -> None:
    body = part("file", PNG, '; filename="../../x\xe9.png"') + part("classes", "Straße".encode()) + b"--edge--\r\n"
    form = read(body, size=size)
    assert form.picture == PNG and form.filename == "../../x\xe9.png" and form.fields == {"classes": "Straße"}


def test_fields_become_headers_of_a_prediction() -> None:
    form = Form(b"", "", {"score_threshold": "0.5", "model": "m", "version": "1"})
    assert form.headers("score_threshold", "classes") == {"Marina-Score-Threshold": "0.5"}
    with pytest.raises(GatewayError, match="unknown field or query parameter 'score_threshold'"):
        form.headers("classes")


def test_query_parameters_are_options_too_and_a_field_wins() -> None:
    form = read(part("file", PNG) + part("classes", b"dog") + END, query=b"classes=cat&score_threshold=0.5&model=m")
    assert form.fields == {"classes": "dog", "score_threshold": "0.5", "model": "m"}
    with pytest.raises(GatewayError, match="query parameter 'speed'"):
        read(part("file", PNG) + END, query=b"speed=1").headers("classes")
    with pytest.raises(GatewayError, match="query parameter 'classes' is there twice"):
        read(part("file", PNG) + END, query=b"classes=a&classes=b")
    named = {parameter["name"] for parameter in form_schema("classes")["parameters"]}
    assert named == {"model", "version", "classes"}


def test_what_is_no_single_picture_is_said_in_words() -> None:
    two, none, empty = (refused(body + END) for body in (part("file", PNG) * 2, part("x", b"1"), part("file", b"")))
    assert (two.type, two.message) == ("InvalidForm", "the form has 2 parts named 'file'; send one picture")
    assert (none.type, empty.type) == ("EmptyBody", "EmptyBody")
    assert "the form has no part named 'file'" in none.message and "the part named 'file' is empty" in empty.message


END = b"--edge--\r\n"
BAD = {
    "no form": (b"x", "image/jpeg", 415),
    "no type": (b"x", "", 415),
    "no boundary": (b"x", "multipart/form-data", 400),
    "another boundary": (part("file", PNG) + END, "multipart/form-data; boundary=other", 400),
    "no body": (b"", FORM, 400),
    "no file": (part("model", b"m") + END, FORM, 400),
    "empty file": (part("file", b"") + END, FORM, 400),
    "two files": (part("file", PNG) * 2 + END, FORM, 400),
    "a field twice": (part("file", PNG) + part("model", b"m") * 2 + END, FORM, 400),
    "cut off": (part("file", PNG), FORM, 400),
    "too many parts": (part("file", PNG) + b"".join(part(f"f{i}", b"") for i in range(30)) + END, FORM, 400),
    "a huge field": (part("model", b"m" * 20_000) + END, FORM, 400),
    "a huge header": (part("file", PNG, "; filename=" + "x" * 50_000) + END, FORM, 400),
    "many headers": (b"--edge\r\n" + b"A: b\r\n" * 1000 + b"\r\nx\r\n" + END, FORM, 400),
    "text": (part("file", b"hello there") + END, FORM, 415),
    "JSON with a picture": (part("file", b'{"b64": "aGk="}') + END, FORM, 415),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_form_with_a_picture_is_refused(name: str) -> None:
    body, content_type, status = BAD[name]
    assert refused(body, content_type).status == status


@given(st.binary(max_size=300), st.binary(max_size=40))
def test_noise_is_refused_and_nothing_worse(noise: bytes, kind: bytes) -> None:
    for body, content_type in (
        (noise, FORM),
        (b"--edge\r\n" + noise, FORM),
        (noise, "multipart/" + kind.decode("latin-1")),
    ):
        assert refused(body, content_type).status in (400, 415)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "detections"),
        ("*/*", "detections"),
        ("image/jpeg", "image"),
        ("image/*;q=0.8, application/json;q=0.1", "image"),
        ("application/json, image/jpeg", "detections"),
        ("image/jpeg;q=0.5, */*", "detections"),
        ("text/html, IMAGE/JPEG ; Q=1", "image"),
        ("image/jpeg;q=0", "detections"),
        ("image/jpeg;q=nonsense", "detections"),
        (";;,,q=;=", "detections"),
    ],
)
def test_accept_chooses_between_json_and_the_picture(accept: str, form: str) -> None:
    assert preferred_format(accept) == form


def settings(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.read_settings(parser.parse_args(flags))


def test_flags_are_enough_for_one_server() -> None:
    found = settings("--backend", "http://127.0.0.1:8080/", "--token-file", "t", "--models", "a", "b", "--no-auth")
    (server,) = found.backends
    assert (server.url, server.token_file, server.models) == ("http://127.0.0.1:8080", Path("t"), ["a", "b"])
    assert found.host == "127.0.0.1" and found.cors_origins == []


def test_paths_of_a_file_lie_beside_it_and_those_of_flags_do_not(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        "gateway:\n  backends: [{url: http://h:1, token_file: t, models: [a]}, {url: https://h:2, models: [b]}]\n"
        "  keys_file: keys\n  storage: up\n  video: {folder: jobs}\n"
    )
    found = settings("--config", str(file))
    assert found.backends[0].token_file == tmp_path / "t" and found.backends[1].token_file is None
    assert found.keys_file == tmp_path / "keys" and found.storage == str(tmp_path / "up")
    assert found.video.folder == tmp_path / "jobs"
    flags = ("--storage", "here", "--video-folder", "there", "--backend", "http://h:3", "--models", "c")
    found = settings("--config", str(file), *flags)
    assert found.storage == "here" and [server.models for server in found.backends] == [["c"]]
    assert found.video.folder == Path("there")
    file.write_text("gateway: {backends: [{url: http://h:1, models: [a]}], no_auth: true, storage: s3://b/x}\n")
    found = settings("--config", str(file))
    assert found.storage == "s3://b/x" and found.video.folder == Path("marina-jobs")


ONE = ("--backend", "http://h:1", "--models", "a")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "backends: missing"),
        (("--no-auth", "--backend", "http://h:1"), "with --models"),
        (ONE, "who may call"),
        ((*ONE, "--no-auth", "--keys-file", "k"), "in one way"),
        (("--no-auth", "--backend", "h:1", "--models", "a"), "must be an address"),
        ((*ONE, "--no-auth", "--port", "70000"), "port"),
        ((*ONE, "--no-auth", "--upload-ttl-s", "0"), "upload_ttl_s"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(flags: tuple[str, ...], says: str) -> None:
    with pytest.raises(ToolError, match=says) as caught:
        settings(*flags)
    assert "\n" not in str(caught.value)


def test_a_new_key_shows_itself_once(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--new-key", "yard"])) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("yard sha256:") and shown.out.count(os.linesep) == 1 and "marina_" in shown.err
