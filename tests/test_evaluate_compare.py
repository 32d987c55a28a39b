"""`marina evaluate compare`: changes, and whether they are more than the chance of which pictures there are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from tools.cli import main
from tools.data.dataset import Box, Picture
from tools.data.write import write_annotations
from tools.errors import ToolError
from tools.evaluate.compare import Change, Result, compare, read_result
from tools.evaluate.metrics import average_precision, found_of, operating_points, truth_of

CLASSES = ["cat", "dog", "never there"]
PICTURES = 40


def pictures_of(seed: int) -> list[Picture]:
    rng = default_rng(seed)
    pictures = []
    for number in range(PICTURES):
        corners = rng.integers(0, 80, (rng.integers(0, 5), 2)).astype(float)
        # Of each fifth picture the first truth is a crowd.
        boxes = tuple(
            Box(int(rng.integers(2)), x, y, x + 20, y + 20, crowd=number % 5 == 0 and index == 0)
            for index, (x, y) in enumerate(corners.tolist())
        )
        pictures.append(Picture(Path("x"), f"{number}.jpg", 100, 100, boxes))
    return pictures


def results_of(pictures: list[Picture], seed: int, found: float, noise: float = 2.0) -> list[dict[str, Any]]:
    """Each truth is found with the probability `found`, not quite where it is; some are found where nothing is."""
    rng = default_rng(seed)
    results = []
    for image_id, picture in enumerate(pictures, start=1):
        boxes = [box for box in picture.boxes if rng.random() < found]
        for box in [*boxes, Box(0, 70, 70, 90, 90), Box(1, *rng.integers(0, 50, 2).tolist(), 90, 60)]:
            x, y = box.x1 + rng.normal(0, noise), box.y1 + rng.normal(0, noise)
            bbox = [x, y, box.x2 - box.x1, box.y2 - box.y1]
            score = round(float(rng.uniform(0.2, 1)), 6)
            results.append({"image_id": image_id, "category_id": box.label + 1, "bbox": bbox, "score": score})
    return results


def evaluated(folder: Path, name: str, pictures: list[Picture], results: list[dict[str, Any]]) -> Path:
    (folder / name / "test").mkdir(parents=True)
    write_annotations(folder / name, CLASSES, {"test": pictures}, {})
    for picture in pictures:
        Image.new("RGB", (100, 100)).save(folder / name / "test" / picture.name)
    (folder / f"{name}.json").write_text(json.dumps(results))
    arguments = ["evaluate", "--predictions", str(folder / f"{name}.json"), "--data", str(folder / name)]
    assert main([*arguments, "--output", str(folder / f"{name}-evaluation")]) == 0
    return folder / f"{name}-evaluation"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = pictures_of(0)
    return evaluated(tmp_path_factory.mktemp("good"), "good", pictures, results_of(pictures, 1, 0.9))


def change(changes: list[Change], name: str) -> Change:
    return next(each for each in changes if each.name == name)


def test_figures_of_every_picture_once_are_those_of_the_evaluation(good: Path) -> None:
    result, content = read_result(good), json.loads((good / "evaluation.json").read_text())
    figures = dict(zip(result.names, result.figures(np.ones(PICTURES, dtype=int)), strict=True))
    for name in ("map50", "map50_95", "precision", "recall", "f1", "f2"):
        assert figures[name] == pytest.approx(content["overall"][name], abs=1e-6)
    for entry in content["per_class"][:2]:
        assert figures[f"ap50:{entry['name']}"] == pytest.approx(entry["ap50"], abs=1e-6)
        assert figures[f"f2:{entry['name']}"] == pytest.approx(entry["f2"], abs=1e-6)
    assert np.isnan(figures["ap50:never there"]) and np.isnan(figures["f2:never there"])


def test_a_picture_that_is_drawn_twice_counts_twice(good: Path) -> None:
    pictures = pictures_of(0)
    results = results_of(pictures, 1, 0.9)
    weights = default_rng(5).integers(0, 3, PICTURES)
    drawn = np.repeat(np.arange(PICTURES), weights)
    truths = [truth_of(pictures[index]) for index in drawn]
    found = []
    for index in drawn:
        rows = [row for row in results if row["image_id"] == index + 1]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows)]
        found.append(found_of(boxes, [row["category_id"] - 1 for row in rows], [row["score"] for row in rows]))
    ap = average_precision(truths, found, len(CLASSES))
    f2 = operating_points(truths, found, len(CLASSES)).at(0.25).total().f(2)
    result = read_result(good)
    figures = dict(zip(result.names, result.figures(weights), strict=True))
    assert figures["map50"] == pytest.approx(ap.map50, abs=1e-9)
    assert figures["map50_95"] == pytest.approx(ap.map50_95, abs=1e-9)
    assert figures["f2"] == pytest.approx(float(f2), abs=1e-9)


def test_no_change_is_none(good: Path) -> None:
    result = read_result(good)
    for each in compare(result, result):
        if not np.isnan(each.before):
            assert (each.before, each.low, each.high) == (each.after, 0, 0)
            assert each.as_line(20).endswith("no clear change")


def test_noise_is_no_progress_but_losing_a_third_is_clear(good: Path, tmp_path: Path) -> None:
    pictures, before = pictures_of(0), read_result(good)
    other = read_result(evaluated(tmp_path, "other", pictures, results_of(pictures, 2, 0.9)))
    worse = read_result(evaluated(tmp_path, "worse", pictures, results_of(pictures, 3, 0.6)))
    noise, losses = compare(before, other), compare(before, worse)
    assert change(noise, "f2").before != change(noise, "f2").after
    for name in ("map50", "f2"):
        assert change(noise, name).as_line(10).endswith("no clear change")
        lost = change(losses, name)
        assert lost.high < 0 and lost.as_line(10).endswith("worse")
        won = Change(name, lost.after, lost.before, -lost.high, -lost.low)
        assert won.as_line(10).endswith("better")
        assert lost.low < lost.after - lost.before < lost.high


def test_a_comparison_is_the_same_each_time(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = pictures_of(0)
    worse = evaluated(tmp_path, "worse", pictures, results_of(pictures, 3, 0.6))
    capsys.readouterr()
    shown = []
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation").symlink_to(good)
    for before in (good / "evaluation.json", run):
        assert main(["evaluate", "compare", str(before), str(worse)]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "map50_95" in shown[0] and "f2:dog" in shown[0] and "worse" in shown[0]


def test_different_data_is_not_compared(good: Path, tmp_path: Path) -> None:
    pictures = pictures_of(0)
    box = next(box for picture in pictures for box in picture.boxes)
    moved = [
        Picture(each.file, each.name, 100, 100, tuple(Box(1 - b.label, *b.xyxy) if b is box else b for b in each.boxes))
        for each in pictures
    ]
    other = read_result(evaluated(tmp_path, "other", moved, results_of(pictures, 1, 0.9)))
    with pytest.raises(ToolError, match="different pictures, boxes or classes"):
        compare(read_result(good), other)


def test_a_broken_evaluation_is_named(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    content = json.loads((good / "evaluation.json").read_text())

    def read(text: str, matches: bytes = (good / "matches.npz").read_bytes()) -> Result:
        (folder / "evaluation.json").write_text(text)
        (folder / "matches.npz").write_bytes(matches)
        return read_result(folder)

    assert read(json.dumps(content)).classes == CLASSES
    fewer = content | {"per_class": content["per_class"][:1]}
    for text in ("{", "[]", "{}", json.dumps(fewer)):
        with pytest.raises(ToolError, match="broken cannot be read"):
            read(text)
    np.save(folder / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    for matches in (b"", b"PK\x03\x04 cut short", (folder / "pickled.npy").read_bytes()):
        with pytest.raises(ToolError, match="broken cannot be read"):
            read(json.dumps(content), matches)
