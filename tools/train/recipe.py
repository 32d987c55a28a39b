"""The recipe of a run, so that `marina archive build RUN` needs nothing more."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.archive.sources import sha256_of
from tools.checkpoint.safetensors_format import replacing
from tools.data.dataset import Picture
from tools.train.config import TrainSettings
from tools.train.run import BEST, writing

RECIPE = "archive.yaml"
LABELS = "index_to_name.json"
GOLDEN = "golden"


def write_recipe(
    run: Path, settings: TrainSettings, labels: Sequence[str], score_threshold: float, golden: Sequence[Picture]
) -> None:
    """labels: those of the network, in order. score_threshold: what is served above. golden: pictures whose
    answers the archive must keep giving; they are copied."""
    content: dict[str, Any] = {
        "name": settings.name or _name(run),
        "version": "1.0",
        "license": settings.license,
        "model": {"definition": settings.definition, "args": settings.model_args},
        "weights": {"file": BEST, "sha256": sha256_of(run / BEST)},
        "labels": LABELS,
        "postprocess": {"score_threshold": score_threshold},
    }
    if settings.family == "yolov5":
        content["preprocess"] = {"size": settings.size, "shape": "rect"}
    with writing(run / GOLDEN):
        (run / GOLDEN).mkdir(exist_ok=True)
        content["golden"] = [{"image": _copied(picture.file, run / GOLDEN)} for picture in golden]
    for name, text in (
        (LABELS, json.dumps({str(index): label for index, label in enumerate(labels)}, indent=1, ensure_ascii=False)),
        (RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True)),
    ):
        with writing(run / name), replacing(run / name) as file:
            file.write(f"{text.rstrip()}\n".encode())


def _copied(picture: Path, folder: Path) -> str:
    shutil.copyfile(picture, folder / picture.name)
    return f"{folder.name}/{picture.name}"


def _name(run: Path) -> str:
    """The folder's name as one that a recipe may have."""
    return re.sub(r"[^a-z0-9._-]+", "-", run.resolve().name.lower()).lstrip("._-") or "model"
