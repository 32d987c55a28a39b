"""Where weights come from: beside the recipe, given on the command line, or fetched once and kept."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

from handlers.errors import BadArchive
from tools.archive.recipe import Recipe, is_remote
from tools.errors import ToolError
from tools.progress import Progress

CHUNK = 1 << 20


def find_weights(recipe: Recipe, given: Path | None) -> Path:
    """The weights file, its checksum as the recipe says. Raises BadArchive."""
    weights = recipe.weights
    if given is None and is_remote(weights.file):
        assert weights.sha256 is not None
        return fetch(weights.file, weights.sha256)
    path = given or recipe.beside(weights.file)
    if not path.is_file():
        source = f" ({weights.source})" if weights.source else ""
        raise BadArchive(f"weights {path} are not there; give the file with --weights FILE{source}")
    if weights.sha256:
        check_sha256(path, weights.sha256)
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, wanted: str) -> None:
    """Raises BadArchive when the file is another one."""
    actual = sha256_of(path)
    if actual != wanted:
        raise BadArchive(
            f"{path} has sha256 {actual}, but the recipe wants {wanted}; take the right file or correct it"
        )


def fetch(url: str, sha256: str) -> Path:
    """Download to the user's cache, unless it is there already. Raises ToolError, or BadArchive when the
    content is not what the checksum says."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "marina"
    target = cache / f"{sha256}{Path(url).suffix}"
    if target.is_file():
        check_sha256(target, sha256)
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as sink:
        try:
            _download(url, sink)
            sink.flush()
            check_sha256(Path(sink.name), sha256)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(sink.name)
            raise
    os.replace(sink.name, target)
    return target


def _download(url: str, sink: IO[bytes]) -> None:
    import fsspec

    try:
        with fsspec.open(url, "rb") as source, Progress(f"fetching {url}", getattr(source, "size", None)) as progress:
            while chunk := source.read(CHUNK):
                sink.write(chunk)
                progress.advance(len(chunk))
    except ImportError as error:
        raise ToolError(f"{url} needs another package: {error}; pip install '.[s3]'") from error
    except Exception as error:  # each file system has its own exceptions
        raise ToolError(f"{url} cannot be fetched: {error or type(error).__name__}") from error
