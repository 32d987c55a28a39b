"""Average precision as pycocotools gives it; precision, recall, F1 and F2 by hand."""

import gzip
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.data.dataset import Box, Picture
from tools.evaluate.metrics import (
    IOU_THRESHOLDS,
    Found,
    Truth,
    average_precision,
    confusion_matrix,
    fitness,
    found_of,
    iou,
    match,
    operating_points,
    truth_of,
)

NOTHING = found_of([], [], [])
SQUARE = [0.0, 0.0, 10.0, 10.0]


def truth(*boxes: tuple[list[float], int], crowd: tuple[bool, ...] = ()) -> Truth:
    picture = Picture(
        Path("a.png"),
        "a.png",
        5000,
        5000,
        tuple(Box(label, *box, crowd=index < len(crowd) and crowd[index]) for index, (box, label) in enumerate(boxes)),
    )
    return truth_of(picture)


def found(*detections: tuple[list[float], int, float]) -> Found:
    return found_of(*zip(*detections, strict=True)) if detections else NOTHING


def counts(truths: list[Truth], answers: list[Found], classes: int = 2, threshold: float = 0.0) -> tuple[int, ...]:
    return tuple(int(part) for part in operating_points(truths, answers, classes).at(threshold).total())


def f_of(truths: list[Truth], answers: list[Found], beta: int = 2, threshold: float = 0.0) -> float:
    return float(operating_points(truths, answers, 2).at(threshold).total().f(beta))


# ---- F2 by hand: 5 TP / (5 TP + 4 FN + FP)


@pytest.mark.parametrize("corner", [0, 4000])
def test_a_shifted_pair_is_judged_alike_wherever_it_lies(corner: float) -> None:
    # Shifted by 3 of 10: IoU 70 / 130 = 0.54, a hit. By 4: 60 / 140 = 0.43, none.
    there = [truth(([corner, corner, corner + 10, corner + 10], 0))]
    hit = [found(([corner + 3, corner, corner + 13, corner + 10], 0, 0.9))]
    miss = [found(([corner + 4, corner, corner + 14, corner + 10], 0, 0.9))]
    assert counts(there, hit) == (1, 0, 0)
    assert counts(there, miss) == (0, 1, 1)
    assert (f_of(there, hit), f_of(there, miss)) == (1, 0)


def test_the_right_box_with_the_wrong_class_is_a_miss_and_a_false_alarm() -> None:
    there, answer = [truth((SQUARE, 0))], [found((SQUARE, 1, 0.9))]
    assert counts(there, answer) == (0, 1, 1)
    assert f_of(there, answer) == 0


def test_a_picture_without_objects_counts_its_false_alarms() -> None:
    there = [truth((SQUARE, 0)), truth()]
    assert f_of(there, [found((SQUARE, 0, 0.9)), NOTHING]) == 1
    answer = [found((SQUARE, 0, 0.9)), found((SQUARE, 0, 0.9))]
    assert counts(there, answer) == (1, 1, 0)
    assert f_of(there, answer) == pytest.approx(5 / 6)
    assert f_of(there, answer, beta=1) == pytest.approx(2 / 3)


def test_no_detection_at_all_is_all_missed() -> None:
    there = [truth((SQUARE, 0), (SQUARE, 1))]
    total = operating_points(there, [NOTHING], 2).at(0).total()
    assert tuple(total) == (0, 0, 2)
    assert math.isnan(total.precision)
    assert (total.recall, total.f(1), total.f(2)) == (0, 0, 0)


def test_everything_empty_cannot_be_said() -> None:
    for truths, answers in (([], []), ([truth()], [NOTHING])):
        curves = operating_points(truths, answers, 2)
        total = curves.at(0.5).total()
        assert all(math.isnan(value) for value in (total.precision, total.recall, total.f(1), total.f(2)))
        threshold, value = curves.best(2)
        assert threshold == 0 and math.isnan(value)
        ap = average_precision(truths, answers, 2)
        assert math.isnan(ap.map50) and math.isnan(fitness(ap)) and np.isnan(ap.ap).all()


def test_a_miss_weighs_four_times_a_false_alarm_in_f2() -> None:
    there = [truth((SQUARE, 0), ([50, 50, 60, 60], 0), ([100, 50, 110, 60], 0))]
    answer = [found((SQUARE, 0, 0.9), ([52, 50, 62, 60], 0, 0.8), ([200, 0, 210, 10], 0, 0.7))]
    assert counts(there, answer) == (2, 1, 1)
    assert f_of(there, answer, 2) == pytest.approx(10 / 15)
    assert f_of(there, answer, 1) == pytest.approx(4 / 6)


