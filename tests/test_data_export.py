"""`marina data export`, and that a set comes back as it went."""

import json
import resource

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_sets import coco_set, files_of, picture, yolo_set

from tools.cli import main
from tools.data.dataset import read_dataset
from tools.data.export import export
from tools.data.prepare import PrepareSettings, prepare
from tools.errors import ToolError

NAMES = ["it's a cat", 'dog "x": #1, é', "<b> & c", "no", "0"]
SIZES = [(64, 48), (641, 333), (37, 1023)]


def prepared(source, output, **settings):
    prepare(PrepareSettings(source=[source], output=output, **settings))
    return read_dataset(output)


@st.composite
def boxes_in_pixels(draw, width, height):
    x1, y1 = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
    return (
        draw(st.integers(0, len(NAMES) - 1)),
        x1,
        y1,
        draw(st.floats(x1 + 0.5, width)),
        draw(st.floats(y1 + 0.5, height)),
    )


def read_yolo(folder):
    """Boxes in pixels by picture, read without Marina."""
    names = yaml.safe_load((folder / "data.yaml").read_text())["names"]
    found = {}
    for file in folder.glob("*/labels/*.txt"):
        width, height = SIZES[int(file.stem)]
        found[file.stem] = sorted(
            (
                names[int(label)],
                (cx - w / 2) * width,
                (cy - h / 2) * height,
                (cx + w / 2) * width,
                (cy + h / 2) * height,
            )
            for label, cx, cy, w, h in (map(float, line.split()) for line in file.read_text().splitlines())
        )
    return found


@settings(max_examples=20)
@given(st.tuples(*(st.lists(boxes_in_pixels(*size), max_size=5) for size in SIZES)))
def test_yolo_to_ours_to_voc_to_coco_to_yolo_loses_and_moves_nothing(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("round")
    expected = {}
    for number, ((width, height), boxes) in enumerate(zip(SIZES, pictures, strict=True)):
        picture(folder / f"in/images/train/{number}.png", number, (width, height))
        lines = [
            f"{label} {(x1 + x2) / 2 / width!r} {(y1 + y2) / 2 / height!r} {(x2 - x1) / width!r} {(y2 - y1) / height!r}"
            for label, x1, y1, x2, y2 in boxes
        ]
        (folder / "in/labels/train").mkdir(parents=True, exist_ok=True)
        (folder / f"in/labels/train/{number}.txt").write_text("\n".join(lines))
        expected[str(number)] = sorted((NAMES[label], *corners) for label, *corners in boxes)
    (folder / "in/data.yaml").write_text(json.dumps({"train": "images/train", "names": NAMES}))

    prepared(folder / "in", folder / "ours", split=(0.34, 0.33, 0.33))
    export(folder / "ours", "voc", folder / "voc")
    dataset = prepared(folder / "voc", folder / "again")
    assert dataset.classes == tuple(NAMES) and dataset.splits.keys() == read_dataset(folder / "ours").splits.keys()
    export(folder / "again", "yolo", folder / "out")

    found = read_yolo(folder / "out")
    assert found.keys() == expected.keys()
    for stem, boxes in expected.items():
        assert [name for name, *_ in found[stem]] == [name for name, *_ in boxes]
        # Order within a class may change when corners are equal to the last digit, so compare the nearest.
        for name, *corners in boxes:
            near = min(
                max(abs(a - b) for a, b in zip(other, corners, strict=True)) for n, *other in found[stem] if n == name
            )
            assert near < 0.01


@pytest.fixture
def small_set(tmp_path):
    """Three pictures in two splits; one name in both, and a crowd region."""
    for split in ("train", "valid"):
        crowd = {"id": 9, "image_id": 1, "category_id": 1, "bbox": [0, 0, 60, 40], "iscrowd": 1}
        coco_set(
            tmp_path / "in" / split,
            [{"id": 1, "name": "cat"}],
            [(1, 1, [4, 5, 6.5, 7]), crowd] if split == "train" else [(1, 1, [1, 2, 3, 4])],
            count=1 + (split == "train"),
            seed=10 * (split == "train"),
        )
    prepared(tmp_path / "in", tmp_path / "set")
    return tmp_path / "set"


def test_yolo_export_has_relative_paths_and_an_empty_label_for_background(small_set, tmp_path, capsys):
    assert main(["data", "export", str(small_set), "--format", "yolo", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 crowd regions are left out" in printed and "3 pictures, 2 boxes" in printed
    files = files_of(tmp_path / "out")
    assert sorted(files) == [
        "data.yaml",
        *(f"train/images/p{number}.jpg" for number in (1, 2)),
        *(f"train/labels/p{number}.txt" for number in (1, 2)),
        "valid/images/p1.jpg",
        "valid/labels/p1.txt",
    ]
    content = yaml.safe_load(files["data.yaml"])
    assert content == {"train": "train/images", "val": "valid/images", "nc": 1, "names": {0: "cat"}}
    assert len(files["train/labels/p1.txt"].splitlines()) == 1
    assert files["train/labels/p2.txt"] == b"" and files["valid/labels/p1.txt"].startswith(b"0 0.03906250 0.0833")
    assert files["train/images/p1.jpg"] == (small_set / "train/p1.jpg").read_bytes()


def test_voc_export_tells_pictures_of_one_name_in_two_splits_apart(small_set, tmp_path):
    assert export(small_set, "voc", tmp_path / "out") == (3, 2, 1)
    files = files_of(tmp_path / "out")
    assert files["ImageSets/Main/train.txt"] == b"p1\np2\n" and files["ImageSets/Main/val.txt"] == b"valid_p1\n"
    assert b"<xmin>4</xmin><ymin>5</ymin><xmax>10.5</xmax><ymax>12</ymax>" in files["Annotations/p1.xml"]
    assert files["classes.txt"] == b"cat\n"
    again = prepared(tmp_path / "out", tmp_path / "again")
    assert [len(again.split(split)) for split in ("train", "valid")] == [2, 1]


def test_an_export_replaces_only_an_export_and_only_when_asked(small_set, tmp_path, capsys):
    command = ["data", "export", str(small_set), "--format", "yolo", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    before = files_of(tmp_path / "out")
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "give --replace" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out"), "--replace"]) == 0
    assert files_of(tmp_path / "out") == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").touch()
    for place, message in ((tmp_path / "own", "not made by Marina"), (small_set, "would overwrite the data set")):
        kept = files_of(place)
        assert main([*command, str(place), "--replace"]) == 1
        assert message in capsys.readouterr().err and files_of(place) == kept


def test_what_is_no_set_or_lacks_a_picture_is_one_clear_error(small_set, tmp_path):
    with pytest.raises(ToolError, match="is no prepared data set"):
        export(tmp_path / "in", "yolo", tmp_path / "out")
    (small_set / "valid/p1.jpg").unlink()
    with pytest.raises(ToolError, match=r"valid/p1\.jpg is missing; prepare the data set again"):
        export(small_set, "yolo", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


def test_a_full_disk_leaves_no_half_export(small_set, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ToolError, match="the disk is full"):
            export(small_set, "voc", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


def test_a_yolo_export_can_be_read_in_again(tmp_path):
    first = prepared(yolo_set(tmp_path / "in", {"train": 3, "val": 2, "test": 1}), tmp_path / "set")
    export(tmp_path / "set", "yolo", tmp_path / "out")
    again = prepared(tmp_path / "out", tmp_path / "again")
    for split, pictures in first.splits.items():
        assert [(item.name, item.boxes) for item in again.split(split)] == [
            (item.name, item.boxes) for item in pictures
        ]
