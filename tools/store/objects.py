"""What a store needs of the place where it lies; `folder` and `s3` bring it."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from tools.errors import ToolError

MIB = 1 << 20
# S3 takes parts from 5 MiB up, and 10,000 of them.
PART = 8 * MIB
MAX_PARTS = 10_000
# Of objects that only find out what a store can do; `clean` removes those that were left.
PROBES = "uploads/"

Advance = Callable[[int], object]


class Missing(Exception):
    """There is no object of this name."""


class Entry(NamedTuple):
    """name: of the object. size: bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class LocalFile:
    """A file to upload and what it held when it was looked at. sha256: hex. parts: MD5 of each part, hex."""

    path: Path
    size: int
    sha256: str
    parts: tuple[str, ...]

    def part(self, number: int) -> bytes:
        """The content of a part, counted from 0. Raises ToolError when the file is no longer what it was."""
        size = part_size(self.size)
        try:
            with self.path.open("rb") as file:
                file.seek(number * size)
                data = file.read(size)
        except OSError as error:
            raise ToolError(f"{self.path} cannot be read ({error.strerror}); nothing was pushed") from error
        if md5(data) != self.parts[number]:
            raise ToolError(f"{self.path} changed while it was pushed; nothing was pushed, push it again")
        return data


class Objects(Protocol):
    """Objects by name, names with slashes. All methods raise ToolError with one line when the place fails them."""

    def names(self, prefix: str) -> list[Entry]:
        """All objects below `prefix`, which ends with a slash, in the order of their names."""
        ...

    def read(self, name: str) -> bytes:
        """Raises Missing."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; whether it was written. `data` must be like no other."""
        ...

    def delete(self, name: str) -> None:
        """Does nothing when it is not there."""
        ...

    def holds(self, name: str, file: LocalFile) -> bool:
        """Whether the object is there and known to be equal to the file."""
        ...

    def upload(self, name: str, file: LocalFile, advance: Advance) -> None:
        """Write the object, going on with what an upload that was cut off has left. advance: called with bytes."""
        ...

    def chunks(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """The content from byte `start` to `size`, piece by piece. Raises Missing."""
        ...

    def check_exclusive(self) -> None:
        """Raises ToolError unless `create` is kept by the server."""
        ...

    def clean(self, before: float) -> int:
        """Remove uploads that were begun before that time (seconds since 1970) and not finished; how many."""
        ...


def part_size(size: int) -> int:
    """Of a file of that many bytes; the same each time, so that parts that are there fit."""
    return max(PART, -(-size // MAX_PARTS // MIB) * MIB)


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def look_at(path: Path) -> LocalFile:
    """Read a file through. Raises ToolError when that cannot be done."""
    try:
        size = path.stat().st_size
        whole, parts, length = hashlib.sha256(), [], 0
        with path.open("rb") as file:
            while data := file.read(part_size(size)):
                whole.update(data)
                parts.append(md5(data))
                length += len(data)
    except OSError as error:
        raise ToolError(f"{path} cannot be read ({error.strerror}); nothing was pushed") from error
    if length != size:
        raise ToolError(f"{path} changed while it was read; nothing was pushed, push it again")
    return LocalFile(path, size, whole.hexdigest(), tuple(parts) or (md5(b""),))


def open_objects(url: str) -> Objects:
    """The place that `s3://BUCKET[/PREFIX]` or the path of a folder names. Raises ToolError when it is not there."""
    if url.startswith("s3://"):
        from tools.store.s3 import S3Objects

        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if "@" in url:
            raise ToolError("a store's URL holds no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket) or not re.fullmatch(r"[A-Za-z0-9._/-]*", prefix):
            raise ToolError(f"{url!r} is no store; give s3://BUCKET, s3://BUCKET/PREFIX or a folder")
        return S3Objects(bucket, prefix)
    if "://" in url or url.startswith("s3:") or not url:
        raise ToolError(f"{url!r} is no store; give s3://BUCKET, s3://BUCKET/PREFIX or a folder")
    from tools.store.folder import FolderObjects

    return FolderObjects(Path(url))