def test_pictures_do_not_weigh_by_how_they_are_grouped() -> None:
    there = [truth((SQUARE, 0)), truth((SQUARE, 0), ([50, 50, 60, 60], 1)), truth()]
    answers = [found((SQUARE, 0, 0.9)), NOTHING, found((SQUARE, 1, 0.6))]
    assert counts(there, answers) == (1, 1, 2)
    order = [2, 0, 1]
    assert counts([there[i] for i in order], [answers[i] for i in order]) == (1, 1, 2)


# ---- matching


def test_each_truth_is_hit_once_and_the_better_score_chooses_first() -> None:
    there = [truth((SQUARE, 0))]
    answer = [found(([1, 0, 11, 10], 0, 0.5), (SQUARE, 0, 0.4))]
    assert counts(there, answer) == (1, 1, 0)
    matches = match(there, answer, 1)
    assert matches.score.tolist() == [0.5, 0.4] and matches.state[:, 0].tolist() == [1, 0]


def test_a_detection_takes_the_free_truth_of_highest_overlap() -> None:
    there = [truth(([2, 0, 12, 10], 0), (SQUARE, 0))]
    answer = [found(([0, 0, 10, 10], 0, 0.9), ([1, 0, 11, 10], 0, 0.8))]
    assert counts(there, answer) == (2, 0, 0)


def test_a_crowd_is_neither_missed_nor_a_reason_for_false_alarms() -> None:
    there = [truth(([0, 0, 100, 100], 0), crowd=(True,))]
    assert counts(there, [NOTHING]) == (0, 0, 0)
    inside = [found((SQUARE, 0, 0.9), ([20, 20, 30, 30], 0, 0.8))]
    assert counts(there, inside) == (0, 0, 0)
    assert counts(there, [found((SQUARE, 1, 0.9))]) == (0, 1, 0)
    assert counts(there, [found(([96, 0, 106, 10], 0, 0.9))]) == (0, 1, 0)


def test_boxes_without_area_hit_nothing() -> None:
    point = [5.0, 5.0, 5.0, 5.0]
    assert counts([truth((point, 0))], [found((point, 0, 0.9))]) == (0, 1, 1)
    assert iou(np.zeros((0, 4)), np.array([SQUARE])).shape == (0, 1)


def test_detections_of_a_network_are_taken_as_they_come() -> None:
    import torch

    from model_defs.contract import Detections

    answer = Detections(torch.tensor([SQUARE]), torch.tensor([0]), torch.tensor([0.9]))
    assert counts([truth((SQUARE, 0))], [answer]) == (1, 0, 0)
    assert average_precision([truth((SQUARE, 0))], [answer], 1).map50 == pytest.approx(1)


# ---- thresholds


def test_a_detection_counts_when_its_score_is_above_the_threshold() -> None:
    there = [truth((SQUARE, 0))]
    answer = [found((SQUARE, 0, 0.5), ([50, 50, 60, 60], 0, 0.25))]
    assert counts(there, answer, threshold=0.1) == (1, 1, 0)
    assert counts(there, answer, threshold=0.25) == (1, 0, 0)
    assert counts(there, answer, threshold=0.4999) == (1, 0, 0)
    assert counts(there, answer, threshold=0.5) == (0, 0, 1)
    assert operating_points(there, answer, 1).best(1) == (0.25, 1.0)


boxes = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda b: [float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3])]
)
scores = st.integers(1, 99).map(lambda n: n / 100)
scenes = st.tuples(
    st.lists(st.tuples(boxes, st.integers(0, 1)), max_size=4),
    st.lists(st.tuples(boxes, st.integers(0, 1), scores), max_size=6, unique_by=lambda d: d[2]),
)


@given(st.lists(scenes, min_size=1, max_size=4), scores)
def test_a_curve_gives_what_the_detections_above_the_threshold_give_alone(scene: Any, threshold: float) -> None:
    truths = [truth(*there) for there, _ in scene]
    above = [found(*(d for d in seen if d[2] > threshold)) for _, seen in scene]
    curves = operating_points(truths, [found(*seen) for _, seen in scene], 2)
    alone = operating_points(truths, above, 2).at(0)
    for one, other in zip(curves.at(threshold), alone, strict=True):
        assert one.tolist() == other.tolist()
    assert ((curves.at(threshold).tp + curves.at(threshold).fn) == curves.there).all()


# ---- confusion


def test_the_confusion_matrix_pairs_across_classes_best_overlap_first() -> None:
    there = [truth((SQUARE, 0), ([50, 50, 60, 60], 1), ([80, 80, 90, 90], 0))]
    answer = [
        found(
            ([1, 0, 11, 10], 0, 0.9),  # overlaps the first truth less than the next does
            (SQUARE, 1, 0.6),
            ([50, 50, 60, 60], 1, 0.5),
            ([80, 80, 90, 90], 0, 0.2),  # below the threshold
        )
    ]
    assert confusion_matrix(there, answer, 2, 0.3).tolist() == [[0, 1, 1], [0, 1, 0], [1, 0, 0]]


