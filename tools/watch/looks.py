"""Pictures as an archive answers them, each as the values of a baseline's quantities."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.baseline import Baseline, values_of
from tools.data.dataset import INFO, read_dataset
from tools.errors import ToolError
from tools.progress import Progress

if TYPE_CHECKING:
    from handlers.pipeline import Pipeline

# Of one picture: the values of each quantity.
Look = dict[str, list[float | str]]
SIGNATURE = 12  # bytes at the beginning of a file that tell its format


def find_pictures(folder: Path, what: str) -> list[Path]:
    """The pictures in a folder and those in it; of a prepared data set those that no network is trained on.

    what: the folder's part, for errors. Raises ToolError for a folder that is missing or without pictures.
    """
    if folder.is_file():
        raise ToolError(f"{what} {folder} is a file; give the folder that it lies in")
    if not folder.is_dir():
        raise ToolError(f"{what} {folder} is not there; give a folder of pictures or a prepared data set")
    if (folder / INFO).is_file():
        splits = read_dataset(folder).splits
        found = [picture.file for split in ("valid", "test") for picture in splits.get(split, ())]
    else:
        found = sorted(path for path in folder.rglob("*") if path.is_file() and _is_picture(path))
    if not found:
        where = "in its splits valid and test" if (folder / INFO).is_file() else "in it"
        raise ToolError(f"{what} {folder} has no picture {where}; give one that has")
    return found


def _is_picture(path: Path) -> bool:
    # Not before: it imports numpy and Pillow.
    from handlers.image import sniff

    with path.open("rb") as file:
        return sniff(file.read(SIGNATURE)) is not None


def look_at(pipeline: "Pipeline", files: Sequence[Path], what: str) -> Iterator[Look]:
    """What the archive sees and finds in each picture, as served. Raises ToolError for one that it refuses."""
    with Progress(what, len(files), unit="pictures") as progress:
        for file in files:
            try:
                job = pipeline.read({"body": file.read_bytes()}, {})
            except OSError as error:
                raise ToolError(f"picture {file} cannot be read ({error.strerror})") from error
            pipeline.infer([job])
            refusal = job.error or job.items[0].error
            if refusal:
                raise ToolError(f"picture {file} is refused: {refusal}; take it out of the folder")
            look: Look = defaultdict(list)
            for quantity, value in values_of(job.items[0], pipeline.labels):
                look[quantity].append(value)
            yield look
            progress.advance()


def counted(archive: Path, baseline: Baseline, files: Sequence[Path]) -> dict[str, Counter[str]]:
    """The pictures as this archive answers them, in the buckets of its baseline. Raises MarinaError with one line."""
    from tools.evaluate.sources import archive_source

    counts: dict[str, Counter[str]] = {name: Counter() for name in baseline.quantities}
    with archive_source(archive) as source:
        for look in look_at(source.pipeline, files, "drift"):
            for name, known in baseline.quantities.items():
                counts[name].update(map(known.bucket, look.get(name, ())))
    return counts
