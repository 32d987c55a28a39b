"""The trials of a recipe in a JSON file, written anew after each, so that a tuning goes on where it was stopped."""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from handlers.settings import Runtime
from tools.archive.recipe import Recipe
from tools.archive.sources import find_weights, sha256_of
from tools.bench.command import machine
from tools.bench.serve import Measured
from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.export.calibration import read_calibration
from tools.strict import Strict, parse
from tools.tune.space import Setting

NAME = "tuning.json"
PACKAGES = ("marina", "torch", "torchserve", "onnxruntime", "openvino", "nncf")


class Trial(Strict):
    """seconds: that it took, building included. failure: why nothing was measured."""

    setting: Setting
    seconds: float
    measured: Measured | None = None
    failure: str | None = None


class Conditions(Strict):
    """What trials must have in common to be compared. recipe: without `runtime` and `serving`, which a tuning
    changes. recipe, weights, pictures, calibration: sha256."""

    recipe: str
    weights: str
    pictures: list[str]
    calibration: str | None
    machine: dict[str, str | int]
    packages: dict[str, str]
    connections: int
    seconds: int


class Record(Strict):
    """slo, winner: of the last tuning that came to its end."""

    conditions: Conditions
    trials: list[Trial]
    slo: list[str] = Field(default_factory=list)
    winner: Setting | None = None


class Ledger:
    """The record of a tuning, which every trial is added to. Nothing is written before the first.

    trials: by their settings, those made before that count: under the same conditions, and no failures, which may
    have passed. changed: the conditions that differ from those of the file, so that none counts. Raises ToolError for a
    file that is something else, or a folder that cannot be written.
    """

    def __init__(self, path: Path, conditions: Conditions):
        self.path = path
        self._conditions = conditions
        self.trials: dict[Setting, Trial] = {}
        self.changed: list[str] = []
        if not os.access(path.parent, os.W_OK):
            raise ToolError(f"the folder {path.parent} cannot be written, or is not there; name another with --output")
        record = read_record(path)
        if record:
            fields = Conditions.model_fields
            self.changed = [name for name in fields if getattr(record.conditions, name) != getattr(conditions, name)]
        if record and not self.changed:
            self.trials = {trial.setting: trial for trial in record.trials if trial.measured}

    def add(self, trial: Trial) -> None:
        """Raises ToolError when it cannot be written."""
        self.trials[trial.setting] = trial
        self._write()

    def close(self, slo: list[str], winner: Setting | None) -> None:
        self._write(slo=slo, winner=winner)

    def _write(self, **result: Any) -> None:
        record = Record(conditions=self._conditions, trials=list(self.trials.values()), **result)
        try:
            with replacing(self.path) as file:
                file.write(record.model_dump_json(indent=1).encode() + b"\n")
        except OSError as error:
            raise ToolError(
                f"record {self.path} cannot be written ({error.strerror}); name another file with --output"
            ) from error


def conditions_of(
    recipe: Recipe,
    weights: Path | None,
    pictures: Sequence[bytes],
    calibration: Path | None,
    connections: int,
    seconds: int,
) -> Conditions:
    """pictures: as given, encoded. Raises MarinaError where weights or calibration pictures are not there."""
    content = recipe.model_dump(mode="json", exclude={"runtime", "serving"}) | {"device": recipe.serving.device}
    here = {key: value for key, value in machine().items() if key != "load"}
    return Conditions(
        recipe=_digest(json.dumps(content, sort_keys=True).encode()),
        weights=sha256_of(find_weights(recipe, weights)),
        pictures=[_digest(picture) for picture in pictures],
        calibration=_folder_digest(calibration) if calibration else None,
        machine=here | {"usable_cores": len(os.sched_getaffinity(0))},
        packages=dict(_versions()),
        connections=connections,
        seconds=seconds,
    )


def _folder_digest(folder: Path) -> str:
    """Of names and sizes: to read all of a data set would take as long as a trial."""
    calibration = read_calibration(folder, Runtime())
    files = sorted({*calibration.fitted, *calibration.compared})
    return _digest("\n".join(f"{file.name} {file.stat().st_size}" for file in files).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found


def read_record(path: Path) -> Record | None:
    """None where there is none yet. Raises ToolError for a file that is something else."""
    try:
        return parse(Record, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ToolError(f"record {path} cannot be read ({error.strerror}); name another file with --output") from error
    except (ValueError, TypeError) as error:
        raise ToolError(
            f"{path} is no record of a tuning ({error}); remove it, or name another file with --output"
        ) from error
