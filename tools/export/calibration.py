"""The pictures that a network is fitted to and compared on: a folder of them, or a data set with labels."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from handlers.settings import Runtime
from tools.archive.sources import sha256_of
from tools.data.dataset import INFO, SPLITS, Dataset, read_dataset
from tools.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

    from handlers.pipeline import Pipeline

# Of these an engine sees enough to know the range of every layer.
MOST_FITTED = 300
# And of these people see whether its answers are the same.
MOST_COMPARED = 1000
ALL = "all"
Item = TypeVar("Item")
SIGNATURE = 12  # bytes at the beginning of a file that tell its format


@dataclass(frozen=True)
class Calibration:
    """fitted: the pictures that int8 is fitted to. compared: those that the networks are compared on.

    dataset: `compared` with their labels as its split ALL, where there are any.
    """

    fitted: Sequence[Path] = ()
    compared: Sequence[Path] = ()
    dataset: Dataset | None = None

    def document(self) -> dict[str, Any]:
        """What the provenance says of the pictures that int8 was fitted to."""
        return {"fitted_to": digest_of(self.fitted)}


def digest_of(pictures: Sequence[Path]) -> dict[str, Any]:
    """Which ones, for the provenance."""
    digest = hashlib.sha256("".join(map(sha256_of, pictures)).encode()).hexdigest()
    return {"pictures": len(pictures), "sha256": digest}


def read_calibration(folder: Path | None, runtime: Runtime) -> Calibration:
    """All pictures of a folder, or of a prepared data set, serve for both; of many, some from all over it.

    Whether two networks answer alike is asked of pictures that one was fitted to, too: it is no question of learning.

    Raises ToolError for a folder that is missing or without pictures, and for int8 without a folder.
    """
    if folder is None:
        if runtime.precision == "int8":
            raise ToolError(
                "runtime.precision is int8, which is fitted to pictures of the kind it will see; give a folder of them,"
                " a hundred or more, with --calibration DIR"
            )
        return Calibration()
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "is not there"
        raise ToolError(f"calibration folder {folder} {problem}; give a folder of pictures or a prepared data set")
    if (folder / INFO).is_file():
        dataset = read_dataset(folder)
        pictures = [picture for split in SPLITS for picture in dataset.splits.get(split, ())]
        if not pictures:
            raise ToolError(f"calibration set {folder} has no pictures; give one that has")
        compared = _spread(pictures, MOST_COMPARED)
        fitted = _spread([picture.file for picture in pictures], MOST_FITTED)
        return Calibration(fitted, [each.file for each in compared], replace(dataset, splits={ALL: compared}))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_picture(path))
    if not files:
        raise ToolError(f"calibration folder {folder} has no picture in it; give one with pictures")
    return Calibration(_spread(files, MOST_FITTED), _spread(files, MOST_COMPARED))


def _spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most so many, from all over the list."""
    return items[:: -(-len(items) // most)]


def _is_picture(path: Path) -> bool:
    # Not before: it imports numpy and Pillow, which a build without calibration does not need.
    from handlers.image import sniff

    with path.open("rb") as file:
        return sniff(file.read(SIGNATURE)) is not None


class Letterboxed:
    """Pictures as the network sees them, `[3, H, W]` uint8; read anew at every pass, since many do not fit in memory.

    Raises ToolError for a picture that cannot be read.
    """

    def __init__(self, pipeline: "Pipeline", files: Sequence[Path]):
        self._pipeline = pipeline
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> "Iterator[Tensor]":
        for file in self._files:
            job = self._pipeline.read({"body": read_picture(file)}, {})
            error = job.error or job.items[0].error
            if error:
                raise ToolError(f"calibration picture {file} cannot be used: {error}; take it out of the folder")
            tensor = job.items[0].tensor
            assert tensor is not None
            yield tensor


def read_picture(file: Path) -> bytes:
    """Raises ToolError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ToolError(f"calibration picture {file} cannot be read ({error.strerror})") from error
