"""Whether a network's anchors can learn the boxes of a data set, and better ones where they cannot."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from tools.data.dataset import Picture
from tools.train.augment import SMALLEST_SIDE
from tools.train.loss import ANCHOR_RATIO

ENOUGH_RECALL = 0.98  # from here on anchors stay: those that the weights have been trained with are worth more
MOST_BOXES = 10_000  # that the search looks at, drawn at random from more
MEANS_ROUNDS = 30
GENERATIONS = 1000
MUTATION = 0.1  # standard deviation of the change of a side, in its logarithm
MUTATED = 0.3  # of all sides, in one generation


class AnchorCheck(NamedTuple):
    """anchors: `[levels, n, 2]` width and height in pixels, the ones to train with. recall_before, recall_after: the
    best possible recall of those given and of these."""

    recall_before: float
    anchors: np.ndarray
    recall_after: float
    changed: bool


def check_anchors(anchors: np.ndarray, pictures: Sequence[Picture], size: int, seed: int) -> AnchorCheck:
    """The anchors given, or others found by k-means and random search where too many boxes match none of them.

    anchors: `[levels, n, 2]` width and height in pixels, the finest level first. size: of training, pixels of the
    longer side. New ones are only taken when they have the better recall. The same seed gives the same anchors.
    """
    sides = box_sides(pictures, size)
    before = recall(anchors, sides)
    if before >= ENOUGH_RECALL:
        return AnchorCheck(before, anchors, before, False)
    rng = default_rng(seed)
    sample = sides if len(sides) <= MOST_BOXES else rng.choice(sides, MOST_BOXES, replace=False)
    levels, each, _ = anchors.shape
    found = _evolve(rng, _means(sample, levels * each), sample)
    found = found[np.argsort(found.prod(axis=1), kind="stable")].reshape(anchors.shape)
    after = recall(found, sides)
    if after <= before:
        return AnchorCheck(before, anchors, before, False)
    return AnchorCheck(before, found, after, True)


def box_sides(pictures: Sequence[Picture], size: int) -> np.ndarray:
    """`[N, 2]` widths and heights in pixels of all boxes that are trained on, in pictures letterboxed to `size`."""
    sides = [
        np.array((box.x2 - box.x1, box.y2 - box.y1)) * size / max(picture.height, picture.width)
        for picture in pictures
        for box in picture.boxes
        if not box.crowd
    ]
    found = np.array(sides).reshape(-1, 2)
    return found[(found >= SMALLEST_SIDE).all(axis=1)]


def recall(anchors: np.ndarray, sides: np.ndarray) -> float:
    """The share of boxes `[N, 2]` that at least one anchor `[..., 2]` learns; 1 where there are none."""
    return float((_likeness(anchors.reshape(-1, 2), sides) > 1 / ANCHOR_RATIO).mean()) if len(sides) else 1.0


def _likeness(anchors: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """`[N]`: of each box and its best anchor, the smaller side over the larger, in the worse of width and height."""
    distance = np.abs(np.log(sides)[:, None] - np.log(anchors)).max(axis=2)
    return np.exp(-distance.min(axis=1))


def _means(sides: np.ndarray, count: int) -> np.ndarray:
    """`[count, 2]`: k-means of the logarithms, as ratios decide; it starts from boxes evenly spread in area."""
    points = np.log(sides)
    order = np.argsort(points.sum(axis=1), kind="stable")
    means = points[order[np.linspace(0, len(points) - 1, count).round().astype(int)]]
    for _ in range(MEANS_ROUNDS):
        nearest = np.square(points[:, None] - means).sum(axis=2).argmin(axis=1)
        for index in range(count):
            if (nearest == index).any():
                means[index] = points[nearest == index].mean(axis=0)
    return np.exp(means)


def _evolve(rng: Generator, anchors: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Random changes, kept when the boxes are liked better: the mean likeness, nothing for a box not learned."""

    def fitness(candidate: np.ndarray) -> float:
        likeness = _likeness(candidate, sides)
        return float((likeness * (likeness > 1 / ANCHOR_RATIO)).mean())

    best = fitness(anchors)
    for _ in range(GENERATIONS):
        change = rng.normal(0, MUTATION, anchors.shape) * (rng.random(anchors.shape) < MUTATED)
        candidate = np.maximum(anchors * np.exp(change), SMALLEST_SIDE)
        reached = fitness(candidate)
        if reached > best:
            anchors, best = candidate, reached
    return anchors
