"""COCO object detection (cocodataset.org, "Data format"), and Roboflow's and our own one file a split.

Category ids may have gaps; classes are in the order of the categories. Boxes are x y width height in pixels.
The split comes from the name of the file (`instances_val2017.json`) or of its folder.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tools.data.dataset import ANNOTATIONS
from tools.data.formats.source import (
    SPLIT_NAMES,
    Label,
    Problem,
    ReadOptions,
    Source,
    SourcePicture,
    cut,
    pictures_below,
    relative_name,
    split_of,
    tidy,
)
from tools.errors import ToolError

# The names of cocodataset.org are COCO whatever is in them; others only when they look like it.
PATTERNS = "annotations/instances_*.json", "annotations/*.json", "instances*.json", "*.json"


def find_files(folder: Path) -> list[Path]:
    """The annotation files of a set: Roboflow's names, else those in `annotations` and in the folder itself."""
    own = [*folder.glob(ANNOTATIONS), *folder.glob(f"*/{ANNOTATIONS}")]
    if own:
        return sorted(own)
    for pattern in PATTERNS:
        found = [path for path in sorted(folder.glob(pattern)) if "instances" in pattern or looks_like_coco(path)]
        if found:
            return found
    return []


def first_fault(path: Path) -> str | None:
    """What is wrong with the file, or with the first JSON file of a folder; None where there is none."""
    files = [file for pattern in PATTERNS for file in sorted(path.glob(pattern))] if path.is_dir() else [path]
    try:
        for file in files:
            if file.suffix.lower() == ".json":
                _document(file)
    except ToolError as error:
        return str(error)
    return None


