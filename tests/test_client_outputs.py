"""Names of files, and what is written for which answer."""

import csv
import io
import json
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools.client.answer import Answer, Detection
from tools.client.client import Asked
from tools.client.naming import Stems, check_folder, safe
from tools.client.outputs import Annotated, Coco, Crops, Csv, JsonLines, Result, Table, YoloText
from tools.client.sources import Film, Shot
from tools.client.window import Window
from tools.errors import ToolError
from tools.video.frames import VideoFile
from tools.video.overlay import Overlay

FOUND = (
    Detection("dog", 3, 0.9, (10.0, 20.0, 50.0, 40.0)),
    Detection("../../cat", 1, 0.5, (0.25, 0.0, 0.5, 48.0)),
)


def picture(width: int = 64, height: int = 48) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[20:40, 10:50] = (250, 10, 10)
    return pixels


def result(
    source: str = "a.jpg",
    stem: str = "a",
    found: tuple[Detection, ...] = FOUND,
    film: Film | None = None,
    frame: int | None = None,
) -> Result:
    """Of a picture, or of a frame whose pixels are there already."""
    body = io.BytesIO()
    Image.fromarray(picture()).save(body, "PNG")
    seconds = None if frame is None else frame / 5
    shot = Shot(source, body.getvalue, film, frame, seconds, None if film is None else picture())
    answer = Answer(source, "m", "1", 64, 48, found, {}, frame, seconds)
    return Result(Asked(shot, body.getvalue(), answer), answer, stem, Overlay(()))


def film(name: str = "clip.mp4") -> Film:
    return Film(name, Fraction(5), None, None)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@given(st.text(max_size=300))
def test_safe_names_lead_nowhere(text):
    name = safe(text)
    assert name
    assert name not in (".", "..")
    assert not name.startswith(".")
    assert not set(name) & set('/\\\0\n\r:*?"<>|')
    assert len(name) <= 100
    assert Path("/folder", name).parent == Path("/folder")


@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(["a/x.jpg", "b/x.png", "X.JPG", "x-2.jpg"]))))
def test_every_source_has_a_stem_of_its_own(sources):
    stems = Stems()
    names = [stems.of(source).casefold() for source in sources]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("photos/bus.jpg", "bus"),
        ("../../etc/passwd", "passwd"),
        ("https://user:pass@host/a/b%20c.jpg?token=secret", "b c"),
        ("https://host/%2e%2e%2f%2e%2e%2fx.jpg", "x"),
        ("C:\\photos\\bus.jpg", "bus"),
        ("rtsp://camera", "unnamed"),
        ("straße.jpg", "straße"),
        ("0", "0"),
    ],
)
def test_stems_are_what_people_expect(source, stem):
    assert Stems().of(source) == stem


def test_results_never_take_the_place_of_sources(tmp_path):
    check_folder(tmp_path / "out", [tmp_path / "a.jpg"])
    check_folder(tmp_path, [tmp_path / "photos" / "a.jpg"])
    (tmp_path / "link").symlink_to(tmp_path)
    for folder, source in ((tmp_path, "a.jpg"), (tmp_path / "link", "a.jpg"), (tmp_path, "crops/dog/a.jpg")):
        with pytest.raises(ToolError, match="could be overwritten"):
            check_folder(folder, [tmp_path / "b" / "a.jpg", tmp_path / source])


def test_a_table_has_a_line_a_detection():
    out = io.StringIO()
    with Table(out) as table:
        table.add(result())
        table.add(result("b.jpg", found=()))
        table.add(
            result("c.mp4", found=(Detection("dog", 3, 0.9, (1.0, 2.0, 3.0, 4.0), track=7),), film=film(), frame=2)
        )
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["a.jpg", "dog", "0.900", "10.0", "20.0", "50.0", "40.0"],
        ["a.jpg", "../../cat", "0.500", "0.2", "0.0", "0.5", "48.0"],
        ["b.jpg", "nothing", "found"],
        ["c.mp4", "2", "dog", "0.900", "1.0", "2.0", "3.0", "4.0", "#7"],
    ]


def test_json_lines_are_answers_those_with_errors_too():
    out = io.StringIO()
    given = [result().answer, Answer("b.jpg", error="torn"), result(film=film(), frame=3).answer]
    with JsonLines(out) as lines:
        lines.add(result())
        lines.fail(given[1])
        lines.add(result(film=film(), frame=3))
    assert [Answer.from_json(json.loads(line)) for line in out.getvalue().splitlines()] == given


