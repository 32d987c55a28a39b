"""Every option as text and as JSON, its limits, and what a refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folder import assert_one_line

from handlers.errors import InvalidOption
from handlers.options import ALLOWED, Options, parse_options
from handlers.settings import FORMATS

DEFAULTS = Options(0.25, 0.45, 300, False, None, "torchserve")
LABELS = ["__background__", "cat", "traffic light", "salt, pepper", "7"]


def parse(**given_options):
    return parse_options(given_options, DEFAULTS, LABELS)


def test_no_options_are_the_defaults():
    assert parse() == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("score_threshold", "0.4", 0.4), ("score_threshold", b" 0.4 ", 0.4), ("score_threshold", 0, 0.0),
        ("score_threshold", "1", 1.0), ("iou_threshold", 1, 1.0), ("iou_threshold", bytearray(b"5e-1"), 0.5),
        ("max_detections", "1", 1), ("max_detections", 1000, 1000), ("max_detections", " 7 ", 7),
        ("class_agnostic", "true", True), ("class_agnostic", b"FALSE", False), ("class_agnostic", "1", True),
        ("class_agnostic", "0", False), ("class_agnostic", True, True),
        ("classes", "cat", {1}), ("classes", "traffic light, cat", {1, 2}), ("classes", "1,2", {1, 2}),
        ("classes", "salt, pepper", {3}), ("classes", ["salt, pepper", 1], {1, 3}), ("classes", 2, {2}),
        ("classes", "7", {4}),  # a class named 7, where no index 7 exists
        ("classes", b"cat,cat", {1}),
        *(("format", form, form) for form in FORMATS), ("format", b"yolo", "yolo"),
    ],
)  # fmt: skip
def test_option_is_taken(name, value, expected):
    assert vars(parse(**{name: value})) == vars(DEFAULTS) | {name: expected}


FRACTIONS = "score_threshold", "iou_threshold"
NO_FRACTIONS = "2", "-0.1", "nan", "inf", "", "half", 1.01, -1, float("nan"), float("inf"), True, None, [0.5], 10**400

NO_COUNTS = "0", 0, 1001, "1001", "-1", "1.5", 1.0, "", "ten", True, None, [], "٣"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in FRACTIONS for value in NO_FRACTIONS),
        *(("max_detections", value) for value in NO_COUNTS),
        *(("class_agnostic", value) for value in ("yes", "", 1, 0, None, [], "2")),
        *(("format", value) for value in ("xml", "", "JSON", None, 1, [], {})),
        *(("classes", value) for value in ("", [], " ")),
    ],
)  # fmt: skip
def test_refusal_names_option_value_and_what_is_allowed(name, value):
    with pytest.raises(InvalidOption) as caught:
        parse(**{name: value})
    assert str(caught.value).startswith(f"{name} is ")
    assert str(caught.value).endswith(f"; allowed: {ALLOWED[name]}")
    if isinstance(value, str):
        assert value in str(caught.value)


@pytest.mark.parametrize("item", ["bird", "__background__", 0, "0", 5, -1, True, None, 1.5, {"a": 1}, "cat,,7", "²"])
def test_unknown_class_lists_the_known_ones(item):
    with pytest.raises(InvalidOption, match=r"unknown class .*knows 1 cat, 2 traffic light, 3 salt, pepper, 4 7$"):
        parse(classes=item if item == "cat,,7" else [item])


@pytest.mark.parametrize("name", ["threshold", "Score_Threshold", "", "x" * 5_000_000, "é\n"])
def test_unknown_option_lists_the_known_ones(name):
    with pytest.raises(InvalidOption) as caught:
        parse(**{name: "1"})
    assert str(caught.value).startswith("unknown option ")
    assert str(caught.value).endswith(", ".join(ALLOWED))
    assert len(str(caught.value)) < 300


def test_a_class_named_score_has_no_place_in_format_torchserve():
    with pytest.raises(InvalidOption, match="'score'"):
        parse_options({}, DEFAULTS, ["score"])
    assert parse_options({"format": "detections"}, DEFAULTS, ["score"]).format == "detections"


def test_a_value_of_many_parts_is_shown_in_part():
    wide = {name: {part: ["\U000f2da7" * 20] * 3 for part in "abcd"} for name in "abcd"}
    with pytest.raises(InvalidOption) as caught:
        parse(score_threshold=wide)
    assert_one_line(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from([*ALLOWED, "other"]), JSON | st.binary()))
def test_anything_is_taken_or_refused(options):
    try:
        found = parse(**options)
    except InvalidOption as error:
        assert_one_line(error)
    else:
        assert 0 <= found.score_threshold <= 1
        assert 0 <= found.iou_threshold <= 1
        assert 1 <= found.max_detections <= 1000
        assert found.classes is None or found.classes <= {1, 2, 3, 4}


def test_a_value_too_deep_to_show_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for name in ALLOWED:
        with pytest.raises(InvalidOption):
            parse(**{name: deep})
