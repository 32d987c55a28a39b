"""The formats of an answer, and that none of them is too large for TorchServe."""

import io
import json

import numpy as np
import pytest
import torch
from model_folder import scene
from PIL import Image

from handlers.errors import EmptyBody, ImageTooLarge, InvalidOption
from handlers.response import MAX_ANSWER_BYTES, Context, draw, error_answer, json_answer, kserve_answer, render
from handlers.settings import MAX_DETECTIONS, MAX_LABEL_LENGTH
from model_defs.contract import Detections

LABELS = ["cat", "score", "traffic light"]
CONTEXT = Context("pets", "2.1", LABELS, 100, 200, {"decode": 1.5})
FOUND = Detections(
    torch.tensor([[10.00049, 20.5, 110, 70.12345], [0, 0, 200, 100]]),
    torch.tensor([0, 2]),
    torch.tensor([0.98765432, 0.25]),
)
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
# A thousandth of a pixel, a millionth of a score.
BOX, SCORE = [10.0, 20.5, 110.0, 70.123], 0.987654
WHOLE = [0.0, 0.0, 200.0, 100.0]
HEAD = {"model": "pets", "version": "2.1", "width": 200, "height": 100}


@pytest.mark.parametrize(
    ("form", "expected", "empty"),
    [
        ("torchserve", [{"cat": BOX, "score": SCORE}, {"traffic light": WHOLE, "score": 0.25}], []),
        (
            "detections",
            HEAD
            | {
                "detections": [
                    {"label": "cat", "index": 0, "score": SCORE, "box": BOX},
                    {"label": "traffic light", "index": 2, "score": 0.25, "box": WHOLE},
                ],
                "timing_ms": {"decode": 1.5},
            },
            HEAD | {"detections": [], "timing_ms": {"decode": 1.5}},
        ),
        (
            "coco",
            [
                {"category_id": 0, "bbox": [10.0, 20.5, 100.0, 49.623], "score": SCORE},
                {"category_id": 2, "bbox": [0.0, 0.0, 200.0, 100.0], "score": 0.25},
            ],
            [],
        ),
    ],
)
def test_json_formats(form, expected, empty):
    for found, wanted in ((FOUND, expected), (NOTHING, empty)):
        body, content_type = render(found, form, CONTEXT, None)
        assert content_type == "application/json"
        assert json.loads(body) == wanted == json_answer(found, form, CONTEXT)


def test_yolo_text():
    body, content_type = render(FOUND, "yolo", CONTEXT, None)
    assert content_type == "text/plain; charset=utf-8"
    assert body.decode().splitlines() == [
        "0 0.300001 0.453117 0.499998 0.496235 0.987654",
        "2 0.500000 0.500000 1.000000 1.000000 0.250000",
    ]
    assert render(NOTHING, "yolo", CONTEXT, None)[0] == b""


def test_image_shows_the_boxes_and_nothing_else():
    pixels = np.full((100, 200, 3), 90, np.uint8)
    body, content_type = render(FOUND, "image", CONTEXT, pixels)
    assert content_type == "image/jpeg"
    with Image.open(io.BytesIO(body)) as image:
        assert (image.format, image.size) == ("JPEG", (200, 100))
        drawn = np.abs(np.asarray(image).astype(int) - 90).max(axis=2) > 40
    assert drawn[21:69, 10:12].mean() > 0.9  # the left side of the cat
    assert drawn[10:19, 10:40].mean() > 0.3  # its name, above the box
    assert not drawn[40:60, 40:100].any()
    assert (pixels == 90).all()
    with Image.open(io.BytesIO(render(NOTHING, "image", CONTEXT, pixels)[0])) as image:
        assert np.abs(np.asarray(image).astype(int) - 90).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70_000), (70_000, 3), (3, 2)])
def test_image_of_any_shape(height, width):
    found = Detections(torch.tensor([[0.0, 0, width, height]]), torch.tensor([0]), torch.tensor([0.5]))
    with Image.open(io.BytesIO(draw(scene(height, width), found, LABELS))) as image:
        assert max(image.size) == min(max(height, width), 65_500)  # the longest side that JPEG has


def test_image_shrinks_to_what_torchserve_passes_on():
    noise = np.random.default_rng(0).integers(256, size=(3000, 3000, 3), dtype=np.uint8)
    body = draw(np.tile(noise, (3, 3, 1))[:8000, :8000], NOTHING, LABELS)
    assert len(body) <= MAX_ANSWER_BYTES
    with Image.open(io.BytesIO(body)) as image:
        assert image.width == image.height > 1500


@pytest.mark.parametrize("form", ["torchserve", "detections", "coco", "yolo"])
@pytest.mark.parametrize("letter", ["x", "é", "𝄞"])
def test_the_longest_answer_fits(form, letter):
    boxes = torch.full((MAX_DETECTIONS, 4), 12345.678)
    found = Detections(boxes, torch.zeros(MAX_DETECTIONS, dtype=torch.int64), torch.full((MAX_DETECTIONS,), 0.123456))
    body, _ = render(found, form, CONTEXT._replace(labels=[letter * MAX_LABEL_LENGTH]), None)
    assert len(body) < MAX_ANSWER_BYTES


def test_kserve_answer():
    assert json.loads(kserve_answer([1, [2]])[0]) == {"predictions": [1, [2]]}
    with pytest.raises(InvalidOption, match=r"the answer to 7 instances .* more than 6000000; send fewer"):
        kserve_answer(["x" * 1_000_000] * 7)


def test_error_answer_has_torchserves_form():
    body, content_type = error_answer(ImageTooLarge("too\nlarge"))
    assert content_type == "application/json"
    assert json.loads(body) == {"code": 413, "type": "ImageTooLarge", "message": "too large"}
    assert json.loads(error_answer(EmptyBody("é"))[0]) == {"code": 400, "type": "EmptyBody", "message": "é"}
