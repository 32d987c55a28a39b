"""Pages, pictures with boxes, and charts, by what can be seen on them."""

import io
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tools.report.boxes import class_colour, draw_boxes, sheet
from tools.report.charts import bars, box_statistics, confusion, curves, learning_curves
from tools.report.page import Page

AWKWARD = ["<script>alert(1)</script>", "$\\frac$", "a_b^$$", "_hidden", "two\nlines", "\ud800", "日本", "", "x" * 400]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def opened(content):
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def places_of(pixels, colour):
    """Rows and columns of the pixels of one colour."""
    return np.nonzero(np.abs(pixels - np.array(colour)).max(axis=2) <= 2)


def png(colour=(1, 2, 3)):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", AWKWARD)
def test_every_text_of_a_page_is_taken_as_text(text, tmp_path):
    page = Page(text)
    page.heading(text)
    page.paragraph(text)
    page.table([text], [[text], [text]])
    page.picture(png(), text + '" onload="')
    page.write(tmp_path / "page.html")
    read = Tags((tmp_path / "page.html").read_text(encoding="utf-8"))
    plain = "html head meta meta title style body h1 h2 p div table thead tr th tbody tr td tr td figure img figcaption"
    assert [tag for tag, _ in read.tags] == plain.split()
    assert read.text.count(text.replace("\ud800", "?")) >= 7


