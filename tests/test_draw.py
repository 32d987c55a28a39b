import numpy as np
import pytest
from numpy.random import default_rng

from tools.data import draw
from tools.data.draw import CLASSES, draw_scene, outline
from tools.errors import ToolError

SIZES = [(640, 480), (200, 300), (900, 120), (64, 64), (32, 32)]


def test_same_seed_same_pixels_and_boxes() -> None:
    first, first_shapes = draw_scene(default_rng(11), 320, 240)
    second, second_shapes = draw_scene(default_rng(11), 320, 240)
    other, _ = draw_scene(default_rng(12), 320, 240)
    assert np.array_equal(first, second)
    assert first_shapes == second_shapes
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pictures_have_the_size_asked_for_and_boxes_inside(width: int, height: int) -> None:
    rng = default_rng(width)
    for _ in range(20):
        picture, shapes = draw_scene(rng, width, height)
        assert picture.size == (width, height)
        assert picture.mode == "RGB"
        assert 1 <= len(shapes) <= 8
        for shape in shapes:
            x1, y1, x2, y2 = shape.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert shape.label in CLASSES


@pytest.mark.parametrize("label", CLASSES)
def test_box_is_tight_around_the_changed_pixels(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black canvas, the box of a lone shape is the box of what is not black."""
    monkeypatch.setattr(draw, "_background", lambda rng, width, height: np.zeros((height, width, 3), np.float32))
    monkeypatch.setattr(draw, "_camera", lambda rng, canvas: canvas.round().astype(np.uint8))
    monkeypatch.setattr(draw.Image.Image, "filter", lambda self, blur: self)
    rng = default_rng(0)
    for _ in range(10):
        picture, (shape,) = draw_scene(rng, 200, 150, most_shapes=1, classes=(label,))
        rows, columns = np.nonzero(np.asarray(picture).any(axis=2))
        changed = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # Pixels covered by less than half are painted, but not counted: a sharp tip may reach a few further.
        assert np.abs(np.subtract(shape.box, changed)).max() <= (4 if label in ("star", "triangle") else 1)
        assert shape.label == label


def test_box_ends_after_the_last_pixel() -> None:
    visible = np.zeros((20, 30), bool)
    visible[4:9, 7:12] = True
    visible[15, 20] = True  # what an occluder leaves of a shape may be in parts
    assert draw._tight_box(visible) == (7, 4, 21, 16)


def test_every_class_is_drawn_and_no_other() -> None:
    rng = default_rng(4)
    seen = [shape.label for _ in range(40) for shape in draw_scene(rng, 160, 160)[1]]
    assert set(seen) == set(CLASSES)
    chosen = [shape.label for _ in range(10) for shape in draw_scene(rng, 160, 160, classes=("ring", "star"))[1]]
    assert set(chosen) == {"ring", "star"}


@pytest.mark.parametrize("label", CLASSES)
def test_outlines_fit_the_unit_circle(label: str) -> None:
    for points in outline(default_rng(0), label):
        assert points.shape[1] == 2
        assert np.linalg.norm(points, axis=1).max() <= 1 + 1e-9


def test_no_shape_hides_in_another() -> None:
    """What is seen of a shape fills its share of the box, so a covered one would show as an empty box."""
    owner = np.full((100, 100), -1, np.int16)
    big = draw._Stamp(np.ones((60, 60), np.float32), 10, 10)
    assert draw._claim(owner, big, [], draw.NORMAL.most_hidden) == 3600
    inside = draw._Stamp(np.ones((20, 20), np.float32), 20, 20)
    assert draw._claim(owner, inside, [3600], draw.NORMAL.most_hidden) == 0
    covering = draw._Stamp(np.ones((90, 90), np.float32), 0, 0)
    assert draw._claim(owner, covering, [3600], draw.NORMAL.most_hidden) == 0
    touching = draw._Stamp(np.ones((40, 40), np.float32), 60, 60)
    assert draw._claim(owner, touching, [3600], draw.NORMAL.most_hidden) == 1600
    assert (owner == 0).sum() == 3600 - 100


@pytest.mark.parametrize(("name", "area"), [("easy", 0), ("normal", 0), ("hard", 3600)])
def test_how_much_of_a_shape_may_be_hidden_is_a_matter_of_difficulty(name: str, area: int) -> None:
    owner = np.full((100, 100), -1, np.int16)
    most_hidden = draw.DIFFICULTIES[name].most_hidden
    small = draw._Stamp(np.ones((20, 20), np.float32), 10, 10)
    assert draw._claim(owner, small, [], most_hidden) == 400
    over_40_percent = draw._Stamp(np.ones((60, 60), np.float32), 22, 10)
    assert draw._claim(owner, over_40_percent, [400], most_hidden) == area


@pytest.mark.parametrize(
    ("width", "height", "classes", "named"),
    [(31, 100, CLASSES, "31x100"), (0, 0, CLASSES, "0x0"), (64, 64, ("hexagon",), "hexagon"), (64, 64, (), "choose")],
)
def test_wrong_input_is_named(width: int, height: int, classes: tuple[str, ...], named: str) -> None:
    with pytest.raises(ToolError, match=named):
        draw_scene(default_rng(0), width, height, classes=classes)
