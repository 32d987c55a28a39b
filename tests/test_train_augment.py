import colorsys

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from handlers.geometry import PADDING, letterbox, plan_letterbox
from handlers.settings import Preprocess
from tools.strict import parse
from tools.train.augment import (
    Labelled,
    Tile,
    jitter_colour,
    mixup,
    mosaic,
    move_boxes,
    random_affine,
    view,
)
from tools.train.augmentation import Augmentation

SIZE = 160
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)])
OFF = Augmentation(**dict.fromkeys(Augmentation.model_fields, 0.0))
GEOMETRY = OFF.model_copy(update={"scale": 0.5, "translate": 0.1, "flip_lr": 0.5, "flip_ud": 0.5})
TURNED = GEOMETRY.model_copy(update={"degrees": 30.0, "shear": 10.0})


def rectangle(rng: np.random.Generator, label: int) -> Labelled:
    """One filled rectangle, in the colour of its label, on black."""
    height, width = (SIZE, int(rng.integers(60, SIZE))) if rng.random() < 0.5 else (int(rng.integers(60, SIZE)), SIZE)
    x1, y1 = rng.integers(0, (width - 30, height - 30))
    x2, y2 = rng.integers((x1 + 20, y1 + 20), (width, height), endpoint=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y1:y2, x1:x2] = COLOURS[label]
    return Labelled(pixels, np.array([(x1, y1, x2, y2)], dtype=np.float64), np.array([label]))


def box_of_colour(pixels: np.ndarray, label: int) -> np.ndarray | None:
    """The box around all pixels that are nearer to the colour than to black, or None."""
    rows, columns = np.nonzero(np.abs(pixels.astype(int) - COLOURS[label]).max(axis=2) < 128)
    return None if not len(rows) else np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("augmentation", [GEOMETRY, TURNED], ids=["scaled", "turned"])
@pytest.mark.parametrize("tiles", [1, 4])
def test_boxes_fit_what_they_hold(augmentation: Augmentation, tiles: int) -> None:
    compared = 0
    for seed in range(150):
        rng = default_rng(seed)
        pictures = [rectangle(rng, label) for label in range(tiles)]
        if tiles == 4:
            placed, centre = mosaic(rng, pictures, SIZE), (SIZE, SIZE)
        else:
            placed, centre = [Tile(pictures[0], 7, 11)], (SIZE / 2, SIZE / 2)
        matrix = random_affine(rng, augmentation, centre, SIZE, SIZE)
        seen = view(placed, matrix, SIZE, SIZE)
        assert seen.pixels.shape == (SIZE, SIZE, 3)
        kept = dict(zip(seen.labels.tolist(), seen.boxes, strict=True))
        for label in range(tiles):
            found = box_of_colour(seen.pixels, label)
            if label in kept:
                assert found is not None
                # Of a turned shape that is cut, the box may be larger than what is left.
                if augmentation is GEOMETRY or (kept[label].min() > 0 and kept[label].max() < SIZE):
                    assert np.abs(found - kept[label]).max() <= 1.5, (seed, label)
                    compared += 1
            elif found is not None and augmentation is GEOMETRY:
                sides, whole = (
                    found[2:] - found[:2],
                    np.prod(pictures[label].boxes[0, 2:] - pictures[label].boxes[0, :2]),
                )
                assert sides.min() <= 3 or sides.prod() <= 0.15 * whole * abs(np.linalg.det(matrix)), (seed, label)
    assert compared > 60


def test_a_view_straight_on_changes_no_pixel() -> None:
    rng = default_rng(0)
    pixels = rng.integers(0, 256, (60, 100, 3), dtype=np.uint8)
    plan = plan_letterbox(60, 100, Preprocess(100, "square"), stride=32)
    picture = Labelled(pixels, np.array([(10.0, 20, 30, 50)]), np.array([2]))
    still = random_affine(rng, OFF, (50, 50), 100, 100)
    seen = view([Tile(picture, plan.left, plan.top)], still, 100, 100)
    expected = letterbox(torch.from_numpy(pixels).permute(2, 0, 1), plan).permute(1, 2, 0).numpy()
    assert np.array_equal(seen.pixels, expected)
    assert seen.boxes.tolist() == [[10, 40, 30, 70]]

    flipped = OFF.model_copy(update={"flip_lr": 1.0, "flip_ud": 1.0})
    seen = view([Tile(picture, plan.left, plan.top)], random_affine(rng, flipped, (50, 50), 100, 100), 100, 100)
    assert np.array_equal(seen.pixels, expected[::-1, ::-1])
    assert seen.boxes.tolist() == [[70, 30, 90, 60]]


def test_a_view_of_nothing_is_grey() -> None:
    picture = Labelled(np.zeros((20, 20, 3), np.uint8), np.array([(0.0, 0, 20, 20)]), np.array([0]))
    away = np.array([(1.0, 0, 500), (0, 1, 0), (0, 0, 1)])
    seen = view([Tile(picture, 0, 0)], away, 64, 48)
    assert seen.pixels.shape == (48, 64, 3) and (seen.pixels == PADDING).all()
    assert seen.boxes.shape == (0, 4) and seen.labels.shape == (0,)


