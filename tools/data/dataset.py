"""A labelled data set: pictures, boxes, classes, splits; and the one layout that Marina keeps them in.

    <folder>/dataset.json                     classes, counts, and how the set was made
    <folder>/<split>/_annotations.coco.json   COCO, one file a split, beside its pictures
    <folder>/<split>/<picture>

Splits are train, valid and test; one may be absent. In memory a label counts the classes from 0, in the file
`category_id` counts them from 1, as COCO does. Boxes are xyxy in pixels of the upright picture.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.errors import ToolError

SPLITS = ("train", "valid", "test")
ANNOTATIONS = "_annotations.coco.json"
INFO = "dataset.json"


@dataclass(frozen=True, slots=True)
class Box:
    """label: index into the classes. x1 y1 x2 y2: pixels of the upright picture, x2 and y2 exclusive.

    crowd: a region of many objects, COCO's `iscrowd`; not trained on, and no false alarm when something in it
    is found.
    """

    label: int
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2


@dataclass(frozen=True, slots=True)
class Picture:
    """file: where it lies. name: how its split calls it. width, height: upright, in pixels. A picture without
    boxes is background."""

    file: Path
    name: str
    width: int
    height: int
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Dataset:
    folder: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Picture]]

    def split(self, name: str) -> Sequence[Picture]:
        """Raises ToolError for a split that is absent or empty."""
        pictures = self.splits.get(name)
        if not pictures:
            there = ", ".join(split for split, found in self.splits.items() if found) or "none"
            raise ToolError(f"data set {self.folder} has no pictures in split {name!r}; it has: {there}")
        return pictures


def read_dataset(folder: Path) -> Dataset:
    """A set in Marina's layout. Raises ToolError, naming the file, for anything else."""
    if not (folder / INFO).is_file():
        raise ToolError(
            f"{folder} holds no {INFO}, so it is no prepared data set; make one with:"
            f" marina data prepare --source {folder} --output DIR"
        )
    classes = tuple(_content(folder / INFO)["classes"])
    splits = {
        split: _read_split(folder / split, classes) for split in SPLITS if (folder / split / ANNOTATIONS).is_file()
    }
    return Dataset(folder, classes, splits)


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolError(f"{path} cannot be read ({error}); prepare the data set again") from error


def _read_split(folder: Path, classes: Sequence[str]) -> list[Picture]:
    content = _content(folder / ANNOTATIONS)
    try:
        if tuple(category["name"] for category in content["categories"]) != tuple(classes):
            raise ToolError(f"{folder / ANNOTATIONS} names other classes than {INFO}; prepare the data set again")
        boxes: dict[int, list[Box]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            label, crowd = annotation["category_id"] - 1, bool(annotation.get("iscrowd", 0))
            if not 0 <= label < len(classes):
                raise ValueError(f"category_id {label + 1}")
            boxes[annotation["image_id"]].append(Box(label, x, y, x + width, y + height, crowd))
        return [
            Picture(
                folder / image["file_name"],
                image["file_name"],
                image["width"],
                image["height"],
                tuple(boxes[image["id"]]),
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ToolError(
            f"{folder / ANNOTATIONS} is not as Marina writes it ({error!r}); prepare the data set again"
        ) from error


def coco_document(pictures: Sequence[Picture], classes: Sequence[str]) -> dict[str, Any]:
    """The content of a split's `_annotations.coco.json`; ids count from 1 in the order given."""
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(pictures, start=1):
        for box in picture.boxes:
            width, height = box.x2 - box.x1, box.y2 - box.y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": box.label + 1,
                    "bbox": [box.x1, box.y1, width, height],
                    "area": width * height,
                    "iscrowd": int(box.crowd),
                }
            )
    return {
        "images": [
            {"id": index, "file_name": picture.name, "width": picture.width, "height": picture.height}
            for index, picture in enumerate(pictures, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(classes, start=1)],
    }
