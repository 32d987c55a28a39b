"""Names of the files that are written, whatever the sources are called."""

import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tools.errors import ToolError

LABELS, CROPS = "labels", "crops"
LONGEST = 100  # characters of a name, which leaves room for numbers and suffixes in what file systems take
_UNSAFE = re.compile(r"[^\w .()+=@,-]+")


def safe(text: str) -> str:
    """A name for a file or folder, which leads nowhere: no separators, no control characters, no dot in front."""
    return _UNSAFE.sub("_", text)[:LONGEST].strip(" .") or "unnamed"


class Stems:
    """Gives every source a stem of its own, told apart on file systems that ignore case too."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, source: str) -> str:
        """`source`: a path, a URL or a name."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(source).path) if "://" in source else source
        stem = wanted = safe(PurePosixPath(path.replace("\\", "/")).stem)
        number = 1
        while stem.casefold() in self._taken:
            number += 1
            stem = f"{wanted}-{number}"
        self._taken.add(stem.casefold())
        return stem


def check_folder(folder: Path, sources: Iterable[Path]) -> None:
    """Make the folder for results.

    Raises ToolError where that cannot be, or where results could take the place of what they are made from.
    """
    place = folder.resolve()
    for source in sources:
        parent = source.resolve().parent
        if parent == place or any(parent.is_relative_to(place / name) for name in (LABELS, CROPS)):
            raise ToolError(f"--save {folder} holds the source {source}, which could be overwritten; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"--save {folder} cannot be a folder ({error.strerror}); choose another") from error