def test_a_page_stands_alone_and_takes_the_place_of_another(tmp_path):
    (tmp_path / "page.html").write_text("old")
    page = Page("Title")
    page.picture(png(), "a picture")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    (image,) = [attributes for tag, attributes in Tags(text).tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,") and image["alt"] == "a picture"
    assert "http" not in text and "url(" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_numbers_of_a_table(tmp_path):
    page = Page("Title")
    page.table(["name", "AP", "boxes"], [["cat", 0.12345, 12000], ["dog", float("nan"), 3]])
    page.table(["nothing"], [])
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for cell in ("<td>cat", "<td class=number>0.123<", "<td class=number>12,000<", "<td class=number>–<", "<th>name"):
        assert cell in text
    assert "<th>nothing" in text


def test_boxes_lie_where_they_are_said_and_the_first_on_top():
    pixels = np.zeros((100, 200, 3), np.uint8)
    red, blue = (255, 0, 0), (0, 0, 255)
    drawn = np.asarray(draw_boxes(pixels, [(50, 30, 120, 80), (50, 30, 90, 60)], ["", ""], [red, blue]))
    assert (drawn[30:81, 50] == red).all() and (drawn[80, 50:121] == red).all()
    assert (drawn[60, 55:91] == blue).all()
    assert not drawn[35:55, 60:85].any() and not drawn[:29].any()
    assert not pixels.any()


@pytest.mark.parametrize("box", [(0, 0, 20, 20), (180, 80, 199, 99), (180, 0, 199, 10), (60, 50, 30, 20)])
def test_captions_stay_on_the_picture(box):
    without, named = (
        np.asarray(draw_boxes(np.zeros((100, 200, 3), np.uint8), [box], [caption], [(0, 200, 0)]))
        for caption in ("", "an object")
    )
    rows, columns = np.nonzero((named != without).any(axis=2))
    assert np.ptp(rows) >= 10 and np.ptp(columns) >= 50


@pytest.mark.parametrize("caption", AWKWARD)
def test_any_caption_can_be_drawn(caption):
    picture = draw_boxes(np.zeros((40, 30, 3), np.uint8), [(5.5, 6.5, 20, 30)], [caption], [(9, 200, 9)])
    assert sheet([(picture, caption)], 3, 64).width == 64 + 16


def test_a_class_keeps_its_colour_and_no_other_has_it():
    assert class_colour(0) == (230, 159, 0)
    assert class_colour(7) == class_colour(7)
    assert len({class_colour(index) for index in range(200)}) == 200


def test_a_sheet_shows_pictures_row_by_row():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    paper = sheet([(Image.new("RGB", (40, 20), colour), "name") for colour in colours], 2, 100)
    pixels = np.asarray(paper).astype(int)
    corners = [tuple(int(axis.min()) for axis in places_of(pixels, colour)) for colour in colours]
    assert corners[0][0] == corners[1][0] < corners[2][0]
    assert corners[0][1] == corners[2][1] < corners[1][1]
    rows, columns = places_of(pixels, colours[0])
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (50, 100)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_a_sheet_takes_pictures_of_any_shape_and_none(size):
    assert sheet([(Image.new("RGB", size), "")], 4, 50).width == 66
    assert sheet([], 4, 50).width > 0


def test_curves_rise_where_the_figures_do():
    pixels = opened(curves({"up": [0.0, 0.5, 1.0]}, [0, 1, 2], "Title", "x", "y"))
    rows, columns = places_of(pixels, class_colour(0))
    line = columns < 0.75 * pixels.shape[1]  # beside it stands the legend
    assert np.corrcoef(columns[line], rows[line])[0, 1] < -0.99


def test_of_many_curves_the_first_stands_out():
    many = {f"class {index}": [index / 90, 0.1] for index in range(81)}
    pixels = opened(curves(many, [0, 1], "Title", "x", "y"))
    few = opened(curves(dict(list(many.items())[:2]), [0, 1], "Title", "x", "y"))
    assert len(places_of(pixels, (0, 114, 178))[0]) > 500 > len(places_of(few, (0, 114, 178))[0])


def test_a_learning_curve_for_every_column_but_the_epoch():
    epochs = list(range(30))
    sizes = [
        opened(learning_curves({"epoch": epochs, **{f"column {n}": epochs for n in range(count)}})).shape[:2]
        for count in (1, 2, 4, 5)
    ]
    assert sizes[0][1] * 4 == sizes[1][1] * 2 == sizes[2][1] == sizes[3][1]
    assert sizes[0][0] * 2 == sizes[2][0] * 2 == sizes[3][0]


def test_learning_curves_leave_out_what_was_not_measured():
    with_gap = {"epoch": [1, 2, 3, 4], "mAP": [0.0, float("nan"), 0.2, 0.3]}
    without = {"epoch": [1, 3, 4], "mAP": [0.0, 0.2, 0.3]}
    assert learning_curves(with_gap) == learning_curves(without)
    assert learning_curves(with_gap) != learning_curves({"mAP": [0.0, 0.2, 0.3]})


def test_bars_are_as_long_as_their_figures():
    pixels = opened(bars(["one", "two", "three"], [0.25, 1.0, float("nan")], "Title"))
    lengths = [np.ptp(places_of(pixels, class_colour(index))[1]) for index in range(2)]
    assert lengths[0] / lengths[1] == pytest.approx(0.25, abs=0.01)
    tops = [places_of(pixels, class_colour(index))[0].min() for index in range(2)]
    assert tops[0] < tops[1]
    assert not len(places_of(pixels, class_colour(2))[0])


def test_confusion_has_the_truth_in_rows():
    matrix = np.zeros((3, 3), int)
    matrix[0, 2] = 5  # the first class, found as background
    rows, columns = places_of(opened(confusion(matrix, ["one", "two"])), (8, 48, 107))  # the darkest blue
    height, width, _ = opened(confusion(matrix, ["one", "two"])).shape
    square = (columns > width * 0.2) & (columns < width * 0.8)  # beside it stands the scale
    assert rows[square].mean() < height * 0.4
    assert columns[square].mean() > width * 0.5


@pytest.mark.parametrize("count", [1, 6, 20, 80])
def test_confusion_of_any_number_of_classes(count):
    rng = np.random.default_rng(0)
    matrix = rng.integers(1, 9, (count + 1, count + 1)) * (rng.random((count + 1, count + 1)) < 5 / (count + 1))
    height, width, _ = opened(confusion(matrix, [f"class {index}" for index in range(count)])).shape
    assert 500 < height < 3000 and height < width < 3000


def test_boxes_are_overlaid_where_they_lie():
    upper_left = np.array([[0, 0.1, 0.1, 0.1, 0.1]])
    pixels = opened(box_statistics(upper_left, ["one"]))
    height, width, _ = pixels.shape
    panel = pixels[: height // 2, width // 2 :]
    tint = panel[..., 0] - panel[..., 2] > 60  # orange, through which the paper shines
    rows, columns = np.nonzero(tint)
    assert rows.max() < panel.shape[0] * 0.35 and columns.max() < panel.shape[1] * 0.35
    lower = pixels[height // 2 :]
    dark = np.nonzero((lower[:, : width // 2].max(axis=2) - lower[:, : width // 2].min(axis=2)) > 60)
    assert dark[0].mean() < lower.shape[0] * 0.4  # the centre, y downwards
    dark = np.nonzero((lower[:, width // 2 :].max(axis=2) - lower[:, width // 2 :].min(axis=2)) > 60)
    assert dark[0].mean() > lower.shape[0] * 0.6  # the size, height upwards


@pytest.mark.parametrize(("count", "classes"), [(0, 0), (0, 3), (1, 1), (5000, 80)])
def test_box_statistics_of_any_number_of_boxes(count, classes):
    rng = np.random.default_rng(0)
    boxes = np.concatenate((rng.integers(0, max(1, classes), (count, 1)), rng.random((count, 4))), axis=1)
    assert opened(box_statistics(boxes, [f"class {index}" for index in range(classes)])).shape[0] > 800


def test_charts_take_any_name_and_no_figures():
    figures = [1.0] * len(AWKWARD)
    opened(bars(AWKWARD, figures, "of $x"))
    opened(curves({name: [1.0, 2.0] for name in AWKWARD}, [0, 1], AWKWARD[2], AWKWARD[2], AWKWARD[5]))
    opened(learning_curves(dict.fromkeys(AWKWARD, figures)))
    opened(confusion(np.eye(len(AWKWARD) + 1), AWKWARD))
    opened(bars([], [], ""))
    opened(curves({}, [], "", "", ""))
    opened(learning_curves({"epoch": []}))
    opened(learning_curves({"epoch": [1], "empty": [float("nan")]}))
    opened(confusion(np.zeros((1, 1)), []))


def test_the_same_figures_give_the_same_bytes():
    assert bars(["one"], [1], "Title") == bars(["one"], [1], "Title")
