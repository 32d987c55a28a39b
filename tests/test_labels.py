"""index_to_name.json."""

import json

import pytest

from handlers.errors import BadSettings
from handlers.labels import check_background, load_labels


def write(tmp_path, content):
    path = tmp_path / "index_to_name.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_names_come_in_the_order_of_their_indices(tmp_path):
    names = [f"class {index} é" for index in range(12)]
    mapping = {str(index): names[index] for index in reversed(range(12))}
    assert load_labels(write(tmp_path, mapping)) == names
    assert load_labels(write(tmp_path, {"0": "x" * 256})) == ["x" * 256]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "must map indices to names"),
        ({}, "must map indices to names"),
        ({"1": "cat", "2": "dog"}, "has 2 names but no index '0'"),
        ({"0": "cat", "2": "dog"}, "has 2 names but no index '1'"),
        ({"0": "cat", "01": "dog"}, "has 2 names but no index '1'"),
        ({"0": "cat", "1": "cat"}, "0 and 1 are both named 'cat'"),
        *(({"0": name}, "index 0 is named") for name in ("", " ", "x" * 257, 7, None, ["a"], "a\nb", "a\0")),
    ],
)
def test_bad_labels_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(BadSettings, match=message) as caught:
        load_labels(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BadSettings, match=r"none\.json cannot be read"):
        load_labels(tmp_path / "none.json")


def test_background_is_there_exactly_where_the_model_counts_it():
    check_background(["__background__", "cat"], True, "fasterrcnn")
    check_background(["cat"], False, "yolov5")
    with pytest.raises(BadSettings, match="label 0 must be '__background__', not 'cat'"):
        check_background(["cat", "__background__"], True, "fasterrcnn")
    with pytest.raises(BadSettings, match="take '__background__' out"):
        check_background(["__background__", "cat"], False, "yolov5")
