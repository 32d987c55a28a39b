"""What lies on this machine and is to be pushed: of what kind it is, whether it is whole, and what is in it."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.archive.companions import companions
from tools.archive.reader import PROVENANCE, open_archive
from tools.archive.sbom import check_sbom
from tools.archive.verify import check_entries
from tools.data.dataset import INFO, read_dataset
from tools.errors import ToolError
from tools.progress import Progress
from tools.sign.statement import check_subject
from tools.store.manifest import Kind, StoredFile, check_name
from tools.store.objects import LocalFile, look_at
from tools.train.config import CONFIG

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt")
KNOWN = f"a .mar archive, weights ({', '.join(WEIGHTS)}), the folder of a run or of a data set, or a data set's .zip"
THREADS = 4


@dataclass(frozen=True)
class Contents:
    """files: what the manifest will say, with where each lies. The rest: see `Manifest`."""

    kind: Kind
    name: str
    version: str | None
    folder: bool
    files: list[tuple[StoredFile, LocalFile]]
    provenance: str | None = None
    marina: str | None = None


def read_contents(path: Path, name: str | None) -> Contents:
    """name: instead of the file's or folder's own; an archive has its name inside. Raises ToolError or BadArchive for
    what is no such thing, cannot be read, or is damaged."""
    if not path.exists():
        raise ToolError(f"{path} is not there; give {KNOWN}")
    if path.is_file() and path.suffix == ".mar":
        return _archive(path, name)
    kind = _kind(path)
    plain = path.resolve().name if path.is_dir() else path.stem
    chosen = check_name(plain if name is None else name, "give another with --name")
    paths = _below(path) if path.is_dir() else {path.name: path}
    return Contents(kind, chosen, None, path.is_dir(), _look(paths))


def _kind(path: Path) -> Kind:
    if path.is_dir():
        if (path / INFO).is_file():
            read_dataset(path)
            return "datasets"
        if (path / CONFIG).is_file():
            return "runs"
        raise ToolError(f"{path} is no run ({CONFIG}) and no data set ({INFO}); `marina data prepare` makes a set")
    if path.suffix == ".zip" and zipfile.is_zipfile(path):
        return "datasets"
    if path.suffix in WEIGHTS:
        from tools.checkpoint import open_checkpoint

        with open_checkpoint(path):
            return "weights"
    raise ToolError(f"{path} is nothing that the store takes; give {KNOWN}")


def _archive(path: Path, name: str | None) -> Contents:
    """The archive comes first, behind it what lies beside it."""
    with open_archive(path) as archive:
        if name is not None:
            raise ToolError(f"--name: {path} has its name inside, {archive.name!r}; set another in its recipe")
        hint = "set another in the recipe"
        provenance = archive.provenance or {}
        if archive.settings is not None:
            check_entries(path)
        files = _look({each.name: each for each in (path, *companions(path))})
        check_subject(path, files[0][0].sha256)
        check_sbom(path, files[0][0].sha256)
        built_by = provenance.get("marina")
        return Contents(
            "archives",
            check_name(archive.name, hint),
            check_name(archive.version, hint),
            False,
            files,
            hashlib.sha256(archive.read(PROVENANCE)).hexdigest() if archive.provenance else None,
            str(built_by.get("version")) if isinstance(built_by, dict) else None,
        )


def _below(folder: Path) -> dict[str, Path]:
    """The files of a folder by their relative names. Raises ToolError for a link, which may lead out of it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ToolError(f"{path} is a link or no file; put the file itself there, or remove it")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path
    return found


def _look(paths: dict[str, Path]) -> list[tuple[StoredFile, LocalFile]]:
    for name in paths:
        if "\\" in name or not name.isprintable():
            raise ToolError(f"{paths[name]}: this file name cannot be pushed; rename the file")
    with ThreadPoolExecutor(THREADS) as pool, Progress("reading", len(paths), unit="files") as progress:
        found = []
        for name, local in zip(paths, pool.map(look_at, paths.values()), strict=True):
            found.append((StoredFile(path=name, size=local.size, sha256=local.sha256), local))
            progress.advance()
    return found