def test_csv_has_the_boxes_and_quotes_what_needs_it():
    out = io.StringIO()
    with Csv(out) as table:
        table.add(result('a, "b".jpg'))
        table.add(result("c.jpg", found=()))
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert len(rows) == 2
    assert rows[0] | {"source": 'a, "b".jpg', "label": "dog", "x1": "10.0", "y2": "40.0", "frame": ""} == rows[0]


def test_coco_is_one_document_with_scores():
    out = io.StringIO()
    with Coco(out) as coco:
        coco.add(result())
        coco.add(result("b.jpg", found=()))
        coco.add(result("c.mp4", found=FOUND[:1], film=film(), frame=4))
    content = json.loads(out.getvalue())
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    assert content["images"][2] == {"id": 3, "file_name": "c.mp4", "width": 64, "height": 48, "frame": 4}
    assert [one["image_id"] for one in content["annotations"]] == [1, 1, 3]
    assert content["annotations"][0]["bbox"] == [10.0, 20.0, 40.0, 20.0]
    assert content["annotations"][0]["score"] == 0.9
    assert content["categories"] == [{"id": 1, "name": "../../cat"}, {"id": 3, "name": "dog"}]


def test_no_document_is_printed_after_a_failure():
    out = io.StringIO()
    with suppress(RuntimeError), Coco(out) as coco:
        coco.add(result())
        raise RuntimeError
    assert out.getvalue() == ""


def test_yolo_text_is_one_file_a_picture_normalised(tmp_path):
    with YoloText(tmp_path) as text:
        text.add(result())
        text.add(result("b.jpg", "b", found=()))
        text.add(result("c.mp4", "c", film=film(), frame=12))
    assert files(tmp_path) == ["labels/a.txt", "labels/b.txt", "labels/c/000012.txt"]
    first = (tmp_path / "labels" / "a.txt").read_text().splitlines()[0].split()
    assert [float(value) for value in first] == pytest.approx([3, 30 / 64, 30 / 48, 40 / 64, 20 / 48, 0.9], abs=1e-6)
    assert (tmp_path / "labels" / "b.txt").read_text() == ""


def test_crops_lie_in_folders_of_their_classes_inside_the_folder(tmp_path):
    with Crops(tmp_path / "out") as crops:
        crops.add(result())
        crops.add(result("c.mp4", "c", film=film(), frame=1))
    assert files(tmp_path) == [
        "out/crops/_.._cat/a-2.jpg",
        "out/crops/_.._cat/c/000001-2.jpg",
        "out/crops/dog/a-1.jpg",
        "out/crops/dog/c/000001-1.jpg",
    ]
    with Image.open(tmp_path / "out" / "crops" / "dog" / "a-1.jpg") as image:
        assert image.size == (40, 20)
        assert np.abs(np.asarray(image).mean(axis=(0, 1)) - (250, 10, 10)).max() < 10
    with Image.open(tmp_path / "out" / "crops" / "_.._cat" / "a-2.jpg") as image:
        assert image.size == (1, 48)


def test_annotated_pictures_have_boxes_and_videos_all_their_frames(tmp_path):
    first, second = film(), film()
    with Annotated(tmp_path) as annotated:
        annotated.add(result())
        for index in range(4):
            annotated.add(result("clip.mp4", "clip", film=first, frame=index))
        for index in range(3):
            annotated.add(result("clip.mp4", "clip-2", film=second, frame=index))
        annotated.add(result("b.jpg", "b", found=()))
    assert files(tmp_path) == ["a.jpg", "b.jpg", "clip-2.mp4", "clip.mp4"]
    with Image.open(tmp_path / "a.jpg") as boxed, Image.open(tmp_path / "b.jpg") as plain:
        assert boxed.size == (64, 48)
        assert np.abs(np.asarray(boxed, int) - np.asarray(plain, int)).max() > 50
    for name, count in (("clip", 4), ("clip-2", 3)):
        with VideoFile(tmp_path / f"{name}.mp4") as video:
            assert (video.width, video.height, len(list(video))) == (64, 48, count)


def test_a_video_that_was_not_finished_is_not_there(tmp_path):
    with suppress(RuntimeError), Annotated(tmp_path) as annotated:
        annotated.add(result("clip.mp4", "clip", film=film(), frame=0))
        raise RuntimeError
    assert files(tmp_path) == []


def test_a_window_needs_a_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(ToolError, match="--view cannot open a window"):
        Window()
