"""Open Images (https://storage.googleapis.com/openimages/web/download_v7.html), V4 to V7, as a source of data.

A folder holds, in it or below:

    *.csv with ImageID, LabelName, XMin, YMin, XMax, YMax     boxes; the file's name or folder names the split
    *class-descriptions*.csv                                  /m/0k4j,Car
    *.csv with ImageID, License, Author                       optional: who made the pictures
    images/<split>/<id>.jpg                                   where `marina data fetch` puts them

A picture is chosen for one class and keeps its boxes of all chosen classes, the occluded, truncated, depicted and
inside ones too: an object without its box would teach that it is background. Files have gigabytes, so they are read
line by line, and only what is chosen is kept.
"""

import argparse
import csv
import difflib
import hashlib
import heapq
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tools.checkpoint.safetensors_format import replacing
from tools.data.fetch import fetch
from tools.data.formats.source import (
    SPLIT_NAMES,
    Label,
    Problem,
    ReadOptions,
    Source,
    SourcePicture,
    pictures_below,
    relative_name,
)
from tools.errors import ToolError
from tools.progress import Progress

IMAGE_ID = re.compile(r"[0-9a-f]{16}")
PICTURE_STEM = re.compile(r"(?:.*_)?([0-9a-f]{16})")  # other programs set something before the id
IMAGES = "images"  # folder of the pictures
DEFAULT_URL = "https://open-images-dataset.s3.amazonaws.com/{split}/{id}.jpg"
OWN_SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # ours, and as Open Images calls them
BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax")
INFO_COLUMNS = ("ImageID", "License", "Author")
DESCRIPTIONS = "*class-descriptions*.csv"
SOURCES = "SOURCES.csv"
# The columns of SOURCES.csv after id, split and url, and those of Open Images that fill them.
ATTRIBUTION = {
    "author": "Author",
    "author_profile": "AuthorProfileURL",
    "title": "Title",
    "licence": "License",
    "original": "OriginalLandingURL",
}
FAILURES = "FAILURES.csv"
MOST_SHOWN = 10  # failures on the terminal


@dataclass
class Tables:
    """The CSV files of a folder. boxes: by split of ours."""

    folder: Path
    boxes: dict[str, list[Path]] = field(default_factory=dict)
    info: list[Path] = field(default_factory=list)
    descriptions: list[Path] = field(default_factory=list)


class _Record(NamedTuple):
    """A picture to fetch. split: as Open Images calls it."""

    image: str
    split: str
    url: str
    file: Path


@dataclass(frozen=True, slots=True)
class _Row:
    """A box of a chosen class, its numbers as they are written. where: file and line."""

    where: str
    image: str
    name: str
    numbers: tuple[str, ...]
    group: bool


@dataclass
class _Over:
    """What of a class is beyond the limit. pictures: each counts for one of its classes."""

    pictures: int = 0
    boxes: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="with the CSV files of boxes and class descriptions")
    parser.add_argument("--classes", nargs="+", required=True, metavar="NAME", help="display names, as 'Traffic sign'")
    parser.add_argument(
        "--limit-per-class", type=int, metavar="N", help="pictures of each class in each split (default all)"
    )
    parser.add_argument("--exclusions", type=Path, metavar="FILE", help="image ids to leave out, one a line")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one chooses others (default 0)")
    parser.add_argument("--parallel", type=int, default=8, metavar="N", help="downloads at a time (default 8)")
    parser.add_argument("--url", default=DEFAULT_URL, metavar="TEMPLATE", help=f"of a picture (default {DEFAULT_URL})")


def run(args: argparse.Namespace) -> int:
    if args.parallel < 1 or (args.limit_per_class is not None and args.limit_per_class < 1):
        raise ToolError(f"--parallel {args.parallel}, --limit-per-class {args.limit_per_class}: give at least 1")
    if "{id}" not in args.url or not args.url.startswith(("http://", "https://")):
        raise ToolError(f"--url {args.url} is no template; give an http address with {{id}}, as {DEFAULT_URL}")
    try:
        return _fetch_chosen(args)
    except OSError as error:
        raise ToolError(f"{args.folder}: {error}; mend it and run again, which goes on from here") from error


