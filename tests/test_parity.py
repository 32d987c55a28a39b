"""How far two networks' answers are apart, the bounds on it, and the pictures that it is measured on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folder import assert_one_line, encode, scene
from train_set import write_set

from handlers.pipeline import Pipeline
from handlers.settings import Runtime
from model_defs.contract import Detections
from tools.archive.recipe import Parity
from tools.errors import ToolError
from tools.export.calibration import ALL, MOST_FITTED, Letterboxed, read_calibration
from tools.export.parity import BOUNDS, Bounds, Difference, Report, beyond, bounds_of, difference

CLEAR = 0.3
STRICT = BOUNDS["fp32"]
SAME = Difference("a.jpg", 10, 1.0, 0.0, 0, 0)


def detections(*rows: tuple[float, int, float]) -> Detections:
    """Squares of 100 pixels: left edge, label, score."""
    boxes = torch.tensor([[left, 0, left + 100, 100] for left, _, _ in rows], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in rows], dtype=torch.int64)
    return Detections(boxes, labels, torch.tensor([score for _, _, score in rows], dtype=torch.float32))


def apart(expected: Detections, found: Detections) -> tuple[float, float, int, int]:
    each = difference("a.jpg", expected, found, CLEAR)
    return round(each.iou, 3), round(each.score, 3), each.gained, each.lost


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.floats(0.25, 1)), max_size=12, unique_by=lambda r: r[:2]
    )
)
def test_equal_answers_are_not_apart(rows: list[tuple[int, int, float]]) -> None:
    found = detections(*((left * 200, label, score) for left, label, score in sorted(rows, key=lambda row: -row[2])))
    assert apart(found, found) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("expected", "found", "figures"),
    [
        ([], [], (1, 0, 0, 0)),
        ([(0, 0, 0.9)], [], (1, 0, 0, 1)),
        ([], [(0, 0, 0.9)], (1, 0, 1, 0)),
        # Just above the threshold it may come or go.
        ([(0, 0, 0.29)], [], (1, 0, 0, 0)),
        ([], [(0, 0, 0.29)], (1, 0, 0, 0)),
        ([(0, 0, 0.9)], [(25, 0, 0.8)], (0.6, 0.1, 0, 0)),
        ([(0, 0, 0.9)], [(25, 0, 0.98)], (0.6, 0.08, 0, 0)),
        # Another class, or half of the box beside it, is another object.
        ([(0, 0, 0.9)], [(0, 1, 0.9)], (1, 0, 1, 1)),
        ([(0, 0, 0.9)], [(50, 0, 0.9)], (1, 0, 1, 1)),
        # The best score chooses first, and what it chose is taken.
        ([(0, 0, 0.9), (10, 0, 0.8)], [(0, 0, 0.9)], (1, 0, 0, 1)),
        ([(0, 0, 0.9), (10, 0, 0.8)], [(10, 0, 0.9), (0, 0, 0.8)], (1, 0.1, 0, 0)),
    ],
)
def test_pairs(
    expected: list[tuple[float, int, float]],
    found: list[tuple[float, int, float]],
    figures: tuple[float, float, int, int],
) -> None:
    assert apart(detections(*expected), detections(*found)) == figures


def test_bounds_follow_the_precision_and_the_recipe() -> None:
    assert bounds_of("fp32", Parity()) == Bounds(0.99, 0.005, 0, 0, 0.002)
    assert bounds_of("int8", Parity(min_iou=0.9)) == replace(BOUNDS["int8"], min_iou=0.9)


@pytest.mark.parametrize(
    ("changes", "map50_95", "words"),
    [
        ({"iou": 0.98}, None, ("a box of b.jpg has IoU 0.9800", "parity.min_iou is 0.99")),
        ({"score": 0.006}, None, ("a score on b.jpg differs by 0.0060", "parity.max_score_difference is 0.005")),
        ({"gained": 1}, None, ("1 beside 20 detections are gained, most of them on b.jpg", "parity.max_gained is 0")),
        ({"lost": 2}, None, ("2 beside 20 detections are lost, most of them on b.jpg", "parity.max_lost is 0")),
        ({}, (0.36, 0.35), ("mAP50-95 goes from 0.3600 to 0.3500", "parity.max_map_drop is 0.002")),
    ],
)
def test_out_of_bounds_names_figure_bound_and_picture(
    changes: dict[str, float], map50_95: tuple[float, float] | None, words: tuple[str, str]
) -> None:
    report = Report([SAME, SAME._replace(picture="b.jpg", **changes), SAME._replace(detections=0)], map50_95)
    told = beyond(report, STRICT)
    assert told is not None and "\n" not in told
    assert all(word in told for word in words)


@pytest.mark.parametrize("map50_95", [None, (0.36, 0.3581), (0.36, 0.4)])
def test_in_bounds(map50_95: tuple[float, float] | None) -> None:
    assert beyond(Report([SAME, SAME._replace(iou=0.99, score=0.005)], map50_95), STRICT) is None
    assert beyond(Report([], None), STRICT) is None


def test_gained_and_lost_count_a_hundred_at_a_time() -> None:
    bounds = replace(STRICT, max_lost=1)
    for detected, lost, fits in ((3, 1, True), (3, 2, False), (100, 2, False), (101, 2, True)):
        report = Report([SAME._replace(detections=detected, lost=lost)], None)
        told = beyond(report, bounds)
        assert told is None if fits else "lost" in str(told)


def test_the_report_says_the_worst_of_all_pictures() -> None:
    report = Report([SAME._replace(iou=0.97, gained=2), SAME._replace(score=0.012345, lost=1)], (0.36021, 0.35))
    assert report.document() == {
        "pictures": 2,
        "detections": 20,
        "min_iou": 0.97,
        "max_score_difference": 0.0123,
        "gained": 2,
        "lost": 1,
        "map50_95": {"torch": 0.3602, "archive": 0.35},
    }
    assert report.line() == (
        "parity with torch in fp32 on 2 pictures, 20 detections: lowest IoU 0.9700, largest score difference 0.0123,"
        " 2 gained, 1 lost; mAP50-95 0.3500, of torch 0.3602"
    )
    assert "not compared" in Report([], None).line()
    assert "nothing is proven" in Report([SAME._replace(detections=0)] * 2, None).line()
    assert "0 detections" in Report([SAME._replace(detections=0, gained=1)], None).line()


def test_calibration_takes_pictures_of_every_format_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for name, form in (("b.jpg", "JPEG"), ("a.bin", "PNG"), ("deeper/c.webp", "WEBP")):
        (tmp_path / name).write_bytes(encode(scene(32, 32), form))
    (tmp_path / "notes.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    calibration = read_calibration(tmp_path, Runtime("openvino", "int8"))
    assert [path.name for path in calibration.compared] == ["a.bin", "b.jpg", "c.webp"]
    assert calibration.fitted == calibration.compared
    assert calibration.dataset is None


def test_of_many_pictures_some_from_all_over_are_fitted(tmp_path: Path) -> None:
    for number in range(MOST_FITTED + 10):
        (tmp_path / f"{number:04}.bmp").write_bytes(b"BM")
    calibration = read_calibration(tmp_path, Runtime())
    assert len(calibration.compared) == MOST_FITTED + 10
    assert len(calibration.fitted) == (MOST_FITTED + 10) // 2
    assert calibration.fitted[-1] == calibration.compared[-2]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "no picture"])
def test_calibration_without_pictures_is_one_line(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "pictures"
    if there != "nothing":
        folder.mkdir()
    if there == "no picture":
        (folder / "notes.txt").write_text("later")
    with pytest.raises(ToolError, match="calibration folder") as caught:
        read_calibration(folder, Runtime())
    assert_one_line(caught.value)
    assert str(folder) in str(caught.value)


def test_int8_needs_pictures_and_others_do_not() -> None:
    with pytest.raises(ToolError, match="--calibration DIR") as caught:
        read_calibration(None, Runtime("openvino", "int8"))
    assert_one_line(caught.value)
    assert not read_calibration(None, Runtime("openvino", "bf16")).compared


def test_a_labelled_set_is_compared_with_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all of its splits; of many pictures, on some from all over."""
    folder = write_set(tmp_path / "set", train=3, valid=2)
    calibration = read_calibration(folder, Runtime())
    assert [len(calibration.fitted), len(calibration.compared)] == [5, 5]
    assert calibration.dataset is not None
    assert [picture.file for picture in calibration.dataset.split(ALL)] == calibration.compared
    monkeypatch.setattr("tools.export.calibration.MOST_COMPARED", 3)
    fewer = read_calibration(folder, Runtime())
    assert [path.parent.name for path in fewer.compared] == ["train", "train", "valid"]


def test_a_labelled_set_without_pictures_is_one_line(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", train=0, valid=0)
    with pytest.raises(ToolError, match="has no pictures"):
        read_calibration(folder, Runtime())


def test_a_calibration_picture_that_is_broken_is_named(small_pipeline: Pipeline, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.png", tmp_path / "half.png"
    whole.write_bytes(encode(scene(60, 120)))
    half.write_bytes(whole.read_bytes()[:100])
    pictures = Letterboxed(small_pipeline, [whole, half])
    assert len(pictures) == 2
    for _ in range(2):
        reading = iter(pictures)
        assert next(reading).shape == (3, 160, 320)
        with pytest.raises(ToolError, match=r"calibration picture .*half\.png cannot be used: .*truncated") as caught:
            next(reading)
        assert_one_line(caught.value)
