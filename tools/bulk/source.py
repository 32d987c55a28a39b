"""Where the pictures come from: a folder or a prefix of a bucket."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tools.client.sources import PICTURES
from tools.errors import ToolError
from tools.store.folder import FolderObjects
from tools.store.objects import Entry, Missing, Objects

S3 = "s3://"


class PictureError(Exception):
    """One picture cannot be read; others can. kind: a word for it."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Source(Protocol):
    """url: where it is, the same from every working folder."""

    url: str

    def files(self) -> Iterator[Entry]:
        """All files, named relative to the source, with slashes. Raises ToolError when it cannot be listed."""
        ...

    def read(self, name: str) -> bytes:
        """Raises PictureError for this picture alone, ToolError when the source fails."""
        ...


class FolderSource:
    """Links to folders are not followed."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.url = str(self.root)
        if not self.root.is_dir():
            raise ToolError(f"SRC {root} is no folder; give one with pictures, or {S3}BUCKET/PREFIX")

    def files(self) -> Iterator[Entry]:
        for folder, _, names in os.walk(self.root, onerror=_refuse):
            for name in names:
                path = Path(folder) / name
                yield Entry(path.relative_to(self.root).as_posix(), _size(path))

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError as error:
            if not self.root.is_dir():
                raise ToolError(f"SRC {self.root} is gone; bring it back and run the same command again") from error
            if (self.root / name).is_symlink():
                raise PictureError("Unreadable", "it is a link to nothing") from error
            raise PictureError("Missing", "it was there when SRC was listed, and is gone") from error
        except OSError as error:
            raise PictureError("Unreadable", f"it cannot be read ({error.strerror})") from error


class S3Source:
    """Below a prefix of a bucket."""

    def __init__(self, url: str):
        self._objects = _s3(url, "SRC")
        self.url = url.rstrip("/")

    def files(self) -> Iterator[Entry]:
        yield from self._objects.names("")

    def read(self, name: str) -> bytes:
        from tools.store.s3 import DENIED, Refused

        try:
            return self._objects.read(name)
        except Missing as error:
            raise PictureError("Missing", "it was there when SRC was listed, and is gone") from error
        except ToolError as error:
            if isinstance(error.__cause__, Refused) and error.__cause__.code in DENIED:
                raise PictureError("Unreadable", str(error)) from error
            raise


def open_source(url: str) -> Source:
    """Raises ToolError when it is not there."""
    return S3Source(url) if url.startswith(S3) else FolderSource(_path(url, "SRC"))


def open_target(url: str) -> Objects:
    """A folder, which is made, or a prefix of a bucket. Raises ToolError when nothing can be written there."""
    if url.startswith(S3):
        return _s3(url, "DST")
    path = _path(url, "DST")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"DST {path} cannot be made ({error.strerror}); give a folder or {S3}BUCKET/PREFIX") from error
    return FolderObjects(path.resolve())


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES


def _s3(url: str, what: str) -> Objects:
    bucket, _, prefix = url.removeprefix(S3).partition("/")
    if not bucket or "@" in bucket:
        raise ToolError(
            f"{what} {url!r} names no bucket; give {S3}BUCKET/PREFIX, and credentials as AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY"
        )
    from tools.store.s3 import S3Objects

    return S3Objects(bucket, prefix)


def _path(url: str, what: str) -> Path:
    if "://" in url or not url:
        raise ToolError(f"{what} {url!r} is none of ours; give a folder or {S3}BUCKET/PREFIX")
    return Path(url)


def _size(path: Path) -> int:
    """0 for what is gone again, or a link to nothing: reading it will say so."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse(error: OSError) -> None:
    raise ToolError(f"SRC: folder {error.filename} cannot be read ({error.strerror}); nothing was begun")
