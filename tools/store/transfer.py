"""Blobs to files: a download that was cut off goes on, and nothing gets its name before its checksum is right."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tools.data.write import NO_SPACE
from tools.errors import ToolError
from tools.store.manifest import StoredFile
from tools.store.objects import MIB, Advance, Missing, Objects


def verify(objects: Objects, file: StoredFile) -> None:
    """Raises ToolError when the store does not hold what was pushed."""
    digest = hashlib.sha256()
    for data in _content(objects, file, 0):
        digest.update(data)
    if digest.hexdigest() != file.sha256:
        raise _differs(file)


def download(objects: Objects, file: StoredFile, target: Path, advance: Advance) -> None:
    """Write the file at `target`, in place of what is there. advance: called with bytes as they come.

    Raises ToolError when the content is not what was pushed, the disk is full, or another pull writes there.
    """
    part = target.with_name(f".{target.name[:100]}.{file.sha256[:16]}.part")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as sink:
            there = _hash_of(sink)
            resumed = bool(sink.tell())
            found = _fill(objects, file, sink, there, advance)
            if found != file.sha256 and resumed:
                # What an earlier pull had left may be what is wrong.
                sink.seek(0)
                sink.truncate()
                found = _fill(objects, file, sink, hashlib.sha256(), advance)
            if found != file.sha256:
                part.unlink()
                raise _differs(file)
            sink.flush()
            os.fsync(sink.fileno())
            part.replace(target)


def is_there(file: StoredFile, target: Path) -> bool:
    """Whether `target` is that file already."""
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    with target.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest() == file.sha256


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """One line for a disk that is full or may not be written."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in NO_SPACE else error.strerror or str(error)
        raise ToolError(
            f"{target} cannot be written ({why}); what was there is as it was, and the next pull goes on with the part"
            " that has come"
        ) from error


def _fill(objects: Objects, file: StoredFile, sink: BinaryIO, digest: "hashlib._Hash", advance: Advance) -> str:
    """Append what is missing; the sha256 of the whole."""
    advance(sink.tell())
    for data in _content(objects, file, sink.tell()):
        sink.write(data)
        digest.update(data)
        advance(len(data))
    return digest.hexdigest()


def _content(objects: Objects, file: StoredFile, start: int) -> Iterator[bytes]:
    if start >= file.size > 0:
        return
    try:
        yield from objects.chunks(file.blob, start, file.size)
    except Missing as error:
        raise ToolError(f"the content of {file.path} ({file.blob}) is gone from the store; push it again") from error


def _differs(file: StoredFile) -> ToolError:
    return ToolError(
        f"{file.path}: what the store holds has another checksum than what was pushed ({file.blob}); push the same file"
        " again, which mends it"
    )


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """A file to append to that nobody else appends to."""
    with part.open("ab+") as sink:
        try:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolError(f"another pull writes {part}; wait for it, or pull to another place") from None
        # One that has just ended has given the file its name.
        if not part.exists() or not os.path.samestat(part.stat(), os.fstat(sink.fileno())):
            raise ToolError(f"another pull has just ended with {part}; pull again")
        yield sink


def _hash_of(file: BinaryIO) -> "hashlib._Hash":
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(MIB):
        digest.update(data)
    return digest