def test_mosaic_meets_in_one_point() -> None:
    places = set()
    for seed in range(200):
        rng = default_rng(seed)
        pictures = [rectangle(rng, label) for label in range(4)]
        tiles = mosaic(rng, pictures, SIZE)
        assert sorted(int(tile.picture.labels[0]) for tile in tiles) == [0, 1, 2, 3]
        ends = [(t.left + t.picture.pixels.shape[1], t.top + t.picture.pixels.shape[0]) for t in tiles]
        x, y = ends[0]
        assert (tiles[1].left, ends[1][1]) == (x, y)
        assert (ends[2][0], tiles[2].top) == (x, y)
        assert (tiles[3].left, tiles[3].top) == (x, y)
        assert min(x, y) >= SIZE / 2 and max(x, y) <= 1.5 * SIZE
        places.add((x, y, int(tiles[0].picture.labels[0])))
    assert len(places) > 190 and {label for *_, label in places} == {0, 1, 2, 3}


def test_affine_stays_within_its_limits() -> None:
    wild = GEOMETRY.model_copy(update={"degrees": 20.0})
    scales, shifts, angles, flips = [], [], [], 0
    for seed in range(400):
        matrix = random_affine(default_rng(seed), wild, (70, 40), 200, 100)
        flips += np.linalg.det(matrix) < 0
        scales.append(np.sqrt(abs(np.linalg.det(matrix))))
        shifts.append((matrix @ (70, 40, 1))[:2] / (200, 100) - 0.5)
        angles.append(np.degrees(np.arctan(matrix[1, 0] / matrix[0, 0])))
    assert 0.5 <= min(scales) < 0.55 and 1.45 < max(scales) <= 1.5
    assert 0.09 < np.abs(shifts).max() <= 0.1 + 1e-9
    assert 18 < np.abs(angles).max() <= 20
    assert 150 < flips < 250


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((10, 10, 12, 12), True),
        ((10, 10, 11.9, 30), False),  # narrower than 2 pixels
        ((-90, 0, 10, 50), True),  # a tenth is left
        ((-91, 0, 9, 50), False),
        ((0, 50, 200, 52), True),  # 100 to 1
        ((0, 50, 203, 52), False),
        ((-50, -50, -10, -10), False),
    ],
)
def test_boxes_with_too_little_left_are_dropped(box: tuple[float, ...], kept: bool) -> None:
    cut, keep = move_boxes(np.array([box], dtype=float), np.eye(3), 210, 100)
    assert keep.tolist() == [kept]
    assert cut.min() >= 0 and cut[0, 2] <= 210 and cut[0, 3] <= 100


def hsv(pixels: np.ndarray) -> np.ndarray:
    return np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels.reshape(-1, 3)])


def test_saturation_and_brightness_are_those_of_hsv() -> None:
    pixels = default_rng(5).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    only = OFF.model_copy(update={"hsv_s": 0.7, "hsv_v": 0.4})
    for seed in range(20):
        _, saturation, value = default_rng(seed).uniform(-1, 1, 3) * (0, 0.7, 0.4)
        wanted = hsv(pixels) * (1, 1 + saturation, 1 + value)
        expected = np.array([colorsys.hsv_to_rgb(h, min(s, 1), min(v, 1)) for h, s, v in wanted]) * 255
        got = jitter_colour(default_rng(seed), pixels, only).reshape(-1, 3)
        # Where saturation is cut, a middle channel may differ; the others are the same.
        free = wanted[:, 1] <= 1
        assert np.abs(got - expected)[free].max() <= 0.51
        assert np.abs(got.max(axis=1) - expected.max(axis=1)).max() <= 0.51


def test_hue_turns_as_hsv_turns_it() -> None:
    pixels = default_rng(5).integers(60, 200, (24, 24, 3), dtype=np.uint8)
    pixels[..., 0] //= 2  # no greys, which have no hue
    for seed in range(20):
        turn = default_rng(seed).uniform(-1, 1, 3)[0] * 0.015
        only = OFF.model_copy(update={"hsv_h": 0.015})
        got = hsv(jitter_colour(default_rng(seed), pixels, only))
        difference = np.abs((got[:, 0] - hsv(pixels)[:, 0] - turn + 0.5) % 1 - 0.5) * 360
        assert np.median(difference[hsv(pixels)[:, 1] > 0.3]) < 1


def test_colour_of_grey_and_of_nothing_to_do() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    got = jitter_colour(default_rng(3), grey, OFF.model_copy(update={"hsv_h": 0.5, "hsv_s": 1.0}))
    assert np.array_equal(got, grey)
    colours = default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(jitter_colour(default_rng(3), colours, OFF), colours)


def test_mixup_blends_pictures_and_keeps_all_boxes() -> None:
    first, second = (
        Labelled(np.full((9, 9, 3), level, np.uint8), np.full((count, 4), float(level)), np.full(count, level))
        for level, count in ((0, 2), (200, 3))
    )
    levels = [int(mixup(default_rng(seed), first, second).pixels[0, 0, 0]) for seed in range(50)]
    assert min(levels) > 50 and max(levels) < 150 and len(set(levels)) > 15
    mixed = mixup(default_rng(0), first, second)
    assert mixed.labels.tolist() == [0, 0, 200, 200, 200]
    assert mixed.boxes[:, 0].tolist() == [0, 0, 200, 200, 200]


@pytest.mark.parametrize(
    "content", [{"mosaic": 1.1}, {"scale": 1.0}, {"degrees": -1}, {"flip_lr": 2}, {"hsv_h": 0.6}, {"translate": -0.1}]
)
def test_out_of_range_is_refused_by_name(content: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(content))):
        parse(Augmentation, content)
