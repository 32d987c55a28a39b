"""Pictures of drawn shapes with their boxes: training data that needs no download.

    from numpy.random import default_rng
    picture, shapes = draw_scene(default_rng(7), 640, 480)

The same generator state gives the same pixels.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from tools.errors import ToolError

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")

SMALLEST_SIDE = 32  # of a picture, in pixels: below, shapes cannot be told apart
LARGEST_DIAMETER = 0.6  # of the shorter side
ATTEMPTS = 20  # to find a place for one more shape
SUPERSAMPLING = 4


class Difficulty(NamedTuple):
    """smallest_diameter: as a share of the longer side of the picture. firm_pixels: no shape has a smaller diameter,
    where the picture can hold it. most_hidden: of a shape's area, by the shapes in front of it. least_contrast:
    distance in RGB between a shape and what lies under it."""

    smallest_diameter: float
    firm_pixels: int
    most_hidden: float
    least_contrast: float


# What `shapes` was trained on is normal: its pictures must stay as they are.
NORMAL = Difficulty(0.06, 14, 0.3, 75.0)
DIFFICULTIES = {
    "easy": Difficulty(0.12, 24, 0.0, 120.0),
    "normal": NORMAL,
    "hard": Difficulty(0.03, 9, 0.5, 40.0),
}


class Shape(NamedTuple):
    """A shape and the box of its visible part: x1 y1 x2 y2 in pixels, tight, x2 and y2 exclusive."""

    label: str
    box: tuple[int, int, int, int]


class _Stamp(NamedTuple):
    """How much of each pixel a shape covers, `[h, w]` in 0..1, and where its upper left corner lies."""

    coverage: np.ndarray
    left: int
    top: int


def draw_scene(
    rng: Generator,
    width: int,
    height: int,
    most_shapes: int = 8,
    classes: tuple[str, ...] = CLASSES,
    difficulty: Difficulty = NORMAL,
) -> tuple[Image.Image, list[Shape]]:
    """An RGB picture of one to `most_shapes` shapes on a random background, and what is on it, back to front.

    No shapes are drawn when `most_shapes` is 0. Shapes hide only so much of another as `difficulty` says, and the
    edge of the picture little. Raises ToolError for a picture too small or a class unknown.
    """
    if min(width, height) < SMALLEST_SIDE:
        raise ToolError(f"a picture of {width}x{height} is too small to draw on; use at least {SMALLEST_SIDE} a side")
    if not classes or not set(classes) <= set(CLASSES):
        raise ToolError(
            f"cannot draw the classes {', '.join(classes) or 'given: none'}; choose from {', '.join(CLASSES)}"
        )

    canvas = _background(rng, width, height)
    owner = np.full((height, width), -1, dtype=np.int16)  # which shape is seen at a pixel
    labels: list[str] = []
    areas: list[int] = []
    for _ in range(rng.integers(min(1, most_shapes), most_shapes, endpoint=True)):
        for _attempt in range(ATTEMPTS):
            label = classes[rng.integers(len(classes))]
            stamp = _stamp(rng, label, width, height, difficulty)
            area = _claim(owner, stamp, areas, difficulty.most_hidden)
            if area:
                _paint(rng, canvas, stamp, difficulty.least_contrast)
                labels.append(label)
                areas.append(area)
                break
    picture = Image.fromarray(_camera(rng, canvas))
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.002 * max(width, height) + 0.4)))
    return picture, [Shape(label, _tight_box(owner == index)) for index, label in enumerate(labels)]


def outline(rng: Generator, label: str) -> list[np.ndarray]:
    """The outline of a shape inside the unit circle, `[points, 2]` as x y; a second one is its hole."""

    def polygon(corners: int, radius: float = 1.0) -> np.ndarray:
        angle = 2 * math.pi * np.arange(corners) / corners
        return radius * np.stack((np.cos(angle), np.sin(angle)), axis=1)

    if label == "circle":
        return [polygon(90)]
    if label == "ring":
        return [polygon(90), polygon(90, rng.uniform(0.45, 0.75))]
    if label == "square":
        return [polygon(4)]
    if label == "triangle":
        return [polygon(3) * (1.0, rng.uniform(0.75, 1.0))]
    if label == "star":
        points = polygon(10)
        points[1::2] *= rng.uniform(0.38, 0.5)
        return [points]
    arm = rng.uniform(0.25, 0.38)  # a cross: half the width of an arm over its length
    corner = np.array([(1, -arm), (1, arm), (arm, arm)])
    turns = [corner, corner[:, ::-1] * (-1, 1), -corner, corner[:, ::-1] * (1, -1)]
    return [np.concatenate(turns) / math.hypot(1, arm)]


def _stamp(rng: Generator, label: str, width: int, height: int, difficulty: Difficulty) -> _Stamp:
    """A shape of random size, rotation and place; up to a tenth of its diameter lies outside the picture."""
    largest = LARGEST_DIAMETER * min(width, height)
    smallest = min(max(difficulty.smallest_diameter * max(width, height), difficulty.firm_pixels), largest)
    radius = math.exp(rng.uniform(math.log(smallest), math.log(largest))) / 2
    centre = np.array([rng.uniform(0.8 * radius, side - 0.8 * radius) for side in (width, height)])
    turn = rng.uniform(0, 2 * math.pi)
    rotation = radius * np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])

    corner = np.floor(centre - radius).astype(int)
    side = math.ceil(2 * radius) + 2
    mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    for points, ink in zip(outline(rng, label), (255, 0), strict=False):
        pen.polygon(((points @ rotation + centre - corner) * SUPERSAMPLING).ravel().tolist(), fill=ink)
    coverage = np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / 255

    left, top = np.maximum(corner, 0)
    right, bottom = np.minimum(corner + side, (width, height))
    coverage = coverage[top - corner[1] : bottom - corner[1], left - corner[0] : right - corner[0]]
    return _Stamp(coverage, int(left), int(top))


def _claim(owner: np.ndarray, stamp: _Stamp, areas: list[int], most_hidden: float) -> int:
    """Enter a new shape into `owner` and return its area in pixels; 0, and no change, where it or another
    would be hidden too much. Neither may hide in the other: a circle inside a circle looks like a ring."""
    rows, columns = stamp.coverage.shape
    region = owner[stamp.top : stamp.top + rows, stamp.left : stamp.left + columns]
    firm = stamp.coverage >= 0.5
    area = int(firm.sum())
    taken = np.bincount(region[firm] + 1, minlength=len(areas) + 1)[1:]
    if taken.sum() > most_hidden * area:
        return 0
    for index in np.flatnonzero(taken):
        if (owner == index).sum() - taken[index] < (1 - most_hidden) * areas[index]:
            return 0
    region[firm] = len(areas)
    return area


def _paint(rng: Generator, canvas: np.ndarray, stamp: _Stamp, least_contrast: float) -> None:
    """Fill a shape with a colour, or from one colour to another, that stands out from what lies under it."""
    rows, columns = stamp.coverage.shape
    region = canvas[stamp.top : stamp.top + rows, stamp.left : stamp.left + columns]
    weight = stamp.coverage[..., None]
    under = (region * weight).sum(axis=(0, 1)) / weight.sum()
    colour = _contrasting_colour(rng, under, least_contrast)
    fill: np.ndarray = colour
    if rng.random() < 0.4:
        other = (
            _contrasting_colour(rng, under, least_contrast)
            if rng.random() < 0.5
            else np.clip(colour + rng.uniform(-60, 60), 0, 255)
        )
        fill = _ramp(rng, columns, rows, colour, other)
    opacity = rng.uniform(0.85, 1.0) * weight
    region[:] = region * (1 - opacity) + fill * opacity


def _contrasting_colour(rng: Generator, under: np.ndarray, least_contrast: float) -> np.ndarray:
    """A random colour; at normal contrast nine in ten lie far enough from any given one, so the loop is short."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - under) >= least_contrast:
            return colour