def _fetch_chosen(args: argparse.Namespace) -> int:
    tables = find_tables(args.folder)
    names = class_names(tables, args.classes)
    excluded = read_exclusions(args.exclusions)
    chosen = choose(tables, names, args.limit_per_class, args.seed, lambda image: image not in excluded)
    wanted = [_record(args.folder, args.url, split, image) for split in chosen for image in sorted(chosen[split])]
    if not wanted:
        raise ToolError(f"{args.folder} has no boxes of {', '.join(names.values())}")
    failures = fetch({record.file: record.url for record in wanted}, args.parallel)
    _write_sources(tables, [record for record in wanted if record.file not in failures])
    _write_failures(args.folder, [record for record in wanted if record.file in failures], failures)
    print(f"{args.folder / IMAGES}: {len(wanted) - len(failures):,} of {len(wanted):,} pictures are there")
    return 1 if failures else 0


def read(folder: Path, options: ReadOptions) -> Source:
    """The chosen pictures of those that lie in `options.images`, by default `images`. A group is a crowd region.

    Raises ToolError when tables or all pictures are missing, and for an unknown class.
    """
    tables = find_tables(folder)
    names = class_names(tables, options.classes)
    excluded = read_exclusions(options.exclusions)
    images = options.images or folder / IMAGES
    there = {match[1]: path for path in pictures_below(images) if (match := PICTURE_STEM.fullmatch(path.stem))}
    chosen = choose(tables, names, options.limit_per_class, 0, (there.keys() - excluded).__contains__)
    problems: list[Problem] = []
    labels: dict[str, dict[str, list[Label]]] = {split: {} for split in chosen}
    excluded_boxes: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    over: dict[str, _Over] = {}
    counted: set[str] = set()
    missing = 0
    for split, wanted in chosen.items():
        for row in _rows(tables, split, names, problems):
            if row.image in wanted:
                found = _label(row, problems)
                labels[split].setdefault(row.image, []).extend(found)
                unreadable[row.image] += not found
            elif row.image in excluded:
                excluded_boxes[row.image] += 1
            elif row.image not in there:
                missing += 1
            else:
                beyond = over.setdefault(row.name, _Over())
                beyond.boxes += 1
                beyond.pictures += row.image not in counted
                counted.add(row.image)
    pictures = [
        SourcePicture(
            there[image], relative_name(there[image], images), split, tuple(boxes), unreadable=unreadable[image]
        )
        for split, by_image in labels.items()
        for image, boxes in by_image.items()
    ]
    if not pictures:
        raise ToolError(f"none of the pictures with these classes lie in {images}; get them with marina data fetch")
    for image, count in sorted(excluded_boxes.items()):
        problems.append(Problem("left out", image, f"listed in {options.exclusions}", int(image in there), count))
    for name, beyond in sorted(over.items()):
        reason = f"beyond --limit-per-class {options.limit_per_class}"
        problems.append(Problem("left out", name, reason, beyond.pictures, beyond.boxes))
    notes = [f"{missing:,} boxes of these classes are on pictures that do not lie in {images}"] if missing else []
    seen = {label.name for picture in pictures for label in picture.labels}
    # Of those asked for all, even without a box; of all that Open Images has, those with one.
    classes = tuple(name for name in dict.fromkeys(names.values()) if options.classes or name in seen)
    return Source("open-images", classes, pictures, problems, notes)


