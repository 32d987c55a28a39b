"""Archives, checked before TorchServe reads them. Marina's own rules, in what Python brings along."""

import hashlib
import json
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

PROVENANCE = "MAR-INF/PROVENANCE.json"
CHUNK = 1 << 20


class Refused(Exception):
    """An archive or a setting that nothing is served with; says why in one line."""


def check_store(store: Path) -> list[str]:
    """A line for each archive of `store`, and what is known of it. Raises Refused at the first that is not as built."""
    return [f"{path.name}: {check_archive(path)}" for path in archives_of(store)]


def archives_of(store: Path) -> list[Path]:
    """Raises Refused when there is none."""
    try:
        paths = sorted(path for path in store.iterdir() if path.suffix == ".mar")
    except OSError as error:
        raise Refused(f"the model store cannot be read by user {os.getuid()}: {error}") from error
    if not paths:
        raise Refused(f"no .mar archive in {store}: mount a folder of archives there, -v FOLDER:{store}:ro")
    return paths


def check_archive(path: Path) -> str:
    """What was found to hold. Raises Refused, naming the entry, for a name that leads out of the archive, for damage,
    and for content that differs from what the archive says of itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            contents = _contents(path, archive)
            return _compare(path, archive, contents)
    except OSError as error:
        raise Refused(f"{path} cannot be read by user {os.getuid()}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise Refused(f"{path} is damaged ({error}); fetch or build it again") from error


def _contents(path: Path, archive: zipfile.ZipFile) -> dict[str, dict[str, int | str]]:
    """Size and sha256 of every entry."""
    contents: dict[str, dict[str, int | str]] = {}
    for info in archive.infolist():
        # The name as stored: zipfile cuts it at a NUL byte, TorchServe's unzip does not.
        name = info.orig_filename
        unsafe = not name or name.startswith("/") or "\\" in name or "\0" in name or name[1:2] == ":"
        kind = stat.S_IFMT(info.external_attr >> 16)
        if unsafe or ".." in PurePosixPath(name).parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Refused(f"{path}: entry {name!r} would not stay in the archive's folder; do not use this archive")
        if name in contents:
            raise Refused(f"{path}: entry {name!r} stands in the archive twice; do not use this archive")
        if not info.is_dir():
            contents[name] = {"size": info.file_size, "sha256": _sha256(archive, info)}
    return contents


def _sha256(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    digest = hashlib.sha256()
    with archive.open(info) as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _compare(path: Path, archive: zipfile.ZipFile, contents: dict[str, dict[str, int | str]]) -> str:
    if PROVENANCE not in contents:
        return "undamaged; another builder's, so nothing says whether it is what was built"
    del contents[PROVENANCE]
    provenance = json.loads(archive.read(PROVENANCE))
    wanted = provenance.get("entries") if isinstance(provenance, dict) else None
    if not isinstance(wanted, dict):
        raise Refused(f"{path}: {PROVENANCE} lists no entries; build the archive again")
    for name in sorted(set(wanted) ^ set(contents)):
        where = "missing from" if name in wanted else "not listed in"
        raise Refused(f"{path}: entry {name!r} is {where} the archive's provenance; do not use this archive")
    for name, entry in contents.items():
        if wanted[name] != entry:
            raise Refused(f"{path}: entry {name!r} is not the one that was built; do not use this archive")
    return f"{len(contents)} entries are those that were built"
