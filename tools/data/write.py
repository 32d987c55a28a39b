"""Puts a folder in its place at once, or not at all.

    with replacing_folder(Path("out"), INFO, replace=False) as folder:
        ...                                       # write into `folder`
                                                  # <- takes the place of `out` here, if nothing was raised

All is written to a hidden folder beside the output, on the same disk. A run that was killed leaves that folder
behind; the next run on the same output removes it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.data.dataset import ANNOTATIONS, INFO, Picture, coco_document
from tools.errors import ToolError

MADE, OLD = "made", "old"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that is gone afterwards. Raises ToolError when the disk is full or refuses."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{output.name}.marina-"
        for left in output.parent.iterdir():
            if left.name.startswith(prefix):
                _clear(left, output)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        handle = os.open(folder, os.O_RDONLY)
        try:
            # Held for as long as this process lives, so that another run knows whether the folder is in use.
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(handle)
            _clear(folder, output)
    except OSError as error:
        full = "the disk is full" if error.errno in NO_SPACE else error.strerror or str(error)
        raise ToolError(f"{output} cannot be written ({full}); what was there is as it was") from error


def put_in_place(made: Path, output: Path, marker: str, *, replace: bool) -> None:
    """Renames the folder `made`, which lies in a workspace of `output`, to `output`.

    What is there already must be empty or, with `replace`, hold the file `marker`. Raises ToolError otherwise.
    """
    check_place(output, marker, replace=replace)
    old = made.with_name(OLD)
    if output.exists():
        output.rename(old)
    made.rename(output)


def check_place(output: Path, marker: str, *, replace: bool) -> None:
    """Raises ToolError where `put_in_place` would: before the work is done."""
    if output.name in ("", "..") or output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ToolError(f"{output} is no folder; choose another --output")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / marker).is_file():
        raise ToolError(f"{output} is not empty and was not made by Marina (no {marker}); choose another --output")
    if not replace:
        raise ToolError(f"{output} holds another data set; give --replace to put the new one in its place")


@contextmanager
def replacing_folder(output: Path, marker: str, *, replace: bool) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block ends well; see `put_in_place`."""
    check_place(output, marker, replace=replace)
    with workspace(output) as folder:
        made = folder / MADE
        made.mkdir()
        yield made
        put_in_place(made, output, marker, replace=replace)


def write_annotations(
    folder: Path, classes: Sequence[str], splits: Mapping[str, Sequence[Picture]], info: Mapping[str, Any]
) -> None:
    """`dataset.json` and every split's annotations; the pictures are there already. info: how the set was made."""
    for split, pictures in splits.items():
        (folder / split).mkdir(exist_ok=True)
        write_json(folder / split / ANNOTATIONS, coco_document(pictures, classes), indent=None)
    counts = {
        split: {
            "pictures": len(pictures),
            "boxes": sum(len(picture.boxes) for picture in pictures),
            "annotations_sha256": file_digest(folder / split / ANNOTATIONS),
        }
        for split, pictures in splits.items()
    }
    write_json(folder / INFO, {"classes": list(classes), "splits": counts, **info})


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    # A file name need not be text; what is none is written as JSON's own escape.
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _clear(folder: Path, output: Path) -> None:
    """Removes a workspace that nobody works in. One killed between two renames still holds the old output."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        os.close(handle)
    if (folder / OLD).exists() and not output.exists():
        (folder / OLD).rename(output)
    shutil.rmtree(folder, ignore_errors=True)
