"""A zip file as a folder, without trusting it."""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tools.data.write import NO_SPACE
from tools.errors import ToolError

MOST_BYTES = 100_000_000_000  # unpacked
MOST_ENTRIES = 2_000_000
# Deflate reaches 1032 on zeros alone; labels as repetitive as that stay small.
SUSPICIOUS_RATIO = 200
SUSPICIOUS_BYTES = 1_000_000_000


def unpack(path: Path, folder: Path) -> None:
    """Everything in the zip file `path` into the new folder `folder`.

    Raises ToolError for a name that leads outside, a link, an encrypted or broken entry, and for more than
    100 GB or two million entries, or more than 1 GB at 200 times the packed size.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            _check_size(path, entries)
            targets = [folder / _safe_name(path, entry) for entry in entries]
            for entry, target in zip(entries, targets, strict=True):
                if entry.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(entry) as packed, target.open("xb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
    except FileExistsError as error:
        raise ToolError(f"{path} holds {Path(error.filename).relative_to(folder)} twice; pack it again") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise ToolError(f"{path} cannot be unpacked ({error}); pack or download it again") from error
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise ToolError(f"{path} cannot be unpacked ({error}); pack or download it again") from error


def _check_size(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    size = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if len(entries) > MOST_ENTRIES or size > MOST_BYTES or size > max(SUSPICIOUS_BYTES, SUSPICIOUS_RATIO * packed):
        raise ToolError(
            f"{path} would unpack {packed:,} bytes to {len(entries):,} entries of {size:,} bytes, which is not"
            " believable for pictures; unpack it yourself and give the folder"
        )


def _safe_name(path: Path, entry: zipfile.ZipInfo) -> str:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or not name.parts or ":" in name.parts[0]:
        raise ToolError(f"{path} holds {entry.filename!r}, which leads outside of it; nothing was unpacked")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ToolError(f"{path} holds {entry.filename!r}, which is a link or device; pack the files themselves")
    return str(name)