def looks_like_coco(path: Path) -> bool:
    """By its text, so that a large file of another kind need not be parsed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    return text.lstrip().startswith("{") and all(f'"{key}"' in text for key in ("images", "annotations", "categories"))


def read(path: Path, options: ReadOptions) -> Source:
    """`path`: a folder, or one annotation file. Raises ToolError for a file that is no COCO."""
    folder, files = (path, find_files(path)) if path.is_dir() else (path.parent, [path])
    if not files:
        raise ToolError(first_fault(path) or f"{path} has no COCO annotation file; give another folder or --format")
    documents = [(file, _document(file)) for file in files]
    dummy = _dummy([document for _, document in documents])
    reader = _Reader(folder, options, dummy)
    classes: dict[str, None] = {}
    pictures: list[SourcePicture] = []
    for file, document in documents:
        names = reader.class_names(file, document)
        classes.update(dict.fromkeys(names.values()))
        found = list(reader.pictures(file, document, names))
        if not found:
            reader.notes.append(
                f"split {_split(file, folder) or 'of ' + file.name} is empty: {file.name} has no picture that is there"
            )
        pictures += found
    if not classes or not pictures:
        raise ToolError(f"{path} has {'no category' if not classes else 'none of its pictures'}; see --images")
    reader.unlisted(pictures)
    if dummy:
        reader.notes.append(f"category 0 ({dummy}) has no boxes and only groups the others; it is no class")
    return Source("coco", tuple(classes), pictures, reader.problems, reader.notes)


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(document, dict):
            raise ValueError(f"it holds {type(document).__name__}, not an object")
        for key in ("images", "annotations", "categories"):
            entries = document.get(key)
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"`{key}` is {'no list of objects' if key in document else 'missing'}")
    except (OSError, ValueError, RecursionError) as error:
        raise ToolError(f"{file} is no COCO object detection file: {error}") from error
    return document


def _dummy(documents: list[dict[str, Any]]) -> str | None:
    """The name of category 0 where it only groups the others, as Roboflow writes it: nothing is labelled with it."""
    if any(entry.get("category_id") == 0 for document in documents for entry in document["annotations"]):
        return None
    categories = [entry for document in documents for entry in document["categories"]]
    name = next((entry.get("name") for entry in categories if entry.get("id") == 0), None)
    others = [entry for entry in categories if entry.get("id") != 0]
    groups = any(entry.get("supercategory") == name for entry in others)
    alone = any(entry.get("id") == 0 and entry.get("supercategory") == "none" for entry in categories)
    return str(name) if name is not None and others and (groups or alone) else None


@dataclass
class _Reader:
    root: Path
    options: ReadOptions
    dummy: str | None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def class_names(self, file: Path, document: dict[str, Any]) -> dict[int, str]:
        names: dict[int, str] = {}
        for entry in document["categories"]:
            index, name = entry.get("id"), tidy(entry.get("name", ""))
            if not isinstance(index, int) or not name or index in names:
                raise ToolError(f"{file}: category {cut(entry)} has no id of its own and name; mend it")
            if index or not self.dummy:
                names[index] = name
        return names

    def pictures(self, file: Path, document: dict[str, Any], names: dict[int, str]) -> Iterator[SourcePicture]:
        labels: dict[Any, list[Label]] = {}
        unreadable: Counter[Any] = Counter()
        for number, entry in enumerate(document["images"]):
            if not isinstance(entry.get("id"), int | str) or entry["id"] in labels:
                raise ToolError(f"{file}: images[{number}] has no id of its own, so no box is surely its; mend it")
            labels[entry["id"]] = []
        for number, entry in enumerate(document["annotations"]):
            where = f"{relative_name(file, self.root)}: annotation {cut(entry.get('id', number))}"
            image = None
            try:
                image = _image_id(entry, labels)
                labels[image].append(_label(entry, names, where))
            except (ValueError, OverflowError) as error:
                unreadable[image] += 1
                self.problems.append(Problem("dropped", where, str(error), boxes=1))
        folders = self._folders(file)
        owners: dict[Path, Any] = {}
        for entry in document["images"]:
            boxes = tuple(labels[entry["id"]])
            try:
                found = _find(str(entry.get("file_name", "")).replace("\\", "/"), folders)
                if owners.setdefault(found, entry["id"]) != entry["id"]:
                    raise ValueError(f"{self._name(found)} is the picture of image {cut(owners[found])} already")
            except ValueError as error:
                where = f"{relative_name(file, self.root)}: image {cut(entry['id'])}"
                self.problems.append(Problem("dropped", where, str(error), 1, len(boxes)))
                continue
            yield SourcePicture(
                found, self._name(found), _split(file, self.root), boxes, _size(entry), unreadable[entry["id"]]
            )

    def _name(self, picture: Path) -> str:
        return relative_name(picture, self.options.images or self.root)

    def _folders(self, file: Path) -> list[Path]:
        """Where the pictures of an annotation file may lie; `train2017` comes out of `instances_train2017`."""
        if self.options.images:
            return [self.options.images]
        bases = [file.parent, file.parent / "images", self.root, self.root / "images"]
        ends = ["", *re.split("[^A-Za-z0-9-]+", file.stem), _split(file, self.root) or ""]
        return [folder for base in dict.fromkeys(bases) for end in ends if (folder := base / end).is_dir()]

    def unlisted(self, pictures: list[SourcePicture]) -> None:
        """Pictures beside those that are listed."""
        used = {picture.file for picture in pictures}
        for folder in sorted({path.parent for path in used}):
            for path in pictures_below(folder):
                if path not in used and path.parent == folder:
                    reason = "not listed in the annotation file"
                    self.problems.append(Problem("left out", self._name(path), reason, pictures=1))


def _find(name: str, folders: list[Path]) -> Path:
    """The picture, by its path in one of the folders, else by its name alone. Raises ValueError.

    A path that leads outside is not followed; a picture of that name may still lie inside.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts
    ends = [path.name] if outside else [name, path.name]
    places = (folder / end for end in ends for folder in folders if path.name)
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        raise ValueError(f"file_name {cut(name)!r} {'leads outside of its folder' if outside else 'is not there'}")
    return found


def _image_id(entry: dict[str, Any], known: dict[Any, list[Label]]) -> Any:
    index = entry.get("image_id")
    if not isinstance(index, int | str) or index not in known:
        raise ValueError(f"image_id {cut(index)} is no image of the file")
    return index


def _label(entry: dict[str, Any], names: dict[int, str], where: str) -> Label:
    index, box = entry.get("category_id"), entry.get("bbox")
    if not isinstance(index, int) or index not in names:
        raise ValueError(f"category_id {cut(index)} is no category of the file")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise ValueError(f"bbox {cut(box)} is not four numbers")
    x, y, width, height = (float(value) for value in box)
    return Label(names[index], (x, y, x + width, y + height), "pixel_xyxy", where, bool(entry.get("iscrowd", 0)))


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) and width > 0 < height else None


def _split(file: Path, root: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.stem.lower())
    named = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)
    return named or split_of(relative_name(file.parent, root))
