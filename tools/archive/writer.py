"""Writes a .mar whose bytes depend on its entries alone."""

import hashlib
import os
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MODE = stat.S_IFREG | 0o644
CHUNK = 1 << 20
EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can hold


def timestamp() -> tuple[int, int, int, int, int, int]:
    """Of every entry, UTC: SOURCE_DATE_EPOCH (reproducible-builds.org), else the earliest there is."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    year, month, day, hour, minute, second, *_ = time.gmtime(int(epoch)) if epoch.isdigit() else EARLIEST
    return max(EARLIEST, (year, month, day, hour, minute, second))


def entry_header(name: str) -> zipfile.ZipInfo:
    """An entry uncompressed: weights do not get smaller, and every version of zlib writes its own bytes."""
    info = zipfile.ZipInfo(name, timestamp())
    info.external_attr = MODE << 16
    info.create_system = 3  # Unix, whatever this runs on
    return info


class HashingSink:
    """Passes bytes on to `sink` and keeps account of them."""

    def __init__(self, sink: IO[bytes]):
        self._sink = sink
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._sink.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class ArchiveWriter:
    """Adds entries to a zip file. digests: name to size and sha256 of what was added."""

    def __init__(self, file: zipfile.ZipFile, digests: dict[str, dict[str, int | str]]):
        self._zip = file
        self.digests = digests

    @contextmanager
    def open(self, name: str) -> Iterator[HashingSink]:
        with self._zip.open(entry_header(name), "w") as raw:
            sink = HashingSink(raw)
            yield sink
        self.digests[name] = {"size": sink.size, "sha256": sink.sha256}

    def add(self, name: str, data: bytes) -> None:
        with self.open(name) as sink:
            sink.write(data)


@contextmanager
def write_archive(path: Path, digests: dict[str, dict[str, int | str]]) -> Iterator[ArchiveWriter]:
    """Add entries to the .mar at `path`, which is made if it is not there; `digests` is kept up."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as file:
        yield ArchiveWriter(file, digests)
