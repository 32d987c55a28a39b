"""Random changes to labelled pictures: mosaic, affine, flips, colour and mixup, as YOLOv5 is trained with.

Pictures are uint8 `[H, W, 3]` RGB arrays, boxes `[N, 4]` xyxy in their pixels, where pixel (0, 0) covers 0 to 1.
All chance comes from the generator given.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from handlers.geometry import PADDING
from tools.train.augmentation import Augmentation

# A box stays after a change when so much of it is left: the criteria published with YOLOv5.
SMALLEST_SIDE = 2.0  # pixels
LEAST_VISIBLE = 0.1  # of its area
LARGEST_ASPECT = 100.0  # of the longer side over the shorter one
MIXUP_SHAPE = 32.0  # both parameters of the beta distribution that shares of a mixup are drawn from


class Labelled(NamedTuple):
    """pixels: uint8 `[H, W, 3]`. boxes: float64 `[N, 4]` xyxy in its pixels. labels: int64 `[N]`."""

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


class Tile(NamedTuple):
    """A picture and where its upper left corner lies on a canvas, in pixels."""

    picture: Labelled
    left: int
    top: int


def mosaic(rng: Generator, pictures: Sequence[Labelled], size: int) -> list[Tile]:
    """Four pictures that meet at a random point of a canvas of twice `size`, each in a random one of its quarters.

    pictures: four, of sides up to `size`. The point lies in the middle half of the canvas.
    """
    x, y = rng.integers(size // 2, 2 * size - size // 2, size=2, endpoint=True)
    tiles = []
    for quarter, index in enumerate(rng.permutation(4)):
        height, width = pictures[index].pixels.shape[:2]
        left = x - width if quarter % 2 == 0 else x
        top = y - height if quarter < 2 else y
        tiles.append(Tile(pictures[index], int(left), int(top)))
    return tiles


def random_affine(
    rng: Generator, augmentation: Augmentation, centre: tuple[float, float], width: int, height: int
) -> np.ndarray:
    """`[3, 3]` from canvas pixels to pixels of a view of `width x height`: scaled, rotated, sheared, shifted, flipped.

    centre: x and y of the canvas point that comes to the middle of the view, before the shift.
    """

    def within(limit: float) -> float:
        return rng.uniform(-limit, limit)

    to_centre = np.array([(1, 0, -centre[0]), (0, 1, -centre[1]), (0, 0, 1)])
    angle, scale = math.radians(within(augmentation.degrees)), 1 + within(augmentation.scale)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    rotation = np.array([(cos, sin, 0), (-sin, cos, 0), (0, 0, 1)])
    shear_x, shear_y = (math.tan(math.radians(within(augmentation.shear))) for _ in range(2))
    shear = np.array([(1, shear_x, 0), (shear_y, 1, 0), (0, 0, 1)])
    x, y = ((0.5 + within(augmentation.translate)) * side for side in (width, height))
    shift = np.array([(1, 0, x), (0, 1, y), (0, 0, 1)])
    flip = np.eye(3)
    if rng.random() < augmentation.flip_lr:
        flip[0] = -1, 0, width
    if rng.random() < augmentation.flip_ud:
        flip[1] = 0, -1, height
    return flip @ shift @ shear @ rotation @ to_centre


def view(tiles: Sequence[Tile], matrix: np.ndarray, width: int, height: int) -> Labelled:
    """What of a canvas of tiles is seen through a view of `width x height`; grey where no tile lies.

    matrix: `[3, 3]` from canvas to view. Pixels are interpolated bilinearly, once. Boxes are cut at the edges of
    the view and left out where too little of them is seen.
    """
    boxes = np.concatenate([tile.picture.boxes + (tile.left, tile.top) * 2 for tile in tiles])
    labels = np.concatenate([tile.picture.labels for tile in tiles])
    boxes, keep = move_boxes(boxes, matrix, width, height)
    return Labelled(_render(tiles, matrix, width, height), boxes[keep], labels[keep])


def _render(tiles: Sequence[Tile], matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    inverse = np.linalg.inv(matrix)
    corners = inverse @ np.array([(0, width, 0, width), (0, 0, height, height), (1, 1, 1, 1)])
    extents = np.array(
        [
            (tile.left, tile.top, tile.left + tile.picture.pixels.shape[1], tile.top + tile.picture.pixels.shape[0])
            for tile in tiles
        ]
    )
    # Only the seen part of the canvas is put together, with a pixel more for the interpolation at its edge.
    left, top = np.maximum(np.floor(corners[:2].min(axis=1)), extents[:, :2].min(axis=0)).astype(int) - 1
    right, bottom = np.minimum(np.ceil(corners[:2].max(axis=1)), extents[:, 2:].max(axis=0)).astype(int) + 1
    canvas = np.full((max(bottom - top, 1), max(right - left, 1), 3), PADDING, dtype=np.uint8)
    for tile, extent in zip(tiles, extents, strict=True):
        x1, y1 = np.maximum(extent[:2], (left, top))
        x2, y2 = np.minimum(extent[2:], (right, bottom))
        if x1 < x2 and y1 < y2:
            seen = tile.picture.pixels[y1 - tile.top : y2 - tile.top, x1 - tile.left : x2 - tile.left]
            canvas[y1 - top : y2 - top, x1 - left : x2 - left] = seen
    inverse[:2, 2] -= left, top
    picture = Image.fromarray(canvas).transform(
        (width, height),
        Image.Transform.AFFINE,
        tuple(inverse[:2].ravel()),
        Image.Resampling.BILINEAR,
        fillcolor=(PADDING,) * 3,
    )
    return np.array(picture)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """`[N, 4]` boxes around the corners of `boxes` where `matrix` puts them, cut at the edges of `width x height`;
    and `[N]` bool, which of them to keep.

    Kept: both sides of at least 2 pixels, at least a tenth of the area inside, no side over 100 times the other.
    """
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2) @ matrix[:2, :2].T + matrix[:2, 2]
    whole = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
    cut = whole.clip(0, (width, height) * 2)
    sides = cut[:, 2:] - cut[:, :2]
    shorter, longer = sides.min(axis=1), sides.max(axis=1)
    area = (whole[:, 2:] - whole[:, :2]).prod(axis=1)
    keep = (shorter >= SMALLEST_SIDE) & (sides.prod(axis=1) >= LEAST_VISIBLE * area)
    return cut, keep & (longer <= LARGEST_ASPECT * shorter)


def jitter_colour(rng: Generator, pixels: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """`pixels` with hue turned and saturation and brightness scaled, by one random amount each.

    Saturation and brightness are those of HSV, S and V cut at their largest: V is the largest channel, S the
    distances of the others from it. The hue is turned by a rotation of the RGB cube about its grey diagonal (Haeberli,
    "Matrix Operations for Image Processing", 1993), for small angles HSV's hue within a degree. Together a third of
    the time that the way to HSV and back takes.
    """
    turn, saturation, value = rng.uniform(-1, 1, 3) * (augmentation.hsv_h, augmentation.hsv_s, augmentation.hsv_v)
    if turn:
        pixels = _turn_hue(pixels, 2 * math.pi * turn)
    if not saturation and not value:
        return pixels
    # numpy, for torch would split so little work over threads, which costs more where cores are busy.
    channels = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    largest = np.maximum(np.maximum(channels[0], channels[1]), channels[2])
    brightest = np.minimum(largest * np.float32(1 + value), 255)
    channels -= largest
    channels *= brightest / np.maximum(largest, 1) * np.float32(1 + saturation)
    channels += brightest
    np.rint(channels, out=channels)
    np.maximum(channels, 0, out=channels)
    return channels.astype(np.uint8).transpose(1, 2, 0)


def _turn_hue(pixels: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    same, after, before = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin / math.sqrt(3), (1 - cos) / 3 + sin / math.sqrt(3)
    rotation = (same, after, before, 0, before, same, after, 0, after, before, same, 0)
    return np.array(Image.fromarray(pixels).convert("RGB", rotation))


def mixup(rng: Generator, first: Labelled, second: Labelled) -> Labelled:
    """Two pictures of one size blended about half and half, with the boxes of both (arXiv:1710.09412)."""
    share = rng.beta(MIXUP_SHAPE, MIXUP_SHAPE)
    pixels = Image.blend(Image.fromarray(second.pixels), Image.fromarray(first.pixels), share)
    boxes, labels = (np.concatenate(parts) for parts in zip(first[1:], second[1:], strict=True))
    return Labelled(np.array(pixels), boxes, labels)