def find_tables(folder: Path) -> Tables:
    """Raises ToolError when boxes or class descriptions are missing, or a file of boxes names no split."""
    tables = Tables(folder, descriptions=sorted(folder.rglob(DESCRIPTIONS)))
    for file in sorted(folder.rglob("*.csv")):
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            header = next(csv.reader([lines.readline(10_000)]), [])
        if set(BOX_COLUMNS) <= set(header):
            tables.boxes.setdefault(_split(file, folder), []).append(file)
        elif set(INFO_COLUMNS) <= set(header):
            tables.info.append(file)
    if not tables.boxes:
        raise ToolError(f"{folder} has no CSV file of Open Images boxes (columns {', '.join(BOX_COLUMNS)})")
    if not tables.descriptions:
        raise ToolError(f"{folder} has no file {DESCRIPTIONS}, which names the classes of Open Images")
    return tables


def class_names(tables: Tables, wanted: Sequence[str]) -> dict[str, str]:
    """Name by id, as `/m/0k4j`, of the classes wanted, in their order; of all for none.

    Names are compared without case and stay as they were asked for. Raises ToolError for one that is unknown.
    """
    known: dict[str, str] = {}
    for file in tables.descriptions:
        for cells in _lines(file):
            if len(cells) == 2 and cells[0].startswith("/"):
                known[cells[0]] = cells[1].strip()
    by_name: dict[str, list[str]] = {}
    for class_id, name in known.items():
        by_name.setdefault(name.lower(), []).append(class_id)
    for name in wanted:
        if name.lower() not in by_name:
            near = [known[by_name[close][0]] for close in difflib.get_close_matches(name.lower(), by_name, 4, 0.5)]
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise ToolError(f"Open Images has no class {name!r} in {tables.descriptions[0].name}{hint}")
    if not wanted:
        return known
    spelt = {name.lower(): name for name in reversed(wanted)}
    return {class_id: spelt[key] for key in dict.fromkeys(map(str.lower, wanted)) for class_id in by_name[key]}


def read_exclusions(file: Path | None) -> set[str]:
    """Image ids, one a line. Raises ToolError for a line that is none."""
    if file is None:
        return set()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"exclusions {file} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line and not IMAGE_ID.fullmatch(line):
            raise ToolError(f"exclusions {file}, line {number}: {line!r} is no image id; give 16 hex digits a line")
    return {line for line in lines if line}


def choose(
    tables: Tables,
    names: Mapping[str, str],
    limit_per_class: int | None,
    seed: int,
    usable: Callable[[str], bool],
) -> dict[str, set[str]]:
    """Image ids by split: of each class and split the first `limit_per_class` in the order of a hash.

    A picture that is chosen for one class counts for all that it shows, so a class may come to more pictures, and
    to fewer only where there are no more.
    """
    chosen: dict[str, set[str]] = {}
    for split in tables.boxes:
        by_class = {name: _First(limit_per_class) for name in names.values()}
        for row in _rows(tables, split, names, []):
            if usable(row.image):
                digest = hashlib.blake2b(f"{seed}:{row.image}".encode(), digest_size=8).digest()
                by_class[row.name].offer(int.from_bytes(digest), row.image)
        chosen[split] = set().union(*(first.images for first in by_class.values()))
    return chosen


