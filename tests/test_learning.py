"""That training makes detectors better, measured as a user would."""

import json
from pathlib import Path

import pytest

from tools.archive.recipe import load_recipe
from tools.cli import main


def test_the_shapes_in_the_tree_are_found(repository: Path, tmp_path: Path) -> None:
    """Pictures that its training never saw."""
    data = str(tmp_path / "set")
    assert main(["data", "draw", "--output", data, "--pictures", "1", "1", "40", "--seed", "1000003"]) == 0
    gates = ["--require", "map50=0.95", "--require", "f1=0.9", "--require", "ap50:star=0.9"]
    assert main(["evaluate", str(repository / "archives" / "shapes"), "--data", data, *gates]) == 0


def test_training_on_other_classes_learns_them(repository: Path, tmp_path: Path) -> None:
    """From the weights in the tree, whose head for six classes starts anew for two."""
    data, run = str(tmp_path / "set"), tmp_path / "run"
    easy = ["--difficulty", "easy", "--most-shapes", "3", "--width", "128", "--height", "128"]
    assert (
        main(["data", "draw", "--output", data, "--pictures", "96", "32", "1", "--classes", "ring", "cross", *easy])
        == 0
    )
    weights = str(repository / "archives" / "shapes" / "shapes.safetensors")
    fast = ["--optimizer", "adamw", "--lr", "0.003", "--nominal-batch", "8", "--warmup-epochs", "1", "--mosaic", "0"]
    small = ["--epochs", "8", "--size", "128", "--batch", "8", "--workers", "0", "--devices", "cpu"]
    assert main(["train", "--data", data, "--output", str(run), "--weights", weights, *fast, *small]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["map50"] > 0.8
    # The report asks the model as it will be served.
    report = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert report["overall"]["map50"] == pytest.approx(summary["map50"], abs=0.05)
    recipe = load_recipe(run)
    assert len(recipe.golden) == 2 and all(recipe.beside(golden.image).is_file() for golden in recipe.golden)
