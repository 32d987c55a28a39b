"""A network's files without an archive, for people who run them in programs of their own."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handlers.geometry import PADDING
from handlers.runtimes.exported import INPUTS
from handlers.settings import Settings
from tools.archive.build import check_recipe, check_weights, label_parts, settings_of
from tools.archive.recipe import Recipe
from tools.archive.sources import find_weights
from tools.checkpoint import open_checkpoint
from tools.errors import ToolError
from tools.export.calibration import read_calibration
from tools.export.pair import make_pair

DESCRIPTION = "network.json"


def write_network(recipe: Recipe, weights: Path | None, calibration: Path | None, output: Path) -> list[Path]:
    """The files of the recipe's network under `output`, and what there is to know about them beside them.

    Files of the same names are replaced when all is done. Raises BadSettings, BadArchive or ToolError with one line.
    """
    labels = check_recipe(recipe)
    samples = read_calibration(calibration, recipe.runtime)
    source = find_weights(recipe, weights)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".marina-", dir=output) as work, open_checkpoint(source) as checkpoint:
            check_weights(recipe, checkpoint, labels)
            pair = make_pair(settings_of(recipe), label_parts(recipe), checkpoint, samples, Path(work))
            description = Path(work) / DESCRIPTION
            description.write_text(json.dumps(_description(pair.settings, labels), indent=1, ensure_ascii=False) + "\n")
            return [path.replace(output / path.name) for path in (*pair.files.values(), description)]
    except OSError as error:
        raise ToolError(f"{error.filename or output}: {error.strerror or error}; name another --output") from error


# What goes in and out, by the number of outputs.
INPUT_MEANING = {
    "images": "float32 [B, 3, H, W], RGB in 0..1",
    "score_threshold": "float32 without dimensions, in 0..1",
}
ROWS_MEANING = {
    "rows": "float32 [M, 5 + classes], in no set order, those that can be above the threshold and some others: centre"
    " x, centre y, width, height in pixels of the input, objectness, class scores; a score is objectness x class score;"
    " threshold and suppression (NMS) are still to be done",
    "pictures": "int64 [M]: which of the B pictures a row is of",
}
FLAT_MEANING = {
    "boxes": "float32 [N, 4]: x1, y1, x2, y2 in pixels of the input, above the threshold; suppression (NMS) is still to"
    " be done, class by class",
    "labels": "int64 [N]: index into labels",
    "scores": "float32 [N] in 0..1",
}


def _description(settings: Settings, labels: list[str]) -> dict[str, Any]:
    """What one must know to use the network: how pictures go in, what its outputs mean."""
    assert settings.exported is not None
    meanings = ROWS_MEANING if len(settings.exported.outputs) == len(ROWS_MEANING) else FLAT_MEANING
    return {
        "network": settings.weights,
        "inputs": INPUTS,
        "meaning": INPUT_MEANING | meanings,
        **asdict(settings.exported),
        "runtime": asdict(settings.runtime),
        "preprocess": asdict(settings.preprocess) | {"padding": PADDING} if settings.exported.letterbox else None,
        "labels": labels,
    }
