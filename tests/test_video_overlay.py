"""Boxes on frames, and numbers that stay with their objects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.drawing import class_colour
from tools.errors import ToolError
from tools.video.overlay import Overlay

LABELS = [f"class {index}" for index in range(30)]
GREY = 90


def scene(width=200, height=120):
    return np.full((height, width, 3), GREY, np.uint8)


def found(box=(20.0, 50.0, 120.0, 100.0), index=0, score=0.9, label=None):
    return {"label": label or LABELS[index], "index": index, "score": score, "box": list(box)}


def changed(pixels):
    return (pixels != GREY).any(axis=2)


def plain(**how):
    return Overlay(LABELS, hide_labels=True, hide_scores=True, **how)


@pytest.mark.parametrize("index", [0, 1, 6, 7, 29, 500])
def test_a_class_has_the_same_colour_as_in_the_servers_pictures(index):
    drawn = plain().draw(scene(), [found(index=index, label="any")])
    assert tuple(drawn[75, 20]) == class_colour(index)
    assert not changed(drawn)[60:90, 40:100].any()


def test_the_picture_itself_is_left_alone():
    pixels = scene()
    drawn = Overlay(LABELS).draw(pixels, [found()])
    assert (pixels == GREY).all() and drawn is not pixels and drawn.dtype == np.uint8
    empty = Overlay(LABELS).draw(pixels, [])
    assert (empty == GREY).all() and empty is not pixels


def test_labels_and_scores_are_shown_or_hidden():
    areas = {}
    for hide_labels in (False, True):
        for hide_scores in (False, True):
            overlay = Overlay(LABELS, hide_labels=hide_labels, hide_scores=hide_scores)
            areas[hide_labels, hide_scores] = int(changed(overlay.draw(scene(), [found()])).sum())
    assert areas[True, True] < min(areas[True, False], areas[False, True])
    assert max(areas[True, False], areas[False, True]) < areas[False, False]


def test_a_number_is_shown_even_without_label_and_score():
    assert (
        changed(plain().draw(scene(), [found() | {"track": 3}])).sum() > changed(plain().draw(scene(), [found()])).sum()
    )
    without = plain().draw(scene(), [found() | {"track": None}])
    assert np.array_equal(without, plain().draw(scene(), [found()]))


def test_captions_are_readable_on_their_colour():
    dark = Overlay(LABELS).draw(scene(), [found(index=4)])
    light = Overlay(LABELS).draw(scene(), [found(index=3)])
    assert (dark > 240).all(axis=2).any() and not (dark < 10).all(axis=2).any()
    assert (light < 10).all(axis=2).any() and not (light > 240).all(axis=2).any()


def test_a_caption_over_the_upper_border_moves_into_the_picture():
    areas = [
        changed(Overlay(LABELS).draw(scene(), [found((20, y, 120, y + 50))])).sum()
        - changed(plain().draw(scene(), [found((20, y, 120, y + 50))])).sum()
        for y in (0, 50)
    ]
    # Where it lies on the box's own border, that border is not counted again.
    assert areas[1] >= areas[0] > 0.7 * areas[1]


def test_lines_and_captions_grow_with_the_line_width():
    thin, thick = (changed(Overlay(LABELS, line_width=width).draw(scene(), [found()])).sum() for width in (1, 6))
    assert thick > 2 * thin


def test_the_best_boxes_lie_on_top():
    weak, strong = found(index=0, score=0.3), found(index=1, score=0.8)
    for order in ([weak, strong], [strong, weak]):
        assert tuple(plain().draw(scene(), order)[75, 20]) == class_colour(1)


def test_only_the_classes_asked_for_are_drawn():
    both = [found((10, 50, 60, 100), index=0), found((100, 50, 160, 100), index=1)]
    drawn = changed(Overlay(LABELS, classes=["class 1"]).draw(scene(), both))
    assert drawn[:, 90:].any() and not drawn[:, :80].any()
    assert not changed(Overlay(LABELS, classes=[]).draw(scene(), both)).any()


def test_a_class_that_the_model_does_not_have():
    with pytest.raises(ToolError, match=r"no class 'dgo'; the model knows cat, dog"):
        Overlay(["cat", "dog"], classes=["cat", "dgo"])
    Overlay([], classes=["dgo"])  # whose labels are not known


def test_a_line_of_no_width():
    with pytest.raises(ToolError, match="line width of 0"):
        Overlay(LABELS, line_width=0)


@pytest.mark.parametrize(
    "box",
    [
        (-50, -50, -10, -10),
        (300, 10, 400, 50),
        (10, 200, 50, 300),
        (float("nan"), 10, 50, 60),
        (10, 10, float("nan"), 60),
    ],
)
def test_boxes_outside_or_without_figures_are_left_out(box):
    assert not changed(Overlay(LABELS).draw(scene(), [found(box)])).any()


def test_a_box_larger_than_the_picture_is_cut():
    drawn = plain().draw(scene(), [found((-1e30, -1e30, float("inf"), 1e30))])
    assert changed(drawn)[0].all() and changed(drawn)[-1].all() and not changed(drawn)[10:-10, 10:-10].any()


coordinates = st.one_of(
    st.floats(-1e12, 1e12), st.floats(-300, 300), st.sampled_from([0.0, 1.0, 199.0, 200.0, -0.5, float("inf")])
)


@given(
    boxes=st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=5),
    line_width=st.integers(1, 9),
    size=st.tuples(st.integers(1, 220), st.integers(1, 220)),
    label=st.text(max_size=20),
)
def test_no_box_and_no_label_stops_the_drawing(boxes, line_width, size, label):
    pixels = scene(*size)
    detections = [found(box, index, label=label or "x") for index, box in enumerate(boxes)]
    drawn = Overlay([], line_width=line_width).draw(pixels, detections)
    assert drawn.shape == pixels.shape and drawn.dtype == np.uint8


# Numbers


def paths(frames):
    """Two objects that pass each other, given in an order that changes from frame to frame."""
    for frame in range(frames):
        right = found((10 + 6 * frame, 10, 50 + 6 * frame, 50), index=0)
        left = found((300 - 6 * frame, 70, 340 - 6 * frame, 110), index=1)
        yield [right, left] if frame % 2 else [left, right]


def test_objects_keep_their_numbers_and_their_order():
    overlay = Overlay(LABELS, track=True)
    seen = {0: set(), 1: set()}
    for frame, detections in enumerate(paths(40)):
        tracked = overlay.track(detections, frame / 30)
        assert [{key: one[key] for key in detections[0]} for one in tracked] == detections
        for one in tracked:
            seen[one["index"]].add(one["track"])
        assert "track" not in detections[0]
    numbers = [numbers - {None} for numbers in seen.values()]
    assert [len(one) for one in numbers] == [1, 1] and numbers[0] != numbers[1]
    assert all(isinstance(number, int) for one in numbers for number in one)


def test_an_object_hidden_for_some_frames_keeps_its_number():
    overlay = Overlay(LABELS, track=True)
    numbers = []
    for frame in range(30):
        hidden = 10 <= frame < 15
        tracked = overlay.track([] if hidden else [found((10 + frame, 10, 60 + frame, 60))], frame / 30)
        numbers += [one["track"] for one in tracked]
    assert numbers[0] is None and set(numbers[1:10]) == set(numbers[-5:]) and None not in numbers[-5:]


def test_what_is_seen_once_or_hardly_has_no_number():
    overlay = Overlay(LABELS, track=True)
    assert [one["track"] for one in overlay.track([found(score=0.9), found((130, 10, 190, 60), score=0.1)])] == [
        None
    ] * 2
    tracked = overlay.track([found(score=0.9), found((130, 10, 190, 60), score=0.1)])
    assert [one["track"] is None for one in tracked] == [False, True]


def test_a_small_networks_scores_are_enough_for_a_number():
    overlay = Overlay(LABELS, track=True)
    for _ in range(3):
        tracked = overlay.track([found(score=0.4)])
    assert tracked[0]["track"] is not None


def test_frames_without_objects_and_boxes_without_area():
    overlay = Overlay(LABELS, track=True)
    assert overlay.track([]) == []
    for _ in range(3):
        assert len(overlay.track([found((10, 10, 10, 10)), found((50, 50, 40, 40))])) == 2
    assert overlay.track([]) == []


def test_without_tracking_nothing_is_added():
    overlay = Overlay(LABELS)
    assert not overlay.tracks and overlay.track([found()]) == [found()]
    assert Overlay(LABELS, track=True).tracks
