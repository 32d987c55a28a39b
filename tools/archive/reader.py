"""Opens a .mar without trusting it: nothing is extracted or executed before every name was checked.

A .mar is a zip file; `MAR-INF/MANIFEST.json` says what is in it (TorchServe's model archive format).
"""

import json
import lzma
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self

import yaml

from handlers.errors import BadArchive

MANIFEST = "MAR-INF/MANIFEST.json"
PROVENANCE = "MAR-INF/PROVENANCE.json"
CHUNK = 1 << 20
# What zipfile and its decompressors raise for bytes that are none of theirs.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, NotImplementedError)
# An entry may be this many times its packed size (deflate reaches 1032), as long as it stays small.
SUSPICIOUS_RATIO = 100
SUSPICIOUS_SIZE = 1 << 30


class Archive:
    """A .mar that is safe to read. Use `open_archive`; close it, or use it in a `with` block.

    name, version: what the manifest says; version is "1.0" where it says nothing, as TorchServe reads it.
    manifest, config: the parsed manifest and model-config.yaml (empty when the archive has none).
    settings: our handler's settings; None for an archive that Marina did not build.
    provenance: the parsed provenance; None for an archive that Marina did not build.
    """

    def __init__(self, path: Path, file: zipfile.ZipFile):
        self.path = path
        self._zip = file
        self._entries = {info.filename: info for info in _checked_entries(path, file)}
        self.manifest = self._json(MANIFEST)
        model = self.manifest.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("modelName"), str) or not model.get("handler"):
            raise BadArchive(f"{path}: {MANIFEST} names no model.modelName and model.handler; rebuild the archive")
        self.model: dict[str, Any] = model
        self.name: str = model["modelName"]
        self.version = str(model.get("modelVersion", "1.0"))
        self.config = self._config(model.get("configFile"))
        self.provenance = self._provenance() if PROVENANCE in self._entries else None
        handler = self.config.get("handler")
        self.settings: dict[str, Any] | None = handler if self.provenance and isinstance(handler, dict) else None

    def names(self) -> list[str]:
        """The entries in the order in which they stand."""
        return list(self._entries)

    def infos(self) -> list[zipfile.ZipInfo]:
        """The zip headers of the entries, in the order in which they stand."""
        return list(self._entries.values())

    def size(self, name: str) -> int:
        return self._entries[name].file_size

    def open(self, name: str) -> IO[bytes]:
        """Raises BadArchive when there is no such entry."""
        if name not in self._entries:
            raise BadArchive(f"{self.path}: no entry {name!r}; it has {', '.join(self._entries)}")
        return self._zip.open(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content piece by piece. Raises BadArchive, naming the entry, when its checksum is wrong."""
        try:
            with self.open(name) as source:
                while chunk := source.read(CHUNK):
                    yield chunk
        except DAMAGED as error:
            raise BadArchive(
                f"{self.path}: entry {name!r} is damaged ({error!s:.200}); fetch or build it again"
            ) from error

    def read(self, name: str) -> bytes:
        return b"".join(self.chunks(name))

    def extract(self, folder: Path) -> None:
        """Write every entry under `folder`."""
        for name in self._entries:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as sink:
                for chunk in self.chunks(name):
                    sink.write(chunk)

    def close(self) -> None:
        self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise BadArchive(f"{self.path}: no {name} inside, so it is no model archive")
        try:
            value = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise BadArchive(f"{self.path}: {name} is not JSON ({error}); rebuild the archive") from error
        if not isinstance(value, dict):
            raise BadArchive(f"{self.path}: {name} holds {type(value).__name__}, not an object; rebuild the archive")
        return value

    def _provenance(self) -> dict[str, Any]:
        provenance = self._json(PROVENANCE)
        for key in ("entries", "recipe"):
            if not isinstance(provenance.get(key, {}), dict):
                raise BadArchive(f"{self.path}: {PROVENANCE} holds no object as {key!r}; rebuild the archive")
        return provenance

    def _config(self, name: object) -> dict[str, Any]:
        if not name:
            return {}
        if not isinstance(name, str):
            raise BadArchive(f"{self.path}: model.configFile is no file name, but {name!r:.80}; rebuild the archive")
        text = self.read(name)
        try:
            value = yaml.safe_load(text)
        except Exception as error:  # PyYAML's constructors raise nearly everything
            raise BadArchive(f"{self.path}: {name} is not YAML ({error}); rebuild the archive") from error
        if not isinstance(value, dict):
            raise BadArchive(f"{self.path}: {name} is empty or no mapping; TorchServe would not start with it")
        return value


def open_archive(path: Path) -> Archive:
    """Open a .mar and check all its names. Raises BadArchive with one line for anything unsafe or damaged."""
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise BadArchive(f"{path}: no such file; build it with `marina archive build`") from error
    except IsADirectoryError as error:
        raise BadArchive(f"{path}: a folder, not a .mar file") from error
    except OSError as error:
        raise BadArchive(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise BadArchive(f"{path}: not a zip file ({error}); a .mar must be one, build or fetch it again") from error
    try:
        return Archive(path, file)
    except BaseException:
        file.close()
        raise


def _checked_entries(path: Path, file: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    entries = []
    seen: set[str] = set()
    for info in file.infolist():
        # The name as stored: zipfile cuts it at a NUL byte, TorchServe's unzip does not.
        name = info.orig_filename
        problem = _name_problem(name)
        mode = info.external_attr >> 16
        if problem is None and mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        if problem is None and info.flag_bits & 0x1:
            problem = "is encrypted"
        if problem is None and name.casefold().rstrip("/") in seen:
            problem = "stands in the archive twice"
        if problem is None and info.file_size > max(SUSPICIOUS_SIZE, SUSPICIOUS_RATIO * info.compress_size):
            problem = f"would grow from {info.compress_size} to {info.file_size} bytes"
        if problem:
            raise BadArchive(f"{path}: entry {name!r} {problem}; nothing was extracted, do not use this archive")
        seen.add(name.casefold().rstrip("/"))
        if not info.is_dir():
            entries.append(info)
    return entries


def _name_problem(name: str) -> str | None:
    """Why an entry of this name would not stay inside of the archive's folder."""
    parts = PurePosixPath(name).parts
    if not name or "\0" in name or "\\" in name:
        return "has an unsafe name"
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "has an absolute path"
    if ".." in parts:
        return "leads out of the archive"
    return None
