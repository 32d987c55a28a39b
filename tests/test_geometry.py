"""Letterbox and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.geometry import PADDING, clip, letterbox, plan_letterbox, unletterbox
from handlers.settings import Preprocess

SIDES = st.integers(1, 4000)
SHAPES = st.sampled_from(["rect", "square"])


@given(SIDES, SIDES, SHAPES, st.sampled_from([320, 640, 1280]), st.sampled_from([32, 64]))
def test_plan_holds_the_picture(height, width, shape, size, stride):
    plan = plan_letterbox(height, width, Preprocess(size, shape), stride)
    sides = (plan.content_height, plan.canvas_height, plan.top), (plan.content_width, plan.canvas_width, plan.left)
    assert max(plan.content_height, plan.content_width) == size
    for content, canvas, before in sides:
        assert canvas % stride == 0
        after = canvas - content - before
        assert 0 <= before <= after <= before + 1
        assert canvas == size if shape == "square" else canvas - content < stride
    # The aspect stays, to the rounding of a pixel.
    scale = size / max(height, width)
    assert abs(plan.content_height - height * scale) <= max(0.5, 1 - height * scale)
    assert abs(plan.content_width - width * scale) <= max(0.5, 1 - width * scale)


@given(st.data(), SIDES, SIDES, SHAPES)
def test_boxes_come_back(data, height, width, shape):
    plan = plan_letterbox(height, width, Preprocess(640, shape), 32)
    fractions = data.draw(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
    box = torch.tensor([fractions], dtype=torch.float64) * torch.tensor([width, height] * 2)
    place = torch.tensor([plan.left, plan.top] * 2)
    grown = torch.tensor([plan.content_width / width, plan.content_height / height] * 2)
    back = unletterbox(box * grown + place, plan)
    # Half a pixel of padding and up to one of rounding, in pixels of the canvas.
    assert (back - box).abs().max() <= 1.5 * max(height, width) / 640 + 1e-6


def test_a_picture_of_the_right_size_is_left_alone():
    picture = torch.randint(256, (3, 640, 640), dtype=torch.uint8)
    for shape in ("rect", "square"):
        plan = plan_letterbox(640, 640, Preprocess(640, shape), 32)
        assert torch.equal(letterbox(picture, plan), picture)
        boxes = torch.tensor([[1.0, 2, 3, 4]])
        assert torch.equal(unletterbox(boxes, plan), boxes)


@pytest.mark.parametrize(
    ("height", "width", "shape", "canvas", "place"),
    [
        (480, 640, "rect", (480, 640), (0, 0)),
        (480, 640, "square", (640, 640), (80, 0)),
        (427, 640, "rect", (448, 640), (10, 0)),  # 21 rows of padding: 10 above, 11 below
        (640, 427, "square", (640, 640), (0, 106)),
        (1, 1, "rect", (640, 640), (0, 0)),
        (1, 4000, "rect", (32, 640), (15, 0)),
    ],
)
def test_padding_lies_around_the_picture(height, width, shape, canvas, place):
    plan = plan_letterbox(height, width, Preprocess(640, shape), 32)
    laid = letterbox(torch.full((3, height, width), 7, dtype=torch.uint8), plan)
    expected = torch.full((3, *canvas), PADDING, dtype=torch.uint8)
    top, left = place
    expected[:, top : top + plan.content_height, left : left + plan.content_width] = 7
    assert torch.equal(laid, expected)


def test_letterbox_equals_the_reference(shared):
    """Made by the YOLOv5 project's own program with OpenCV's resize; see real/README.md."""
    with Image.open(shared / "real/numeric/bus_letterbox_square640.png") as file:
        expected = np.array(file).astype(int)
    with Image.open(shared / "real/photos/bus.jpg") as file:
        picture = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    plan = plan_letterbox(*picture.shape[1:], Preprocess(640, "square"), 32)
    difference = np.abs(letterbox(picture, plan).permute(1, 2, 0).numpy().astype(int) - expected)
    assert np.array_equal(difference[:, : plan.left], np.zeros_like(difference[:, : plan.left]))
    # OpenCV counts in 2048ths; a step of one grey level is all that this may make.
    assert difference.max() <= 2
    assert difference.mean() < 0.2


def test_clip_cuts_at_the_borders():
    boxes = torch.tensor([[-5.0, -1, 700, 500], [10, 20, 30, 40], [-9, -9, -1, -1]])
    assert clip(boxes, height=480, width=640).tolist() == [[0, 0, 640, 480], [10, 20, 30, 40], [0, 0, 0, 0]]
    assert clip(torch.zeros(0, 4), 5, 5).shape == (0, 4)
