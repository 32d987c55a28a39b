"""Files under names of ours, in a folder or a bucket."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from tools.errors import ToolError

# No dot first, no empty part: nothing leads out of the root.
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_][a-z0-9_.-]*)*")
_TEMPORARY = ".part-"


class StorageDown(OSError):
    """A folder or bucket that cannot be read or written now; one line that says why."""


class Storage:
    """Blocking: call it in a thread. Every method raises StorageDown.

    A name is made of parts of lower-case letters, digits, `_`, `-` and `.`, joined by `/`. Anything else is a
    fault of the caller and raises ValueError, since no name may come from a request.
    """

    def __init__(self, url: str):
        """url: a folder, or `s3://bucket/prefix`. Raises ToolError when it cannot be used."""
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
            self._is_folder = "file" in (self._files.protocol if self._files.protocol != "file" else ("file",))
            self._faults = _faults_of(url)
            with self._told():
                if self._is_folder:
                    Path(self._root).mkdir(parents=True, exist_ok=True, mode=0o700)
                else:
                    self._files.ls(self._root.partition("/")[0])
        except (StorageDown, ValueError, ImportError) as error:
            raise ToolError(f"storage {url} cannot be used: {error}") from error
        except FileNotFoundError as error:
            problem = "its folder cannot be made" if self._is_folder else "there is no such bucket"
            raise ToolError(f"storage {url} cannot be used: {problem} ({error})") from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except self._faults as error:
            raise StorageDown(f"{error}") from error

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of ours")
        return f"{self._root}/{name}"

    def put(self, name: str, body: bytes) -> None:
        """All of it or nothing."""
        path = self._path(name)
        with self._told():
            if self._is_folder:
                self._put_file(path, body)
            else:
                self._files.pipe_file(path, body)

    def _put_file(self, path: str, body: bytes) -> None:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            temporary.write_bytes(body)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            # On a full disk a folder may be all that came of it.
            with suppress(OSError):
                folder.rmdir()
            raise

    def get(self, name: str) -> bytes | None:
        """None where nothing has that name."""
        path = self._path(name)
        try:
            with self._told():
                body: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        return body

    def list(self, prefix: str = "") -> list[str]:
        """What lies directly below `prefix`, its last parts, in order."""
        path = self._path(prefix) if prefix else self._root
        try:
            with self._told():
                found = self._files.ls(path, detail=False, **({} if self._is_folder else {"refresh": True}))
        except FileNotFoundError:
            return []
        names = {Path(entry).name for entry in found if entry.rstrip("/") != path.rstrip("/")}
        return sorted(name for name in names if not name.startswith(_TEMPORARY))

    def delete(self, name: str) -> None:
        """The file or everything below it; nothing happens when there is nothing."""
        path = self._path(name)
        try:
            with self._told():
                self._files.rm(path, recursive=True)
        except FileNotFoundError:
            return


def _faults_of(url: str) -> tuple[type[Exception], ...]:
    """What a storage raises that cannot be reached. Raises ValueError for a bucket without a name."""
    if not url.startswith("s3:"):
        return (OSError,)
    if not url.removeprefix("s3://").partition("/")[0]:
        raise ValueError("it names no bucket; give s3://bucket/prefix")
    from botocore.exceptions import BotoCoreError

    return OSError, BotoCoreError