class _First:
    """The images with the smallest keys of those offered, `limit` of them or all; holds no more than it keeps."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.images: set[str] = set()
        self._largest_first: list[tuple[int, str]] = []

    def offer(self, key: int, image: str) -> None:
        if image in self.images:
            return
        if self.limit is None or len(self.images) < self.limit:
            heapq.heappush(self._largest_first, (-key, image))
        elif key < -self._largest_first[0][0]:
            self.images.remove(heapq.heapreplace(self._largest_first, (-key, image))[1])
        else:
            return
        self.images.add(image)


def _record(folder: Path, template: str, split: str, image: str) -> _Record:
    own = OWN_SPLITS[split]
    url = template.replace("{split}", own).replace("{id}", image)
    return _Record(image, own, url, folder / IMAGES / own / f"{image}.jpg")


def _write_sources(tables: Tables, records: Sequence[_Record]) -> None:
    """Adds who made the pictures to what earlier runs wrote down."""
    file = tables.folder / SOURCES
    columns = ["id", "split", "url", *ATTRIBUTION]
    rows: dict[str, dict[str, str]] = {}
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as stream:
            earlier = csv.DictReader(stream)
            if earlier.fieldnames != columns:
                raise ToolError(f"{file} has not the columns {', '.join(columns)}; move it away and run again")
            rows = {row["id"]: row for row in earlier}
    for record in records:
        rows[record.image] = {"id": record.image, "split": record.split, "url": record.url}
    new = {record.image for record in records}
    for info in tables.info:
        lines = _lines(info)
        header = next(lines)
        for cells in lines:
            about = dict(zip(header, cells, strict=False))
            if (image := about.get("ImageID")) in new:
                rows[image] |= {name: about.get(column, "") for name, column in ATTRIBUTION.items()}
    _write_csv(file, columns, [rows[image] for image in sorted(rows)])


def _write_failures(folder: Path, records: Sequence[_Record], reasons: Mapping[Path, str]) -> None:
    """A file of what could not be fetched, which goes when all is there, and its first lines on stderr."""
    (folder / FAILURES).unlink(missing_ok=True)
    if not records:
        return
    rows = [{"id": record.image, "split": record.split, "reason": reasons[record.file]} for record in records]
    _write_csv(folder / FAILURES, ["id", "split", "reason"], rows)
    for row in rows[:MOST_SHOWN]:
        print(f"{row['split']}/{row['id']}: {row['reason']}", file=sys.stderr)
    print(f"{len(rows):,} pictures failed; all of them are in {folder / FAILURES}", file=sys.stderr)


def _write_csv(file: Path, header: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(file) as stream:
        stream.write(text.getvalue().encode())


def _rows(tables: Tables, split: str, names: Mapping[str, str], problems: list[Problem]) -> Iterator[_Row]:
    """The boxes of chosen classes; lines that cannot be used go to `problems`."""
    for file in tables.boxes[split]:
        place = relative_name(file, tables.folder)
        lines = _lines(file)
        header = next(lines)
        image, name, *numbers = (header.index(column) for column in BOX_COLUMNS)
        group = header.index("IsGroupOf") if "IsGroupOf" in header else None
        for number, cells in enumerate(lines, start=2):
            if not cells:
                continue
            if len(cells) != len(header):
                reason = f"{len(cells)} columns where the header has {len(header)}"
                problems.append(Problem("dropped", f"{place}:{number}", reason, boxes=1))
            elif cells[name] not in names:
                continue
            elif not IMAGE_ID.fullmatch(cells[image]):
                reason = f"{cells[image]!r} is no image id"
                problems.append(Problem("dropped", f"{place}:{number}", reason, boxes=1))
            else:
                yield _Row(
                    f"{place}:{number}",
                    cells[image],
                    names[cells[name]],
                    tuple(cells[column] for column in numbers),
                    group is not None and cells[group] == "1",
                )


def _label(row: _Row, problems: list[Problem]) -> list[Label]:
    """The box, or none and a problem."""
    try:
        x1, y1, x2, y2 = (float(number) for number in row.numbers)
    except ValueError as error:
        problems.append(Problem("dropped", row.where, str(error), boxes=1))
        return []
    return [Label(row.name, (x1, y1, x2, y2), "fraction_xyxy", row.where, row.group)]


def _lines(file: Path) -> Iterator[list[str]]:
    """The lines of a CSV file, with progress. Raises ToolError for what is no CSV."""
    with file.open("rb") as stream, Progress(f"reading {file.name}", file.stat().st_size) as progress:

        def text() -> Iterator[str]:
            for line in stream:
                progress.advance(len(line))
                yield line.decode("utf-8-sig", "replace")

        try:
            yield from csv.reader(text())
        except csv.Error as error:
            raise ToolError(f"{file} is no CSV ({error}); download it again") from error


def _split(file: Path, folder: Path) -> str:
    """Of the parts of the name, then of the folders, the innermost first."""
    inside = file.relative_to(folder)
    for part in (file.stem, *reversed(inside.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    raise ToolError(f"{file} names no split; call it train-{file.name}, validation-{file.name} or test-{file.name}")
