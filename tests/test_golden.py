"""Golden answers: what counts as the same answer, and what does not."""

import json

import pytest
import torch

from handlers.errors import BadArchive
from handlers.golden import difference, load_golden
from model_defs.contract import Detections

ANSWER = Detections(
    torch.tensor([[10.0, 10, 110, 110], [50, 50, 53, 53], [0, 0, 200, 300]]),
    torch.tensor([0, 1, 2]),
    torch.tensor([0.9, 0.6, 0.26]),
)


def but(row, box=None, label=None, score=None):
    boxes, labels, scores = (part.clone() for part in ANSWER)
    boxes[row] = boxes[row] if box is None else torch.tensor(box, dtype=torch.float32)
    labels[row] = labels[row] if label is None else label
    scores[row] = scores[row] if score is None else score
    return Detections(boxes, labels, scores)


def without(row):
    rows = [other for other in range(3) if other != row]
    return Detections(*(part[rows] for part in ANSWER))


@pytest.mark.parametrize(
    "found",
    [
        ANSWER,
        Detections(*(part.flip(0) for part in ANSWER)),
        but(0, box=[10.5, 9.5, 110.5, 109.5]),
        but(1, box=[50.4, 49.6, 53.4, 52.6]),  # small, where a rounded coordinate changes the IoU much
        but(0, score=0.885),
        without(2),  # so near the threshold that it may go
        but(2, label=0, score=0.265),
    ],
)
def test_the_same_answer(found):
    assert difference(ANSWER, found, 0.25) is None
    assert difference(found, ANSWER, 0.25) is None


@pytest.mark.parametrize(
    "found",
    [
        without(0),
        without(1),
        but(0, box=[13, 10, 113, 110]),
        but(1, box=[51, 50, 54, 53]),
        but(0, label=1),
        but(0, score=0.87),
    ],
)
def test_another_answer(found):
    assert "1 detections missing" in difference(ANSWER, found, 0.25)
    assert "1 unexpected" in difference(found, ANSWER, 0.25)


def test_the_first_difference_is_told():
    assert difference(without(0), ANSWER, 0.25) == (
        "0 detections missing, 1 unexpected; first unexpected: label 0 score 0.900 box [10.0, 10.0, 110.0, 110.0]"
    )


def test_none_found_and_none_expected():
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert difference(nothing, nothing, 0.25) is None
    assert "2 detections missing" in difference(ANSWER, nothing, 0.25)


def test_stored_answer_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"detections": [{"label": "dog", "score": 0.5, "box": [1, 2, 3, 4]}], "width": 9}))
    boxes, labels, scores = load_golden(path, ["cat", "dog"])
    assert (boxes.tolist(), labels.tolist(), scores.tolist()) == ([[1, 2, 3, 4]], [1], [0.5])
    path.write_text('{"detections": []}')
    assert load_golden(path, ["cat"]).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"detections": 5}', '{"detections": [{}]}', '{"detections": [5]}',
        '{"detections": [{"label": "bird", "score": 0.5, "box": [1, 2, 3, 4]}]}',
        '{"detections": [{"label": "cat", "score": 0.5, "box": [1, 2, 3]}]}',
        '{"detections": [{"label": "cat", "score": "high", "box": [1, 2, 3, 4]}]}',
    ],
)  # fmt: skip
def test_no_stored_answer(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(BadArchive, match=r"golden answer a\.json is not an answer of format detections"):
        load_golden(path, ["cat"])
    with pytest.raises(BadArchive, match=r"golden answer b\.json cannot be read"):
        load_golden(tmp_path / "b.json", ["cat"])
