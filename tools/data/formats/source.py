"""What every reader of a labelled data set hands on: pictures, their boxes as written, and what was wrong.

Nothing here knows the size of a picture: boxes stay in the unit in which the file gives them until
`tools.data.check` has decoded the picture. What is wrong with one line is a `Problem`; what makes the whole
set unreadable is a ToolError.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import Literal

from tools.data.dataset import INFO

Unit = Literal["fraction_cxcywh", "fraction_xyxy", "pixel_xyxy"]

# `dropped` is lost and counts against --max-bad; `left out` is by request or not part of any split; `changed`
# and `merged` say what became of a box or picture that is kept.
Effect = Literal["dropped", "left out", "changed", "merged"]

# As files call them, and as we do.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}

HIDDEN = (".", "__MACOSX")

MOST_SHOWN = 80  # characters of a value in a message
_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 2, MOST_SHOWN, MOST_SHOWN, MOST_SHOWN

# What counts as a picture in a folder; those that cannot be decoded too, so that they are reported.
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
    | {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".pfm", ".ppm", ".pgm"}
)


@dataclass(frozen=True, slots=True)
class Label:
    """One box as the source gives it.

    name: of its class. box: four numbers in `unit`; fractions are of width and height of the upright picture.
    where: file and line, for reports. crowd: a region of many objects, COCO's `iscrowd`.
    """

    name: str
    box: tuple[float, float, float, float]
    unit: Unit
    where: str
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """file: where it lies. name: the same relative to the source, `/` between folders. split: of ours, or None
    where the source has none. size: width and height that the source states, or None. unreadable: how many boxes the
    source has besides `labels` that cannot be read; a picture with these alone is no background."""

    file: Path
    name: str
    split: str | None
    labels: tuple[Label, ...] = ()
    size: tuple[int, int] | None = None
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """What became of a picture or of boxes, and why. pictures, boxes: how many of each."""

    effect: Effect
    where: str
    reason: str
    pictures: int = 0
    boxes: int = 0


@dataclass
class Source:
    """format: a name of `tools.data.formats.FORMATS`. classes: in the order of the source. notes: whole lines."""

    format: str
    classes: tuple[str, ...]
    pictures: list[SourcePicture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """images: where the pictures lie when not beside the labels. classes: those wanted; empty for all.
    limit_per_class, exclusions: for Open Images. inside: no file outside of this folder may be read (a zip)."""

    images: Path | None = None
    classes: tuple[str, ...] = ()
    limit_per_class: int | None = None
    exclusions: Path | None = None
    inside: Path | None = None


def split_of(name: str) -> str | None:
    """The split that a part of a relative path names, the innermost first; None where none does."""
    for part in reversed(PurePosixPath(name).parts):
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return None


def pictures_below(folder: Path) -> list[Path]:
    """Every picture file in and below a folder, in one order on every machine.

    Hidden files and folders are passed over, and so are prepared sets of Marina that lie below.
    """
    found: list[Path] = []
    seen: set[str] = set()  # real places, since a link may lead back up
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        real = os.path.realpath(here)
        if real in seen or (here != folder and INFO in files):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        paths = [here / name for name in files if not name.startswith(HIDDEN)]
        found += [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()]
    return sorted(found)


def relative_name(path: Path, root: Path) -> str:
    """`path` as seen from `root`, with `/`; for reports, names and order."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def tidy(name: object) -> str:
    """The name of a class on one line, without blanks around it, as text that any file can hold."""
    return " ".join(str(name).encode("utf-8", "replace").decode().split())


def cut(value: object) -> str:
    """A value of a file as text on one line, of at most 80 characters.

    Nothing is written out in whole before that: aliases in YAML can stand for more text than there is memory.
    """
    text = value if isinstance(value, str) else _BRIEF.repr(value)
    text = " ".join(text[: 2 * MOST_SHOWN].split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def shown(values: Iterable[object], most: int = 5) -> str:
    """The first few of many, for one line."""
    texts = [cut(value) for value in values]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
