"""A prepared data set of drawn shapes, and trainings on it that take seconds."""

import csv
import json
from pathlib import Path
from typing import Any

from numpy.random import default_rng

from tools.data.dataset import ANNOTATIONS, INFO, Box, Picture, coco_document
from tools.data.draw import CLASSES, draw_scene

SHORT = "--size 64 --batch 4 --epochs 2 --workers 0 --devices cpu"


def write_set(folder: Path, train: int = 10, valid: int = 4, width: int = 96, height: int = 72) -> Path:
    folder.mkdir()
    (folder / INFO).write_text(json.dumps({"classes": CLASSES}))
    for split, count, seed in (("train", train, 1), ("valid", valid, 2)):
        rng = default_rng(seed)
        (folder / split).mkdir()
        pictures = []
        for number in range(count):
            image, shapes = draw_scene(rng, width, height, most_shapes=3)
            file = folder / split / f"{number}.png"
            image.save(file)
            boxes = tuple(Box(CLASSES.index(shape.label), *map(float, shape.box)) for shape in shapes)
            pictures.append(Picture(file, file.name, width, height, boxes))
        (folder / split / ANNOTATIONS).write_text(json.dumps(coco_document(pictures, CLASSES)))
    return folder


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What `results.csv` says, without what depends on the machine."""
    with (run / "results.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
