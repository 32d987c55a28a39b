"""marina data show: what is in a data set, to look at: examples with their boxes, counts, sizes and positions."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.random import default_rng
from PIL import Image

from handlers.errors import MarinaError
from handlers.image import decode
from tools.checkpoint.safetensors_format import replacing
from tools.data.check import LIMITS
from tools.data.dataset import SPLITS, Dataset, Picture, read_dataset
from tools.data.write import check_place
from tools.errors import ToolError
from tools.progress import Progress

PAGE = "index.html"
COLUMNS = 4
CELL = 320  # pixels, the longer side of an example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", type=Path, metavar="SET", help="folder of a prepared data set")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write the page (default SET-show)")
    parser.add_argument("--pictures", type=int, default=24, metavar="N", help="examples of each split (default 24)")
    parser.add_argument("--split", choices=SPLITS, help="only this one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one shows other examples (default 0)")


def run(args: argparse.Namespace) -> int:
    if args.pictures < 1 or args.seed < 0:
        raise ToolError(f"--pictures {args.pictures} --seed {args.seed}: show at least one picture, with a seed from 0")
    dataset = read_dataset(args.set)
    folder = args.set.resolve()
    output = args.output or folder.with_name(f"{folder.name}-show")
    check_place(output, PAGE, replace=True)
    try:
        page = show_dataset(dataset, output, args.pictures, args.split, args.seed)
    except OSError as error:
        raise ToolError(f"{output} cannot be written ({error}); choose another --output") from error
    for split, pictures in dataset.splits.items():
        print(f"{split:5}  {len(pictures):,} pictures, {sum(len(picture.boxes) for picture in pictures):,} boxes")
    print(page)
    return 0


def show_dataset(dataset: Dataset, output: Path, examples: int, only: str | None, seed: int) -> Path:
    """Writes index.html and its pictures as PNG files to `output`, and returns the page.

    Raises ToolError for a split without pictures, and for a picture that cannot be read.
    """
    from tools.report.charts import box_statistics
    from tools.report.page import Page

    filled = [split for split, pictures in dataset.splits.items() if pictures]
    chosen = {split: dataset.split(split) for split in ([only] if only else filled)}
    if not chosen:
        raise ToolError(f"data set {dataset.folder} has no pictures in any split; prepare it again")
    page = Page(f"Data set {dataset.folder.resolve().name}")
    page.table(*_splits_table(dataset))
    page.table(*_classes_table(dataset))
    sheets: dict[str, bytes] = {}
    for split, pictures in chosen.items():
        rng = default_rng([seed, SPLITS.index(split)])
        picked = sorted(rng.choice(len(pictures), min(examples, len(pictures)), replace=False))
        page.heading(split)
        parts = {
            "examples": (_examples([pictures[index] for index in picked], dataset.classes, split), "Examples"),
            "boxes": (
                box_statistics(label_statistics(pictures, dataset.classes), dataset.classes),
                "Boxes: how many, where and how large, as shares of their pictures; crowd regions left out",
            ),
        }
        for name, (content, caption) in parts.items():
            sheets[f"{split}-{name}.png"] = content
            page.picture(content, caption)
    output.mkdir(parents=True, exist_ok=True)
    for sheet_name, content in sheets.items():
        with replacing(output / sheet_name) as file:
            file.write(content)
    page.write(output / PAGE)
    return output / PAGE


def label_statistics(pictures: Sequence[Picture], classes: Sequence[str]) -> np.ndarray:
    """`[N, 5]` of all boxes but crowd regions: label, centre x and y, width and height as shares of the picture.

    Raises ToolError for a label that is no index of `classes`.
    """
    rows = []
    for picture in pictures:
        for box in picture.boxes:
            if not 0 <= box.label < len(classes):
                raise ToolError(f"{picture.file} has category_id {box.label + 1}, but there are {len(classes)} classes")
            if not box.crowd:
                centre = (box.x1 + box.x2) / 2 / picture.width, (box.y1 + box.y2) / 2 / picture.height
                rows.append((box.label, *centre, (box.x2 - box.x1) / picture.width, (box.y2 - box.y1) / picture.height))
    return np.array(rows, dtype=float).reshape(-1, 5)


def _splits_table(dataset: Dataset) -> tuple[list[str], list[list[str | float | int]]]:
    rows: list[list[str | float | int]] = []
    for split, pictures in dataset.splits.items():
        boxes = [box for picture in pictures for box in picture.boxes]
        background = sum(not picture.boxes for picture in pictures)
        a_picture = len(boxes) / len(pictures) if pictures else 0.0
        rows.append([split, len(pictures), background, len(boxes), a_picture, sum(box.crowd for box in boxes)])
    return ["split", "pictures", "of these background", "boxes", "boxes a picture", "crowd regions"], rows


def _classes_table(dataset: Dataset) -> tuple[list[str], list[list[str | float | int]]]:
    counts = {
        split: np.bincount(
            label_statistics(pictures, dataset.classes)[:, 0].astype(int), minlength=len(dataset.classes)
        )
        for split, pictures in dataset.splits.items()
    }
    rows: list[list[str | float | int]] = [
        [name, *(int(found[label]) for found in counts.values()), int(sum(found[label] for found in counts.values()))]
        for label, name in enumerate(dataset.classes)
    ]
    return ["class", *counts, "boxes in all"], rows


def _examples(pictures: Sequence[Picture], classes: Sequence[str], split: str) -> bytes:
    from tools.report.boxes import sheet

    drawn = []
    with Progress(f"drawing examples of {split}", len(pictures), unit="pictures") as progress:
        for picture in pictures:
            count = len(picture.boxes)
            content = f"{count} box{'es' if count > 1 else ''}" if count else "background"
            drawn.append((_example(picture, classes), f"{picture.name}: {content}"))
            progress.advance()
    buffer = io.BytesIO()
    sheet(drawn, COLUMNS, CELL).save(buffer, "PNG")
    return buffer.getvalue()


def _example(picture: Picture, classes: Sequence[str]) -> Image.Image:
    """Scaled before the boxes are drawn, so that lines and names stay readable."""
    from tools.report.boxes import class_colour, draw_boxes, fit

    try:
        image = fit(Image.fromarray(decode(picture.file.read_bytes(), LIMITS)), CELL)
    except OSError as error:
        raise ToolError(f"{picture.file} cannot be read ({error.strerror}); prepare the data set again") from error
    except MarinaError as error:
        raise ToolError(f"{picture.file}: {error}; prepare the data set again") from error
    across, down = image.width / picture.width, image.height / picture.height
    boxes = sorted(picture.boxes, key=lambda box: (box.x2 - box.x1) * (box.y2 - box.y1))
    return draw_boxes(
        np.asarray(image),
        [(box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down) for box in boxes],
        [classes[box.label] + (" (crowd)" if box.crowd else "") for box in boxes],
        [class_colour(box.label) for box in boxes],
    )
