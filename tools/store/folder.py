"""Objects as the files of a folder, which several machines may share.

What is not finished lies in `uploads/` under a name of its own, and gets its name by a link or a rename: a reader never
sees half of a file.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.data.write import NO_SPACE
from tools.errors import ToolError
from tools.store.objects import MIB, Advance, Entry, LocalFile, Missing, look_at

UPLOADS = "uploads"


class FolderObjects:
    """See `Objects`. The folder is made by the first write."""

    def __init__(self, root: Path):
        self.root = root
        if root.exists() and not root.is_dir():
            raise ToolError(f"store {root} is a file; give a folder or s3://BUCKET/PREFIX")

    def names(self, prefix: str) -> list[Entry]:
        if not self.root.is_dir():
            raise ToolError(f"store {self.root} does not exist; the first `marina store push` makes it")
        found = []
        with self._failing("read"):
            for path in (self.root / prefix).rglob("*"):
                with suppress(FileNotFoundError):  # removed while we looked
                    if path.is_file():
                        found.append(Entry(path.relative_to(self.root).as_posix(), path.stat().st_size))
        return sorted(found)

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name, 0, 0))

    def create(self, name: str, data: bytes) -> bool:
        with self._failing("written"), self._draft() as draft:
            draft.write_bytes(data)
            _flush(draft)
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(draft, self.root / name)
            except FileExistsError:
                return False
            _flush((self.root / name).parent)
            return True

    def delete(self, name: str) -> None:
        with self._failing("written"):
            (self.root / name).unlink(missing_ok=True)

    def holds(self, name: str, file: LocalFile) -> bool:
        path = self.root / name
        return path.is_file() and path.stat().st_size == file.size and look_at(path).sha256 == file.sha256

    def upload(self, name: str, file: LocalFile, advance: Advance) -> None:
        with self._failing("written"), self._draft() as draft:
            with draft.open("wb") as sink:
                for number in range(len(file.parts)):
                    data = file.part(number)
                    sink.write(data)
                    advance(len(data))
            _flush(draft)
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            draft.replace(self.root / name)

    def chunks(self, name: str, start: int, size: int) -> Iterator[bytes]:
        with self._failing("read"):
            try:
                file = (self.root / name).open("rb")
            except FileNotFoundError as error:
                raise Missing(name) from error
        with file:
            file.seek(start)
            while True:
                with self._failing("read"):
                    data = file.read(MIB)
                if not data:
                    return
                yield data

    def check_exclusive(self) -> None:
        """A file system that has hard links keeps it; `create` fails on another."""

    def clean(self, before: float) -> int:
        removed = 0
        with self._failing("written"):
            for path in (self.root / UPLOADS).glob("*"):
                with suppress(FileNotFoundError):  # finished while we looked
                    if path.stat().st_mtime < before:
                        path.unlink()
                        removed += 1
        return removed

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        folder = self.root / UPLOADS
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / secrets.token_hex(16)
        try:
            yield draft
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = "the disk is full" if error.errno in NO_SPACE else error.strerror or str(error)
            raise ToolError(f"store {self.root} cannot be {what} ({why}); what is in it is as it was") from error


def _flush(path: Path) -> None:
    """To the disk: what a manifest names must not be lost when the power goes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
