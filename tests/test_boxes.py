"""Threshold, class filter, suppression and limit, against their definitions."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from handlers import boxes
from handlers.boxes import select
from handlers.options import Options
from model_defs.contract import Detections

OPTIONS = Options(0.25, 0.45, 300, False, None, "detections")


def candidates(count: int, seed: int, classes: int = 3) -> Detections:
    """Distinct scores: among equal ones, any may suppress the others."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    size = torch.rand(count, 2, generator=generator) * 60 + 1
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return Detections(
        torch.cat((corner, corner + size), 1), torch.randint(classes, (count,), generator=generator), scores
    )


def by_definition(found: Detections, options: Options) -> list[int]:
    """Greedy suppression, one candidate after the other."""
    iou = box_iou(found.boxes, found.boxes)
    kept: list[int] = []
    for index in found.scores.argsort(descending=True).tolist():
        label = int(found.labels[index])
        if found.scores[index] <= options.score_threshold:
            continue
        if options.classes is not None and label not in options.classes:
            continue
        rivals = [other for other in kept if options.class_agnostic or int(found.labels[other]) == label]
        if all(iou[index, other] <= options.iou_threshold for other in rivals):
            kept.append(index)
    return kept[: options.max_detections]


@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 10**6),
    options=st.builds(
        Options,
        score_threshold=st.floats(0, 1),
        iou_threshold=st.floats(0, 1),
        max_detections=st.integers(1, 60),
        class_agnostic=st.booleans(),
        classes=st.none() | st.frozensets(st.integers(0, 2), min_size=1),
        format=st.just("coco"),
    ),
)
def test_select_equals_its_definition(count, seed, options):
    given_candidates = candidates(count, seed)
    before = [part.clone() for part in given_candidates]
    found = select(given_candidates, options)
    kept = by_definition(given_candidates, options)
    assert torch.equal(found.boxes, given_candidates.boxes[kept])
    assert torch.equal(found.labels, given_candidates.labels[kept])
    assert torch.equal(found.scores, given_candidates.scores[kept])
    assert all(torch.equal(old, new) for old, new in zip(before, given_candidates, strict=True))


def test_nothing_stays_nothing():
    for empty in (candidates(0, 0), Detections(torch.rand(5, 4), torch.zeros(5, dtype=torch.int64), torch.zeros(5))):
        found = select(empty, OPTIONS)
        assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,)]
        assert found.labels.dtype == torch.int64


def test_threshold_itself_is_not_above():
    one = Detections(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), torch.tensor([0.5]))
    assert len(select(one, dataclasses.replace(OPTIONS, score_threshold=0.5)).scores) == 0
    assert len(select(one, dataclasses.replace(OPTIONS, score_threshold=0.499)).scores) == 1


@pytest.mark.parametrize("iou_threshold", [0.999, 1.0])
def test_of_too_many_candidates_the_best_count(monkeypatch, iou_threshold):
    monkeypatch.setattr(boxes, "MAX_CANDIDATES", 50)
    many = candidates(500, 0)
    found = select(many, dataclasses.replace(OPTIONS, score_threshold=0, iou_threshold=iou_threshold))
    assert torch.equal(found.scores, many.scores.sort(descending=True).values[:50])
