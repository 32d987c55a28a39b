"""The one layout of a data set."""

import json
from pathlib import Path

import pytest

from tools.data.dataset import ANNOTATIONS, INFO, Box, Dataset, Picture, coco_document, read_dataset
from tools.errors import ToolError

CLASSES = ("cat", "it's a dog")


def write(folder: Path, **splits: list[Picture]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / INFO).write_text(json.dumps({"classes": CLASSES}))
    for split, pictures in splits.items():
        (folder / split).mkdir()
        (folder / split / ANNOTATIONS).write_text(json.dumps(coco_document(pictures, CLASSES)))


def pictures(folder: Path) -> list[Picture]:
    boxes = (Box(0, 0.0, 1.5, 10.25, 20.0), Box(1, 3.0, 4.0, 5.0, 6.0, crowd=True))
    return [Picture(folder / "a.jpg", "a.jpg", 64, 48, boxes), Picture(folder / "b.jpg", "b.jpg", 10, 20)]


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, train=pictures(tmp_path / "train"), valid=[])
    found = read_dataset(tmp_path)
    assert found == Dataset(tmp_path, CLASSES, {"train": pictures(tmp_path / "train"), "valid": []})
    assert found.split("train")[0].boxes[0].xyxy == (0.0, 1.5, 10.25, 20.0)


def test_the_file_is_coco(tmp_path):
    document = coco_document(pictures(tmp_path), CLASSES)
    assert [category["id"] for category in document["categories"]] == [1, 2]
    assert document["annotations"][1] | {"area": 0} == {
        "id": 2, "image_id": 1, "category_id": 2, "bbox": [3.0, 4.0, 2.0, 2.0], "area": 0, "iscrowd": 1,
    }  # fmt: skip
    assert document["annotations"][0]["area"] == 10.25 * 18.5


def test_an_empty_or_absent_split_is_named(tmp_path):
    write(tmp_path, train=pictures(tmp_path / "train"), valid=[])
    for split in ("valid", "test"):
        with pytest.raises(ToolError, match=f"no pictures in split '{split}'; it has: train"):
            read_dataset(tmp_path).split(split)


def test_a_folder_that_is_no_data_set_is_told_how_to_become_one(tmp_path):
    with pytest.raises(ToolError, match=r"holds no dataset\.json.*marina data prepare --source"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document["annotations"][0].pop("bbox"),
        lambda document: document["annotations"][0].update(image_id=99),
        lambda document: document["annotations"][0].update(category_id=0),
        lambda document: document["categories"].reverse(),
        lambda document: document.pop("images"),
    ],
)
def test_a_damaged_split_is_named(tmp_path, spoil):
    write(tmp_path, train=pictures(tmp_path / "train"))
    path = tmp_path / "train" / ANNOTATIONS
    document = json.loads(path.read_text())
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ToolError, match=r"_annotations\.coco\.json .*prepare the data set again"):
        read_dataset(tmp_path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / INFO).write_text("{")
    with pytest.raises(ToolError, match=r"dataset\.json cannot be read.*prepare the data set again"):
        read_dataset(tmp_path)