def test_what_lies_in_a_crowd_is_not_confused_with_background() -> None:
    there = [truth(([0, 0, 100, 100], 0), crowd=(True,))]
    answer = [found((SQUARE, 0, 0.9), (SQUARE, 1, 0.8))]
    assert confusion_matrix(there, answer, 2, 0.1).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


# ---- average precision against pycocotools


def coco_case(annotations: Path, predictions: Any) -> tuple[list[Truth], list[Found], list[str]]:
    content = json.loads(annotations.read_text())
    label = {category["id"]: index for index, category in enumerate(content["categories"])}
    there, seen = defaultdict(list), defaultdict(list)
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        there[entry["image_id"]].append(Box(label[entry["category_id"]], x, y, x + w, y + h, bool(entry["iscrowd"])))
    for entry in predictions:
        x, y, w, h = entry["bbox"]
        if entry["category_id"] in label:
            seen[entry["image_id"]].append(([x, y, x + w, y + h], label[entry["category_id"]], entry["score"]))
    truths = [
        truth_of(Picture(Path(image["file_name"]), image["file_name"], 1, 1, tuple(there[image["id"]])))
        for image in content["images"]
    ]
    answers = [found(*seen[image["id"]]) for image in content["images"]]
    return truths, answers, [category["name"] for category in content["categories"]]


def read_gzip(path: Path) -> Any:
    with gzip.open(path) as file:
        return json.load(file)


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "result"),
    [
        ("coco_mini_val_predictions_rect640.json.gz", "yolov5n val.py predictions (rect640, conf 0.001, iou 0.6)"),
        ("coco_mini_yolox_nano_predictions.json.gz", "yolox"),
    ],
)
def test_stored_predictions_on_coco_photos_get_the_figures_of_pycocotools(shared: Path, file: str, result: str) -> None:
    reference = shared / "real" / "reference"
    results = json.loads((reference / "coco_mini_ap.json").read_text())["results"]
    expected = next(value for name, value in results.items() if name.startswith(result))
    truths, answers, names = coco_case(shared / "real" / "coco_mini" / "instances.json", read_gzip(reference / file))
    ap = average_precision(truths, answers, len(names))
    assert ap.map50_95 == pytest.approx(expected["AP"], abs=0.001)
    assert ap.map50 == pytest.approx(expected["AP50"], abs=0.001)
    assert ap.map75 == pytest.approx(expected["AP75"], abs=0.001)
    sizes = [expected["AP_small"], expected["AP_medium"], expected["AP_large"]]
    assert [ap.small, ap.medium, ap.large] == pytest.approx(sizes, abs=0.001)
    by_class = {name: value for name, value in zip(names, ap.ap.tolist(), strict=True) if not math.isnan(value)}
    assert by_class == pytest.approx(expected["per_class_AP"], abs=0.001)


@pytest.mark.real
def test_stored_predictions_on_blood_cells_get_the_figures_of_pycocotools(
    shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    predictions = read_gzip(shared / "real" / "reference" / "bccd_val_predictions.json.gz")
    truths, answers, names = coco_case(shared / "real" / "bccd" / "val_coco.json", predictions)
    ap = average_precision(truths, answers, len(names))
    assert [ap.map50_95, ap.map50, ap.map75] == pytest.approx([0.46652, 0.82342, 0.47837], abs=0.001)
    assert fitness(ap) == pytest.approx(0.1 * 0.82342 + 0.9 * 0.46652, abs=0.001)
    assert capfd.readouterr() == ("", "")


@given(st.lists(scenes, min_size=1, max_size=3))
def test_matches_are_those_that_average_precision_is_made_of(scene: Any) -> None:
    """Average precision at 101 recalls, from our matches, is COCO's: the two ways agree on who hits whom."""
    truths, answers = [truth(*there) for there, _ in scene], [found(*seen) for _, seen in scene]
    ap = average_precision(truths, answers, 2)
    matches = match(truths, answers, 2, IOU_THRESHOLDS, limit=100)
    order = np.argsort(-matches.score, kind="stable")
    for label in range(2):
        rows = order[matches.label[order] == label]
        total = int(matches.there[:, label].sum())
        if not total:
            assert np.isnan(ap.ap50[label])
            continue
        hits = np.cumsum(matches.state[rows, 0] == 1)
        precision = hits / np.arange(1, len(rows) + 1)
        best_later = [precision[hits / total >= recall].max(initial=0) for recall in np.linspace(0, 1, 101)]
        assert ap.ap50[label] == pytest.approx(np.mean(best_later), abs=1e-9)
