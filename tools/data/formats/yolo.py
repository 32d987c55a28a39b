"""YOLO text labels: one `.txt` a picture, a line a box: class cx cy w h, in fractions of the picture.

Pictures and labels lie as `images/<split>` and `labels/<split>`, as `<split>/images` and `<split>/labels`, or
beside each other. `data.yaml` names classes and splits; without one, classes come from `classes.txt` or Label
Studio's `notes.json`, and splits from the names of folders. A line of a class and three or more points, as for
segmentation and oriented boxes, becomes the box around the points.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

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
    shown,
    split_of,
    tidy,
)
from tools.errors import ToolError

IMAGES, LABELS = "images", "labels"
NOT_LABELS = frozenset({"classes.txt", "labels.txt", "notes.txt", *(f"{name}.txt" for name in SPLIT_NAMES)})
MOST_YAML_BYTES = 10_000_000


def find_yaml(folder: Path) -> Path | None:
    """The file in `folder` that names classes and splits: `data.yaml`, or another with `names`."""
    others = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    named = [path for path in others if path.stem == "data"]
    return next((path for path in named or others if named or _has_names(path)), None)


def read(path: Path, options: ReadOptions) -> Source:
    """`path`: the folder, or its `data.yaml`. Raises ToolError when there is no picture or no class name to be had."""
    folder, file = (path, find_yaml(path)) if path.is_dir() else (path.parent, path)
    reader = _Reader(folder, options)
    content = _mapping(file) if file else {}
    reader.names = reader.class_names(file, content)
    if file and "download" in content:
        reader.notes.append(f"{file.name} has a `download:` entry, which was not executed")
    splits: list[tuple[str | None, list[Path]]] = list(reader.splits(file, content)) if file else []
    if not any(pictures for _, pictures in splits):
        if splits:
            reader.notes.append("no folder that data.yaml names is there; splits are read from the names of folders")
        splits = [(split_of(relative_name(found, folder)), [found]) for found in pictures_below(folder)]
    pictures = list(reader.pictures(splits))
    if not pictures or not reader.label_files:
        raise ToolError(f"{path} holds no pictures with YOLO labels; give the folder that holds images and labels")
    reader.leftovers({picture.file for picture in pictures} | reader.dropped)
    names = reader.names if reader.names is not None else {i: str(i) for i in sorted(reader.used)}
    if reader.names is None:
        reader.notes.append("there is no data.yaml with names and no classes.txt; classes are called by their numbers")
    return Source("yolo", tuple(dict.fromkeys(names.values())), pictures, reader.problems, reader.notes)


@dataclass
class _Reader:
    """root: what names in reports are relative to. names: of class ids; None where the source has no names."""

    root: Path
    options: ReadOptions
    names: Mapping[int, str] | None = None
    used: set[int] = field(default_factory=set)
    label_files: set[Path] = field(default_factory=set)
    dropped: set[Path] = field(default_factory=set)
    unlabelled: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def class_names(self, file: Path | None, content: Mapping[str, Any]) -> Mapping[int, str] | None:
        if file and "names" in content:
            names = _names_of(file, content["names"])
            if content.get("nc", str(len(names))) != str(len(names)):
                self.notes.append(
                    f"{file.name} says nc: {cut(content['nc'])} and names {len(names)} classes; the names count"
                )
            return self._checked(file, names)
        listed = self.root / "classes.txt"
        if listed.is_file():
            return self._checked(listed, dict(enumerate(read_lines(listed))))
        notes = self.root / "notes.json"
        if notes.is_file():
            try:
                categories = json.loads(notes.read_text(encoding="utf-8-sig"))["categories"]
                return self._checked(notes, {int(entry["id"]): tidy(entry["name"]) for entry in categories})
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise ToolError(f"{notes} cannot be read ({error!r}); remove it or write a classes.txt") from error
        return None

    def _checked(self, file: Path, names: dict[int, str]) -> dict[int, str]:
        if not names or not all(names.values()):
            blank = next((index for index, name in names.items() if not name), None)
            raise ToolError(
                f"{file} names {'no class' if blank is None else f'class {blank} with nothing'}; complete it"
            )
        if len(set(names.values())) < len(names):
            self.notes.append(f"{file.name} gives one name to several classes; they are read as one class")
        return names

    def splits(self, file: Path, content: Mapping[str, Any]) -> Iterator[tuple[str | None, list[Path]]]:
        """Every split that a data.yaml names, and its pictures."""
        base = file.parent
        if path := content.get("path"):
            if isinstance(path, str) and (base / path).is_dir():
                base = base / path
            else:
                self.notes.append(f"{file.name} says path: {cut(path)}, which is not there; its own folder is taken")
        for key, value in content.items():
            if key not in SPLIT_NAMES or not value:
                continue
            found: list[Path] = []
            for entry in value if isinstance(value, list) else [value]:
                place = self._resolve(entry, base, file.parent) if isinstance(entry, str) else None
                if place is None:
                    self.notes.append(f"{file.name} says {key}: {cut(entry)}, which is not there")
                elif place.is_file():
                    found += self._listed(place)
                else:
                    found += pictures_below(place)
            if not found:
                self.notes.append(f"split {SPLIT_NAMES[key]} is empty: {file.name} names no picture for {key}")
            yield SPLIT_NAMES[key], found

    def _resolve(self, entry: str, *folders: Path) -> Path | None:
        """`entry` in the first folder that has it; with its `..` taken off too, since Roboflow writes
        `../train/images` for what lies beside the file."""
        parts = PurePath(entry.replace("\\", "/")).parts
        plain = PurePath(*[part for part in parts if part != ".."])
        candidates = [Path(os.path.normpath(folder / text)) for folder in folders for text in (entry, plain)]
        return next((path for path in candidates if os.path.exists(path) and self._allowed(path)), None)

    def _allowed(self, path: Path) -> bool:
        return self.options.inside is None or path.resolve().is_relative_to(self.options.inside.resolve())

    def _listed(self, file: Path) -> list[Path]:
        """The pictures that a text file names, one a line, relative to the file."""
        found = []
        for number, line in enumerate(read_lines(file), start=1):
            path = self._resolve(line, file.parent, self.root) if line else None
            if path is not None and path.is_file():
                found.append(path)
            elif line:
                where = f"{relative_name(file, self.root)}:{number}"
                self.problems.append(Problem("dropped", where, f"names {cut(line)}, which is not there", pictures=1))
        return found

    def pictures(self, splits: Sequence[tuple[str | None, list[Path]]]) -> Iterator[SourcePicture]:
        for split, files in splits:
            for file in files:
                before = len(self.problems)
                labels = tuple(self._labels(file))
                if file not in self.dropped:
                    name = relative_name(file, self.root)
                    yield SourcePicture(file, name, split, labels, unreadable=len(self.problems) - before)
        if self.unlabelled:
            self.notes.append(f"{self.unlabelled} pictures have no label file; they are kept as background")

    def _labels(self, picture: Path) -> Iterator[Label]:
        candidates = (folder / f"{picture.stem}.txt" for folder in _label_folders(picture))
        file = next((path for path in candidates if path.is_file() and not _is_no_label(path)), None)
        if file is None:
            self.unlabelled += 1
            return
        self.label_files.add(file)
        where = relative_name(file, self.root)
        lines = _lines(file)
        if lines is None:
            self.dropped.add(picture)
            reason = "label file is no UTF-8 text; its picture is dropped too"
            self.problems.append(Problem("dropped", where, reason, 1, 1))
        for number, line in enumerate(lines or [], start=1):
            if not line:
                continue
            where = f"{relative_name(file, self.root)}:{number}"
            try:
                index, box = _parse(line)
                yield Label(self._name_of(index), box, "fraction_cxcywh", where)
            except ValueError as error:
                self.problems.append(Problem("dropped", where, str(error), boxes=1))

    def _name_of(self, index: int) -> str:
        if self.names is None and index >= 0:
            self.used.add(index)
            return str(index)
        if self.names is None or index not in self.names:
            known = shown((self.names or {}).values())
            raise ValueError(f"class {cut(index)} is out of range; there are {len(self.names or {})} classes: {known}")
        return self.names[index]

    def leftovers(self, used: set[Path]) -> None:
        """Labels whose picture is missing, and pictures that no split has."""
        there = pictures_below(self.root)
        for path in there:
            if path not in used:
                name = relative_name(path, self.root)
                self.problems.append(Problem("left out", name, "in no split that data.yaml names", pictures=1))
        labelled = {place / path.stem for path in [*there, *used] for place in _label_folders(path)}
        folders = {file.parent for file in self.label_files}
        for file in sorted(self.root.rglob("*.txt")):
            in_place = file.parent in folders or LABELS in file.relative_to(self.root).parts
            if in_place and file.with_suffix("") not in labelled and not _is_no_label(file):
                where = relative_name(file, self.root)
                boxes = sum(bool(line) for line in _lines(file) or [])
                self.problems.append(Problem("dropped", where, "label file without a picture", boxes=boxes))


def _lines(file: Path) -> list[str] | None:
    """None for a file that is no text."""
    try:
        return read_lines(file)
    except ToolError:
        return None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the blanks around them and without blank lines at the end.

    Raises ToolError for a file that is not UTF-8 text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"{path} cannot be read as UTF-8 text ({error})") from error


def _has_names(path: Path) -> bool:
    content = _read_yaml(path)
    return isinstance(content, dict) and "names" in content


def _mapping(path: Path) -> dict[str, Any]:
    content = _read_yaml(path)
    if not isinstance(content, dict):
        what = "is empty" if not content else f"holds {cut(content)}"
        raise ToolError(f"{path} {what}; it must hold a mapping with `names` and the folders of `train` and `val`")
    return content


def _read_yaml(path: Path) -> Any:
    try:
        if path.stat().st_size > MOST_YAML_BYTES:
            raise ToolError(f"{path} has more than {MOST_YAML_BYTES:,} bytes, which no data.yaml needs")
        # Every scalar as it is written: to YAML the names `no`, `on` and `1e3` are no text. It makes no objects.
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)  # noqa: S506  # it makes nothing but texts, lists and mappings
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ToolError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _names_of(file: Path, value: Any) -> dict[int, str]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    try:
        return {int(index): _text(name) for index, name in items}
    except (TypeError, ValueError) as error:
        raise ToolError(
            f"{file}: names must be a list, or a mapping of class ids to names ({cut(str(error))})"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{cut(value)} is no name")
    return tidy(value)


def _parse(line: str) -> tuple[int, tuple[float, float, float, float]]:
    """Class and cx cy w h. Raises ValueError with the reason."""
    columns = line.split()
    try:
        number, *values = [float(column) for column in columns]
    except ValueError as error:
        raise ValueError(f"not five numbers: {cut(line)}") from error
    if not number.is_integer():
        raise ValueError(f"class {cut(columns[0])} is no whole number")
    if len(values) == 4:
        return int(number), (values[0], values[1], values[2], values[3])
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(columns)} columns where five belong: {cut(line)}")
    left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
    return int(number), ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)


def _label_folders(picture: Path) -> list[Path]:
    """Where the label of a picture may lie: in `labels` when the picture is in `images`, else beside it."""
    parts = picture.parent.parts
    if IMAGES not in parts:
        return [picture.parent]
    at = len(parts) - 1 - parts[::-1].index(IMAGES)
    return [Path(*parts[:at], LABELS, *parts[at + 1 :]), picture.parent]


def _is_no_label(file: Path) -> bool:
    return file.name.lower() in NOT_LABELS or file.name.lower().startswith("readme")
