"""What `marina data show` writes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tools.cli import main
from tools.data.dataset import Box, Picture, read_dataset
from tools.data.drawn_set import DrawSettings, draw_dataset
from tools.data.show import CELL, label_statistics, show_dataset
from tools.data.write import write_annotations
from tools.errors import ToolError
from tools.report.boxes import GAP


def write_set(folder, classes, splits):
    """splits: of each the boxes of every picture."""
    written = {}
    for split, pictures in splits.items():
        (folder / split).mkdir(parents=True)
        written[split] = []
        for number, boxes in enumerate(pictures):
            file = folder / split / f"{number}.jpg"
            Image.new("RGB", (80, 40), (120, 120, 120)).save(file)
            written[split].append(Picture(file, file.name, 80, 40, tuple(boxes)))
    write_annotations(folder, classes, written, {})
    return read_dataset(folder)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show") / "shapes"
    return draw_dataset(DrawSettings(output=folder, pictures=[9, 3, 2], width=[96], height=[64]))


def test_the_command_writes_a_page_and_its_pictures(drawn, capsys, monkeypatch):
    monkeypatch.chdir(drawn.folder)
    assert main(["data", "show", ".", "--pictures", "4"]) == 0
    output = drawn.folder.parent / "shapes-show"
    assert str(output / "index.html") in capsys.readouterr().out
    names = {f"{split}-{what}.png" for split in ("train", "valid", "test") for what in ("examples", "boxes")}
    assert {path.name for path in output.iterdir()} == names | {"index.html"}
    text = (output / "index.html").read_text()
    assert text.count("data:image/png") == 6
    assert "http" not in text and "<script" not in text
    boxes = sum(len(picture.boxes) for picture in drawn.split("train"))
    assert f"<td>train</td><td class=number>9</td><td class=number>0</td><td class=number>{boxes}</td>" in text


def test_one_split_may_be_shown_alone(drawn, tmp_path):
    assert main(["data", "show", str(drawn.folder), "--split", "valid", "--output", str(tmp_path / "a" / "b")]) == 0
    assert {path.name for path in (tmp_path / "a" / "b").glob("*.png")} == {"valid-examples.png", "valid-boxes.png"}


def test_the_seed_chooses_the_examples(drawn, tmp_path):
    sheets = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        show_dataset(drawn, tmp_path / folder, 4, "train", seed)
        sheets.append((tmp_path / folder / "train-examples.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_boxes_are_drawn_on_the_scaled_picture(tmp_path):
    dataset = write_set(tmp_path / "set", ["one"], {"train": [[Box(0, 20, 10, 60, 30)]]})
    show_dataset(dataset, tmp_path / "out", 1, None, 0)
    with Image.open(io.BytesIO((tmp_path / "out" / "train-examples.png").read_bytes())) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    orange = np.abs(pixels - (230, 159, 0)).max(axis=2) < 90
    rows, columns = np.nonzero(orange)
    scale = CELL / 80
    assert columns.min() == pytest.approx(GAP + 20 * scale, abs=3)
    assert columns.max() == pytest.approx(GAP + 60 * scale, abs=3)
    assert rows.max() == pytest.approx(GAP + 30 * scale, abs=3)


NASTY = "<script>alert('$')</script>"


@pytest.mark.parametrize(
    ("classes", "splits"),
    [
        (["one"], {"train": [[]]}),
        ([NASTY], {"train": [[Box(0, 1, 1, 9, 9)], []], "test": [[]]}),
        ([f"class {index}" for index in range(80)], {"valid": [[Box(79, 0, 0, 80, 40)]] * 30}),
        (["one", "two"], {"valid": [], "train": [[Box(1, 2, 2, 20, 20, crowd=True), Box(0, 30, 3, 30, 3)]]}),
    ],
    ids=["no boxes", "markup", "80 classes", "crowd and a point"],
)
def test_any_set_can_be_shown(classes, splits, tmp_path):
    page = show_dataset(write_set(tmp_path / NASTY.replace("/", ""), classes, splits), tmp_path / "out", 24, None, 0)
    text = page.read_text()
    assert "<script" not in text
    assert text.count("<img") == 2 * sum(bool(pictures) for pictures in splits.values())


def test_statistics_are_shares_of_the_picture():
    pictures = [
        Picture(None, "a", 200, 100, (Box(1, 20, 10, 60, 30), Box(0, 0, 0, 200, 100, crowd=True))),
        Picture(None, "b", 50, 50),
        Picture(None, "c", 10, 20, (Box(0, 0, 0, 10, 20),)),
    ]
    expected = [[1, 0.2, 0.2, 0.2, 0.2], [0, 0.5, 0.5, 1, 1]]
    np.testing.assert_allclose(label_statistics(pictures, ["one", "two"]), expected)
    assert label_statistics([], ["one"]).shape == (0, 5)
    with pytest.raises(ToolError, match="category_id 2, but there are 1 classes"):
        label_statistics(pictures, ["one"])


def test_the_table_counts_backgrounds_and_crowds(tmp_path):
    boxes = [Box(0, 1, 1, 5, 5), Box(1, 1, 1, 5, 5), Box(1, 2, 2, 9, 9, crowd=True)]
    dataset = write_set(tmp_path / "set", ["one", "two"], {"train": [boxes, [], []], "test": [[boxes[0]]]})
    text = show_dataset(dataset, tmp_path / "out", 24, None, 0).read_text().replace(" class=number", "")
    cells = "".join(f"<td>{cell}</td>" for cell in ("train", 3, 2, 3, "1.000", 1))
    assert cells in text
    assert "<td>one</td><td>1</td><td>1</td><td>2</td>" in text
    assert "<td>two</td><td>1</td><td>0</td><td>1</td>" in text


def test_what_cannot_be_shown_is_named(drawn, tmp_path, capsys):
    dataset = write_set(tmp_path / "set", ["one"], {"train": [[]]})
    assert main(["data", "show", str(tmp_path / "set"), "--split", "test"]) == 1
    assert "no pictures in split 'test'" in capsys.readouterr().err
    dataset.split("train")[0].file.write_bytes(b"\xff\xd8\xff rest")
    with pytest.raises(ToolError, match=r"0\.jpg: the JPEG picture is truncated or corrupt"):
        show_dataset(dataset, tmp_path / "out", 1, None, 0)
    dataset.split("train")[0].file.unlink()
    with pytest.raises(ToolError, match=r"0\.jpg cannot be read \(No such file"):
        show_dataset(dataset, tmp_path / "out", 1, None, 0)
    assert main(["data", "show", str(drawn.folder), "--output", str(tmp_path / "set" / "dataset.json")]) == 1
    assert "is no folder" in capsys.readouterr().err
    assert main(["data", "show", str(drawn.folder), "--output", str(tmp_path / "set")]) == 1
    assert "was not made by Marina (no index.html)" in capsys.readouterr().err
    assert main(["data", "show", str(tmp_path)]) == 1
    assert "prepare" in capsys.readouterr().err
    assert main(["data", "show", str(drawn.folder), "--pictures", "0"]) == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "dataset.json").write_text(json.dumps({"classes": ["one"]}))
    assert main(["data", "show", str(tmp_path / "empty")]) == 1
    assert "no pictures in any split" in capsys.readouterr().err
