"""Pascal VOC: one XML file a picture, as written by the VOC2012 development kit, LabelImg and Roboflow.

Corners are taken as they stand: a box is xmin to xmax in pixels, without a shift by one. Splits come from
`ImageSets/Main/<split>.txt`, else `<split>.txt` beside `Annotations`, else the names of folders. Classes come from
`classes.txt`, else they are the names found, sorted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from tools.data.formats.source import (
    PICTURE_SUFFIXES,
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
from tools.data.formats.yolo import read_lines
from tools.errors import ToolError

MOST_BYTES = 20_000_000
CORNERS = "xmin", "ymin", "xmax", "ymax"


def read(folder: Path, options: ReadOptions) -> Source:
    """Raises ToolError when no picture is found."""
    reader = _Reader(folder, options)
    pictures = list(reader.pictures())
    if not reader.label_files:
        raise ToolError(f"{folder} has no XML label file of Pascal VOC; give another folder or --format")
    if not pictures:
        raise ToolError(f"{folder} has XML labels and none of their pictures; say where those lie with --images")
    classes_file = folder / "classes.txt"
    listed = [tidy(name) for name in read_lines(classes_file) if name] if classes_file.is_file() else []
    classes = tuple(dict.fromkeys([*listed, *sorted(reader.names)]))
    unknown = classes[len(set(listed)) :]
    if listed and unknown:
        reader.notes.append(f"classes.txt lacks {shown(unknown, most=20)}; added after its own")
    return Source("voc", classes, pictures, reader.problems, reader.notes)


@dataclass
class _Reader:
    root: Path
    options: ReadOptions
    names: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    label_files: int = 0

    def pictures(self) -> Iterator[SourcePicture]:
        """Every picture with its labels, those without an XML file as background."""
        there = pictures_below(self.options.images or self.root)
        by_stem: dict[str, list[Path]] = {}
        for path in there:
            by_stem.setdefault(path.stem, []).append(path)
        lists = self._split_lists()
        labelled: dict[Path, Path] = {}
        for file in sorted(self.root.rglob("*.xml")):
            root = self._parse(file, by_stem, labelled)
            if root is None:
                continue
            picture = self._picture_of(file, root.findtext("filename") or "", by_stem)
            objects = root.findall("object")
            where = relative_name(file, self.root)
            if picture is None:
                self.problems.append(Problem("dropped", where, "label file without a picture", boxes=len(objects)))
            elif picture in labelled:
                reason = f"a second label file for the picture of {relative_name(labelled[picture], self.root)}"
                self.problems.append(Problem("dropped", where, reason, boxes=len(objects)))
            else:
                labelled[picture] = file
                labels = tuple(self._labels(where, objects))
                yield from self._placed(picture, labels, lists, _size(root), len(objects) - len(labels))
        background = [path for path in there if path not in labelled]
        for path in background:
            yield from self._placed(path, (), lists, None)
        if background:
            self.notes.append(f"{len(background)} pictures have no label file; they are taken as background")

    def _placed(
        self,
        picture: Path,
        labels: tuple[Label, ...],
        lists: dict[str, str],
        size: tuple[int, int] | None,
        unreadable: int = 0,
    ) -> Iterator[SourcePicture]:
        name = relative_name(picture, self.options.images or self.root)
        split = lists.get(picture.stem) if lists else split_of(name)
        if lists and split is None:
            self.problems.append(Problem("left out", name, "in the list of no split", 1, len(labels)))
        else:
            yield SourcePicture(picture, name, split, labels, size, unreadable)

    def _split_lists(self) -> dict[str, str]:
        """Split by stem of the picture; empty when the source has no lists."""
        for folder in (self.root / "ImageSets" / "Main", self.root):
            splits: dict[str, str] = {}
            for file in sorted(folder.glob("*.txt")):
                split = SPLIT_NAMES.get(file.stem.lower())
                stems = [PurePosixPath(line.split()[0]) for line in read_lines(file) if line] if split else []
                if split and not stems:
                    self.notes.append(f"split {split} is empty: {relative_name(file, self.root)} lists no picture")
                for path in stems:
                    stem = path.stem if path.suffix.lower() in PICTURE_SUFFIXES else path.name
                    if split and splits.setdefault(stem, split) != split:
                        reason = f"also in the list of {splits[stem]}, where it stays"
                        self.problems.append(Problem("changed", f"{relative_name(file, self.root)}: {stem}", reason, 1))
            if splits:
                return splits
        return {}

    def _parse(self, file: Path, by_stem: dict[str, list[Path]], labelled: dict[Path, Path]) -> Element | None:
        """The root of a VOC file; None for another kind of XML and, with a problem, for a broken one, whose picture
        goes with it."""
        try:
            if file.stat().st_size > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES:,} bytes")
            root = parse_xml(file.read_bytes())
            self.label_files += root.tag == "annotation"
        except (OSError, ValueError, expat.ExpatError) as error:
            self.label_files += 1
            reason, pictures = f"label file cannot be read ({error})", 0
            picture = self._picture_of(file, "", by_stem)
            if picture is not None and picture not in labelled:
                labelled[picture] = file
                reason, pictures = f"{reason}; its picture is dropped too", 1
            self.problems.append(Problem("dropped", relative_name(file, self.root), reason, pictures, 1))
            return None
        return root if root.tag == "annotation" else None

    def _picture_of(self, file: Path, filename: str, by_stem: dict[str, list[Path]]) -> Path | None:
        """By the name of the XML file, which is the picture's in VOC, else by the name written in it."""
        written = PurePosixPath(filename.strip().replace("\\", "/"))
        for stem in (file.stem, written.stem):
            found = by_stem.get(stem, [])
            # Of several, the one in the folder nearest to the label file, and the name as written.
            ranked = sorted(found, key=lambda path: (-_shared(path, file), path.name != written.name, path))
            if ranked:
                return ranked[0]
        return None

    def _labels(self, where: str, objects: list[Element]) -> Iterator[Label]:
        for number, item in enumerate(objects, start=1):
            place = f"{where}: object {number}"
            name = tidy(item.findtext("name") or "")
            try:
                if not name:
                    raise ValueError("no name of a class")
                x1, y1, x2, y2 = (_number(item, corner) for corner in CORNERS)
            except ValueError as error:
                self.problems.append(Problem("dropped", place, str(error), boxes=1))
                continue
            self.names.add(name)
            yield Label(name, (x1, y1, x2, y2), "pixel_xyxy", place)


def parse_xml(data: bytes) -> Element:
    """Raises expat.ExpatError for what is no XML, ValueError for a document type, which may hold entities that
    read files or grow without end."""

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type (DTD), which no label file needs")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


def _number(item: Element, corner: str) -> float:
    text = (item.findtext(f"bndbox/{corner}") or "").strip()
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{corner} is {cut(text)!r}, no number") from error


def _size(root: Element) -> tuple[int, int] | None:
    width, height = ((root.findtext(f"size/{side}") or "").strip() for side in ("width", "height"))
    plain = all(text.isdecimal() and len(text) < 10 and int(text) for text in (width, height))
    return (int(width), int(height)) if plain else None


def _shared(one: Path, other: Path) -> int:
    """How many folders, from the top, two paths have in common."""
    same = 0
    for a, b in zip(one.parent.parts, other.parent.parts, strict=False):
        if a != b:
            break
        same += 1
    return same
