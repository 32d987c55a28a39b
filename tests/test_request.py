"""Every form in which TorchServe hands a request over."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folder import assert_one_line, encode, scene

from handlers.errors import EmptyBody, ImageTooLarge, InvalidImage, InvalidOption, RequestError, UnsupportedMedia
from handlers.request import MAX_INSTANCES, read_request
from handlers.settings import Limits

LIMITS = Limits()
JPEG = encode(scene(20, 30), "JPEG")
TEXT = base64.b64encode(JPEG).decode()
LINES = base64.encodebytes(JPEG).decode()
FORM = {"content-type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}


def read(row, headers=None):
    return read_request(row, headers or {}, LIMITS)


@pytest.mark.parametrize(
    "row",
    [
        {"body": JPEG}, {"body": bytearray(JPEG)}, {"data": bytearray(JPEG)},  # raw, multipart, gRPC
        {"body": {"b64": TEXT}}, {"data": {"b64": TEXT}},
        {"body": TEXT}, {"body": LINES}, {"body": LINES.replace("\n", "\r\n")}, {"body": f"  {TEXT}\n"},  # text/*
        {"body": TEXT.encode()}, {"body": LINES.encode()}, {"data": LINES.encode() + b"\n"},
        {"data": f"{TEXT}\r\n".encode()},
        {"body": f"data:image/jpeg;base64,{TEXT}"}, {"body": f"data:image/jpeg;base64,{LINES}".encode()},
        {"body": {"b64": f"data:image/svg+xml;base64,{LINES}"}},
        {"body": JPEG, "model_name": b"yolov5n"},
    ],
)  # fmt: skip
def test_one_picture_arrives_whole(row):
    request = read(row)
    assert [instance.body for instance in request.instances] == [JPEG]
    assert request.instances[0].options == {}
    assert not request.kserve


@pytest.mark.parametrize("count", [1, 3, MAX_INSTANCES])
def test_kserve_instances(count):
    pictures = [encode(scene(8, 8 + index)) for index in range(count)]
    instances = [{"b64": base64.b64encode(picture).decode()} for picture in pictures]
    request = read({"body": {"instances": instances}})
    assert request.kserve
    assert [instance.body for instance in request.instances] == pictures


def test_nearer_options_win():
    """A member over a field or query parameter, that over a header; a member of an instance over one for all."""
    headers = {"Marina-Score-Threshold": "0.1", "MARINA-FORMAT": "coco", "marina-classes": "cat", "Accept": "*/*"}
    row = {"iou_threshold": b"0.2", "format": b"yolo", "model_name": b"m"}
    own = [{"b64": TEXT, "iou_threshold": 0.4}, {"b64": TEXT}]
    first, second = read({**row, "body": {"instances": own, "classes": "dog", "iou_threshold": 0.3}}, headers).instances
    assert second.options == {"score_threshold": "0.1", "format": b"yolo", "classes": "dog", "iou_threshold": 0.3}
    assert first.options == second.options | {"iou_threshold": 0.4}
    (single,) = read({**row, "body": {"b64": TEXT, "format": "coco"}}, headers).instances
    assert single.options == {
        "score_threshold": "0.1", "iou_threshold": b"0.2", "format": "coco", "classes": "cat"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "headers", "message"),
    [
        ({}, FORM, "curl sent the body as a form .*--data-binary @photo.jpg"),
        ({"a": b"1"}, {"Content-Type": "application/x-www-form-urlencoded"}, "curl sent the body as a form"),
        ({}, {}, "the body is empty"),
        ({"body": b""}, {}, "the body is empty"),
        ({"data": bytearray()}, {}, "the body is empty"),
        ({"body": ""}, {}, "base64 text is empty"),
        ({"image": JPEG, "x": b""}, {}, "no multipart field 'data' or 'body', only image, x;"),
        ({"body": {}}, JSON, 'JSON must hold it as base64 text, {"instances"'),
        ({"body": {"b64": 5}}, JSON, "JSON must hold it as base64 text"),
        ({"body": {"instances": []}}, JSON, '"instances" must be a list'),
        ({"body": {"instances": {"b64": TEXT}}}, JSON, '"instances" must be a list'),
        ({"body": {"instances": [TEXT]}}, JSON, "JSON must hold it as base64 text"),
        ({"body": {"b64": ""}}, JSON, "base64 text is empty"),
    ],
)
def test_no_picture(row, headers, message):
    with pytest.raises(EmptyBody, match=message):
        read(row, headers)


@pytest.mark.parametrize(
    ("row", "headers", "message"),
    [
        ({"body": {"b64": "a"}}, JSON, "cannot be decoded"),
        ({"body": {"b64": "abc!"}}, JSON, "cannot be decoded"),
        ({"body": b"data:image/png,abc"}, {}, "cannot be decoded"),
        ({"body": b'{"b64": '}, JSON, "says it is JSON but is not"),
        ({"body": b"\xff\xfe"}, {"CONTENT-TYPE": "application/json; charset=utf-8"}, "says it is JSON but is not"),
        ({"body": b"[" * 200_000}, JSON, "says it is JSON but is not"),
        ({"body": [TEXT]}, JSON, "the body is a JSON list"),
        ({"body": 5}, JSON, "the body is a JSON int"),
        ({"body": None}, JSON, "the body is a JSON NoneType"),
    ],
)
def test_no_way_to_read_it(row, headers, message):
    with pytest.raises(InvalidImage, match=message):
        read(row, headers)


def test_one_picture_in_two_places_is_refused():
    with pytest.raises(InvalidOption, match="send the picture once"):
        read({"data": JPEG, "body": JPEG})


def test_instances_are_limited():
    with pytest.raises(InvalidOption, match=f"{MAX_INSTANCES + 1} pictures, more than the {MAX_INSTANCES} allowed"):
        read({"body": {"instances": [{"b64": TEXT}] * (MAX_INSTANCES + 1)}})


def test_base64_is_limited_before_it_is_decoded():
    # The size itself is checked exactly where the picture is decoded.
    fits = base64.encodebytes(bytes(LIMITS.max_bytes)).decode()
    assert len(read({"body": {"b64": fits}}).instances[0].body) == LIMITS.max_bytes
    with pytest.raises(ImageTooLarge, match="more than the 20000000 allowed"):
        read({"body": {"b64": "A" * 30_000_000}})


def test_other_bytes_go_on_to_the_decoder():
    """Words that are base64 by chance included, so that a refusal shows what was sent."""
    for body in (b"hello", b"%PDF-1.7 x", b"abcde", b"nonsense", b"=" * 4, JPEG[:50], b"\0" * 8):
        assert read({"body": body}, {"Content-Type": "image/jpeg"}).instances[0].body == body


def test_text_that_is_no_picture_is_shown_as_it_came():
    for text in ("nonsense", "hello world", base64.b64encode(b"no picture").decode()):
        with pytest.raises(UnsupportedMedia, match=f"text that begins with '{text[:20]}'"):
            read({"body": text})


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "body", [b" " * 2_000_000 + b"!!", b"A \n" * 700_000 + b"!", b"=" * 2_000_000, b"A" * 2_000_001]
)
def test_reading_takes_time_in_proportion_to_the_body(body):
    """A pattern that tries again from every place would take hours for these."""
    assert read({"body": body}).instances[0].body == body


# JSON may hold half a character.
TEXTS = st.text(max_size=30) | st.text(st.characters(categories=["Cs"]), max_size=3)
NAMES = st.sampled_from(["data", "body", "format", "classes", "model_name", "other"]) | st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from([TEXT, LINES]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["instances", "b64", "format", "x"]), inner, max_size=3)
    ),
)
HEADERS = st.dictionaries(
    st.sampled_from(["Content-Type", "Marina-Format", "marina-", "MARINA-CLASSES", "describe", "data"]),
    st.text(max_size=20) | st.just("application/json") | st.just({"content-type": "text/plain"}),
)


@given(st.dictionaries(NAMES, VALUES | st.binary(max_size=50), max_size=4), HEADERS)
def test_anything_is_read_or_refused(row, headers):
    try:
        request = read(row, headers)
    except RequestError as error:
        assert_one_line(error)
    else:
        assert request.instances
        assert all(type(instance.body) is bytes and instance.body for instance in request.instances)


@pytest.mark.parametrize("text", ["hello, world", "é" * 8, "abc", "\ud800"])
def test_text_is_no_picture(text):
    with pytest.raises(UnsupportedMedia, match="the body is text"):
        read({"body": text}, {"Content-Type": "text/plain"})


def test_json_without_a_content_type():
    body = json.dumps({"b64": TEXT, "score_threshold": 0.5}).encode()
    (instance,) = read({"body": bytearray(body)}, {}).instances
    assert instance.options == {"score_threshold": 0.5}


def test_the_instance_at_fault_is_named():
    with pytest.raises(InvalidImage, match=r"^instances\[1\]: the base64 text '@@@'"):
        read({"body": {"instances": [{"b64": TEXT}, {"b64": "@@@"}]}}, JSON)
