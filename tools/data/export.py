"""A data set in Marina's layout to YOLO or Pascal VOC, for programs that want those."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape

from tools.data.dataset import Dataset, Picture, read_dataset
from tools.data.write import replacing_folder
from tools.errors import ToolError
from tools.progress import Progress

YAML, CLASSES = "data.yaml", "classes.txt"
YOLO_SPLITS = {"train": "train", "valid": "val", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", type=Path, help="a folder that `marina data prepare` made")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--replace", action="store_true", help="put the new export in the place of another one")


def run(args: argparse.Namespace) -> int:
    pictures, boxes, crowds = export(args.set, args.format, args.output, overwrite=args.replace)
    if crowds:
        print(f"note: {crowds} crowd regions are left out, since {args.format} cannot tell them from single objects")
    print(f"{args.output}: {pictures} pictures, {boxes} boxes")
    return 0


def export(folder: Path, format_name: str, output: Path, *, overwrite: bool = False) -> tuple[int, int, int]:
    """Writes `output`, at once or not at all: pictures and boxes written, and crowd regions left out.

    Raises ToolError when the set cannot be read, or `output` holds something else or cannot be written.
    """
    dataset = read_dataset(folder)
    writer, marker = FORMATS[format_name]
    if folder.resolve().is_relative_to(output.resolve()):
        raise ToolError(f"--output {output} would overwrite the data set {folder}; choose another folder")
    boxes = [box for pictures in dataset.splits.values() for picture in pictures for box in picture.boxes]
    total, crowds = sum(map(len, dataset.splits.values())), sum(box.crowd for box in boxes)
    dataset = replace(
        dataset, splits={split: [_without_crowds(one) for one in found] for split, found in dataset.splits.items()}
    )
    with replacing_folder(output, marker, replace=overwrite) as made, Progress("export", total, "pictures") as progress:
        for picture, copy in writer(dataset, made):
            try:
                shutil.copyfile(picture.file, copy)
            except FileNotFoundError as error:
                raise ToolError(f"{picture.file} is missing; prepare the data set again") from error
            progress.advance()
    return total, len(boxes) - crowds, crowds


def _without_crowds(picture: Picture) -> Picture:
    return replace(picture, boxes=tuple(box for box in picture.boxes if not box.crowd))


def _yolo(dataset: Dataset, folder: Path) -> Iterator[tuple[Picture, Path]]:
    """`<split>/images`, `<split>/labels` and a data.yaml with paths relative to itself."""
    for split, pictures in dataset.splits.items():
        images, labels = folder / split / "images", folder / split / "labels"
        images.mkdir(parents=True)
        labels.mkdir()
        for picture, name in _named(pictures, split, set()):
            lines = [_yolo_line(picture, number) for number in range(len(picture.boxes))]
            (labels / f"{PurePosixPath(name).stem}.txt").write_text("".join(lines), encoding="utf-8")
            yield picture, images / name
    lines = [f"{YOLO_SPLITS[split]}: {split}/images" for split in dataset.splits]
    # JSON is YAML, and quotes whatever a name may hold.
    names = [f"  {index}: {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(dataset.classes)]
    content = "\n".join([*lines, f"nc: {len(names)}", "names:", *names, ""])
    (folder / YAML).write_text(content, encoding="utf-8")


def _yolo_line(picture: Picture, number: int) -> str:
    box = picture.boxes[number]
    cx, cy = (box.x1 + box.x2) / 2 / picture.width, (box.y1 + box.y2) / 2 / picture.height
    width, height = (box.x2 - box.x1) / picture.width, (box.y2 - box.y1) / picture.height
    return f"{box.label} {cx:.8f} {cy:.8f} {width:.8f} {height:.8f}\n"


def _voc(dataset: Dataset, folder: Path) -> Iterator[tuple[Picture, Path]]:
    """`JPEGImages`, `Annotations`, `ImageSets/Main` and a classes.txt, which keeps the order of the classes."""
    images, labels, sets = folder / "JPEGImages", folder / "Annotations", folder / "ImageSets" / "Main"
    for place in (images, labels, sets):
        place.mkdir(parents=True)
    taken: set[str] = set()
    for split, pictures in dataset.splits.items():
        stems = []
        for picture, name in _named(pictures, split, taken):
            stems.append(PurePosixPath(name).stem)
            (labels / f"{stems[-1]}.xml").write_text(_voc_xml(dataset, picture, name), encoding="utf-8")
            yield picture, images / name
        (sets / f"{YOLO_SPLITS[split]}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in dataset.classes), encoding="utf-8")


def _voc_xml(dataset: Dataset, picture: Picture, name: str) -> str:
    lines = [
        "<annotation>",
        f"  <folder>JPEGImages</folder>\n  <filename>{escape(name)}</filename>",
        f"  <size><width>{picture.width}</width><height>{picture.height}</height><depth>3</depth></size>",
    ]
    for box in picture.boxes:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box.xyxy, strict=True)
        bndbox = "".join(f"<{corner}>{_plain(value)}</{corner}>" for corner, value in corners)
        lines.append(f"  <object><name>{escape(dataset.classes[box.label])}</name><difficult>0</difficult>")
        lines.append(f"    <bndbox>{bndbox}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])


def _plain(value: float) -> str:
    """Whole numbers without a point, since some readers of VOC take no other."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _named(pictures: Sequence[Picture], split: str, taken: set[str]) -> Iterator[tuple[Picture, str]]:
    """Every picture and a name whose stem no other has, since labels are named after it."""
    for picture in pictures:
        name, number = picture.name, 0
        while PurePosixPath(name).stem.casefold() in taken:
            number += 1
            name = f"{split}_{picture.name}" if number == 1 else f"{split}{number}_{picture.name}"
        taken.add(PurePosixPath(name).stem.casefold())
        yield picture, name


Writer = Callable[[Dataset, Path], Iterator[tuple[Picture, Path]]]
FORMATS: dict[str, tuple[Writer, str]] = {"yolo": (_yolo, YAML), "voc": (_voc, CLASSES)}
