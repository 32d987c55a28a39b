"""The folder of a run: made before the first epoch, and never with a file half-written.

config.yaml                          what the run is made with
results.csv                          a row an epoch
best.safetensors, last.safetensors   averaged weights, in half precision where they fit
last.ckpt                            all that going on needs
summary.json                         how good `best` is; there once the run has ended
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.checkpoint.safetensors_format import replacing
from tools.data.dataset import read_dataset
from tools.errors import ToolError
from tools.train.config import CONFIG, TrainSettings, write_config

RUNS = Path("runs")
BEST = "best.safetensors"
LAST = "last.safetensors"
CHECKPOINT = "last.ckpt"
RESULTS = "results.csv"
SUMMARY = "summary.json"


def check_start(settings: TrainSettings) -> None:
    """Raises ToolError where weights or data are missing, before anything is made or takes time."""
    if settings.weights is not None and not settings.weights.is_file():
        raise ToolError(f"--weights {settings.weights} is not there")
    dataset = read_dataset(settings.data)
    for split in ("train", "valid"):
        if not any(picture.boxes for picture in dataset.split(split)):
            raise ToolError(
                f"data set {settings.data} has no box in split {split!r}: nothing to learn from, or to measure"
            )


def new_run(settings: TrainSettings) -> Path:
    """The folder for a run, made, with its settings in it. Raises ToolError where there is a run already, or where
    nothing can be written."""
    run = settings.output or _free_name(settings.definition)
    if run.exists() and not run.is_dir():
        raise ToolError(f"--output {run} is a file; name a folder")
    # A run that never came to its first epoch leaves nothing behind but its settings.
    if run.is_dir() and any(entry.name != CONFIG for entry in run.iterdir()):
        raise ToolError(f"--output {run} is not empty; name another folder, or go on with it: --resume {run}")
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        write_config(settings, run / CONFIG)
    return run


def _free_name(definition: str) -> Path:
    number = 1
    while (RUNS / f"{definition}-{number}").exists():
        number += 1
    return RUNS / f"{definition}-{number}"


def check_unfinished(run: Path) -> None:
    """Raises ToolError for a run that has ended."""
    if (run / SUMMARY).exists():
        raise ToolError(
            f"{run} has ended; to train on from its weights: marina train --weights {run / BEST} --output NEW …"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """One line for a disk that is full or may not be written."""
    try:
        yield
    except OSError as error:
        raise ToolError(
            f"{path} cannot be written ({error.strerror or error}); what was there before is intact"
        ) from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The columns of the last row; numbers as short as they can be and still be the same."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[-1]) if rows else [], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with writing(path), replacing(path) as file:
        file.write(text.getvalue().encode())


def write_json(path: Path, content: Any) -> None:
    with writing(path), replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
