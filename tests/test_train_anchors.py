from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng

from tools.data.dataset import Box, Picture
from tools.train.anchors import ENOUGH_RECALL, box_sides, check_anchors, recall

COCO = np.array(
    [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]], dtype=float
)


def pictures_of(sides: Sequence[tuple[float, float]], width: int = 640, height: int = 480) -> list[Picture]:
    return [Picture(Path("a.jpg"), "a.jpg", width, height, (Box(0, 5, 5, 5 + w, 5 + h),)) for w, h in sides]


def test_anchors_that_fit_stay() -> None:
    check = check_anchors(COCO, pictures_of([(20, 25), (100, 90), (300, 200)]), 640, seed=0)
    assert check.recall_before == check.recall_after == 1
    assert not check.changed
    assert check.anchors is COCO


def test_anchors_that_do_not_fit_are_found_anew() -> None:
    rng = default_rng(0)
    sides = [(float(w), float(w) * 30) for w in rng.uniform(3, 20, 200)]  # tall and thin: few match COCO's
    pictures = pictures_of(sides)
    check = check_anchors(COCO, pictures, 640, seed=0)
    assert check.recall_before < ENOUGH_RECALL < check.recall_after
    assert check.changed
    assert check.anchors.shape == COCO.shape
    areas = check.anchors.prod(axis=2).ravel()
    assert (np.diff(areas) >= 0).all()
    assert check.recall_after == recall(check.anchors, box_sides(pictures, 640))
    again = check_anchors(COCO, pictures, 640, seed=0)
    assert np.array_equal(check.anchors, again.anchors)


def test_recall_counts_the_ratio_of_the_loss() -> None:
    anchors = np.array([(20.0, 20.0)])
    sides = np.array([(79.0, 20), (81, 20), (20, 5.1), (20, 4.9), (79, 5.1)])
    assert recall(anchors, sides) == pytest.approx(3 / 5)


def test_sides_are_those_at_the_training_size() -> None:
    boxes = (Box(0, 0, 0, 64, 32), Box(0, 0, 0, 64, 32, crowd=True), Box(1, 0, 0, 3, 30))
    sides = box_sides([Picture(Path("a.jpg"), "a.jpg", 640, 480, boxes)], 320)
    assert sides.tolist() == [[32, 16]]  # without the crowd, and without what is too small to be trained on


@pytest.mark.parametrize("sides", [[], [(9.0, 300.0)], [(9.0, 300.0)] * 30, [(9.0, 300.0), (300.0, 12.0)]])
def test_few_boxes_or_none(sides: list[tuple[float, float]]) -> None:
    check = check_anchors(COCO, pictures_of(sides), 640, seed=0)
    assert np.isfinite(check.anchors).all() and (check.anchors > 0).all()
    assert check.recall_after == 1.0
    assert check.changed == bool(sides)


def test_four_levels_get_anchors_too() -> None:
    four = np.full((4, 3, 2), 500.0)
    check = check_anchors(four, pictures_of([(10, 10), (40, 50), (90, 60), (200, 210)]), 640, seed=1)
    assert check.changed and check.anchors.shape == (4, 3, 2) and check.recall_after == 1.0


def test_new_anchors_are_not_taken_when_no_better() -> None:
    # One anchor cannot learn both ends; whichever is found learns no more than the given one.
    one = np.array([[(4.0, 4.0)]])
    check = check_anchors(one, pictures_of([(4, 4), (400, 400)]), 640, seed=0)
    assert not check.changed and check.recall_after == check.recall_before == 0.5
    assert check.anchors is one
