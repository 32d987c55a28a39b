"""What was once found to break a reader, and a short search for more; `make fuzz` searches for as long as it may."""

import gc
import json
import weakref
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import ask, assert_one_line
from survive import pictures
from survive.asks import KINDS, broken_ask
from survive.asks import ask as http_ask
from survive.bombs import BOMBS, jpeg_of_many_scans
from survive.pictures import drawn_picture, drawn_seeds, form_of, mutated
from survive.served import Held, growth
from survive.storm import judge
from survive.targets import SEED_SETTINGS, TARGETS, seeds

from handlers.errors import BadSettings, ImageTooLarge, RequestError
from handlers.image import decode
from handlers.options import ALLOWED, Options, parse_options
from handlers.request import read_request
from handlers.settings import Limits, parse_settings

CORPUS = Path(pictures.__file__).with_name("corpus")
DEFAULTS = Options(0.25, 0.45, 300, False, None, "detections")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
PATHS = [(key,) for key in SEED_SETTINGS] + [
    (key, inner) for key, value in SEED_SETTINGS.items() if isinstance(value, dict) for inner in value
]


@pytest.mark.parametrize("found", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_withstood(found: Path) -> None:
    TARGETS[found.parent.name](found.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_withstood(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name](seed)


def test_seeds_are_of_every_form() -> None:
    assert {form_of(seed) for seed in drawn_seeds()} == {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"}


def test_the_same_generator_makes_the_same_pictures_and_requests() -> None:
    known = drawn_seeds()
    one, other = ([(mutated(rng, known), broken_ask(rng, known)) for rng in map(Random, range(20))] for _ in range(2))
    assert one == other
    assert len({picture for picture, _ in one}) > 15


def test_changed_pictures_are_decoded_or_refused() -> None:
    known = drawn_seeds()
    for number in range(400):
        TARGETS["picture"](mutated(Random(number), known))


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_bombs_are_refused_or_small(bomb) -> None:
    for number in range(3):
        TARGETS["picture"](bomb(Random(number)))


def test_scans_are_counted_by_what_they_cost() -> None:
    """200 kB that libjpeg would go over for a minute; TorchServe kills a worker that long at work."""
    with pytest.raises(ImageTooLarge, match=r"7000x7000 pixels in \d+ scans, too many to decode"):
        decode(jpeg_of_many_scans(Random(0)), Limits())


@given(name=st.sampled_from([*ALLOWED, "other"]), value=JSON | st.binary(max_size=30))
@settings(max_examples=150)
def test_options_of_any_kind(name, value) -> None:
    try:
        parse_options({name: value}, DEFAULTS, ["cat", "dog", "7"])
    except RequestError as error:
        assert_one_line(error)


@given(content=JSON, member=st.sampled_from(["b64", "instances", "data", "x"]), declared=st.booleans())
@settings(max_examples=150)
def test_json_of_any_kind(content, member, declared) -> None:
    for body in (
        content,
        {member: content},
        {"instances": [{member: content}]},
        json.dumps({member: content}).encode(),
    ):
        try:
            read_request({"body": body}, {"Content-Type": "application/json"} if declared else {}, Limits())
        except RequestError as error:
            assert_one_line(error)


@given(path=st.sampled_from(PATHS), value=JSON)
@settings(max_examples=150)
def test_settings_of_any_kind(path, value) -> None:
    section = json.loads(json.dumps(SEED_SETTINGS))
    where = section
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    try:
        parse_settings(section)
    except BadSettings as error:
        assert_one_line(error)


BROKEN = b"\xff\xd8\xff\xe0 torn"


@pytest.mark.parametrize(
    "request_",
    [
        BROKEN,
        ({"body": {"instances": [{"b64": "/9j/4CB0b3Ju"}]}}, {}),
        ({"body": drawn_picture()}, {"Marina-Classes": "nothing"}),
        ({"body": drawn_picture()}, {"Marina-Format": "detections"}),
    ],
    ids=["picture", "instance", "option", "none"],
)
def test_nothing_is_left_in_memory_of_a_picture(small_pipeline, request_) -> None:
    """Not even until Python looks for rings: the pixels of a refused picture are many megabytes."""
    row, headers = ({"body": request_}, {}) if isinstance(request_, bytes) else request_
    ask(small_pipeline, request_)
    gc.collect()
    gc.disable()
    try:
        job = small_pipeline.read(row, headers)
        small_pipeline.infer([job])
        small_pipeline.respond(job)
        left = [weakref.ref(item) for item in job.items] + [weakref.ref(job)]
        del job
        assert [kept() for kept in left] == [None] * len(left)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", sorted({kind.__name__ for kind in KINDS}))
def test_requests_are_http(kind: str) -> None:
    (make,) = {made for made in KINDS if made.__name__ == kind}
    for number in range(20):
        made = make(Random(number), [drawn_picture()])
        head, _, body = made.wire("abc").partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0].startswith(b"POST /") and lines[0].endswith(b" HTTP/1.1") and lines[0].count(b" ") == 2
        assert lines[2] == b"Authorization: Bearer abc"
        assert lines[-1] == b"Content-Length: %d" % len(body)
        assert all(b": " in line for line in lines[1:])


@pytest.mark.parametrize(
    ("content_type", "status", "body", "right"),
    [
        ("image/jpeg", 200, b"", True),
        ("image/jpeg", 400, b'{"code": 400, "type": "InvalidImage", "message": "torn"}', True),
        ("image/jpeg", 400, b"torn", False),
        ("image/jpeg", 400, b'{"code": 415, "type": "InvalidImage", "message": "torn"}', False),
        ("image/jpeg", 500, b'{"code": 500, "type": "ModelFailure", "message": "no"}', False),
        ("image/jpeg", 507, b'{"code": 507, "type": "InternalServerException", "message": "Worker died."}', False),
        ("image/jpeg", 500, b'{"code": 500, "type": "ErrorDataDecoderException", "message": "no"}', False),
        ("multipart/form-data", 500, b'{"code": 500, "type": "ErrorDataDecoderException", "message": "no"}', True),
        ("multipart/form-data", 500, b'{"code": 500, "type": "InternalServerException", "message": "no"}', False),
    ],
)
def test_which_answers_are_right(content_type: str, status: int, body: bytes, right: bool) -> None:
    assert (judge(http_ask("any", b"", content_type), status, body)[1] is None) == right


@pytest.mark.parametrize(
    ("course", "grown"),
    [([100], 0.0), ([100, 102], 0.02), ([130, 100, 150, 101, 140], 0.01), ([100, 110, 120, 130], 0.2)],
)
def test_a_leak_is_told_from_what_comes_and_goes(course: list[int], grown: float) -> None:
    states = [[Held(1, "worker", size, 5), Held(2, "front", 7, 5)] for size in course]
    assert growth(states, "worker") == pytest.approx(grown)
    assert growth(states, "front") == 0