def _ramp(rng: Generator, width: int, height: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """`[height, width, 3]` from one colour to another along a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    along = np.clip(x * math.cos(angle) + y * math.sin(angle) + 0.5, 0, 1)[..., None]
    return (start * (1 - along) + end * along).astype(np.float32)


def _background(rng: Generator, width: int, height: int) -> np.ndarray:
    """`[height, width, 3]` float32 in 0..255: plain, a ramp, clouds or stripes, some with strokes across."""
    first, second = rng.uniform(0, 255, (2, 3))
    kind = rng.choice(["plain", "ramp", "clouds", "stripes"])
    if kind == "plain":
        canvas = np.tile(first.astype(np.float32), (height, width, 1))
    elif kind == "ramp":
        canvas = _ramp(rng, width, height, first, second)
    elif kind == "clouds":
        coarse = first + rng.uniform(-45, 45, (rng.integers(2, 24), rng.integers(2, 24), 3))
        patches = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
        canvas = np.array(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    else:
        close = first + np.clip(second - first, -40, 40)
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.02, 0.2) * max(width, height)
        x, y = np.arange(width), np.arange(height)[:, None]
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)[..., None]
        canvas = (first + (close - first) * (0.5 + 0.5 * wave)).astype(np.float32)
    if rng.random() < 0.3:
        canvas = _strokes(rng, canvas)
    return canvas


def _strokes(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """Straight lines across the picture that are no shape, so that a detector learns to leave them alone."""
    height, width, _ = canvas.shape
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 6)):
        ends = rng.uniform(0, 1, (2, 2)) * (width, height)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        pen.line(ends.ravel().tolist(), fill=colour, width=1 + round(rng.uniform(0, 0.01) * max(width, height)))
    return np.array(picture, dtype=np.float32)


def _camera(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """To uint8, half of the pictures with noise."""
    if rng.random() < 0.5:
        noise = rng.standard_normal((*canvas.shape[:2], rng.choice([1, 3])), dtype=np.float32)
        canvas = canvas + noise * np.float32(rng.uniform(1, 14))
    return np.clip(canvas, 0, 255).round().astype(np.uint8)


def _tight_box(visible: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(visible.any(axis=0)), np.flatnonzero(visible.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
