"""Whole data sets of drawn shapes."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from tools.cli import main
from tools.data.dataset import SPLITS, read_dataset
from tools.data.draw import CLASSES, DIFFICULTIES, draw_scene
from tools.data.drawn_set import SECTION, DrawSettings, add_arguments, draw_dataset
from tools.errors import ToolError

# Of draw_scene(default_rng(seed), 160, 120) for seeds from 0, as it was when `shapes` was trained.
MEANS = [
    95.778,
    129.334,
    114.614,
    104.679,
    202.83,
    182.505,
    134.823,
    186.114,
    132.742,
    153.348,
    122.261,
    101.663,
    118.21,
    209.55,
    154.07,
    134.45,
    88.947,
    114.293,
    118.197,
    126.933,
]


def settings(output, **others):
    return DrawSettings(**{"output": output, "pictures": [6, 2, 3], "width": [40, 90], "height": [64], **others})


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_drawn_set_is_a_data_set(tmp_path):
    dataset = draw_dataset(settings(tmp_path / "set"))
    assert dataset == read_dataset(tmp_path / "set")
    assert dataset.classes == CLASSES
    assert [len(dataset.splits[split]) for split in SPLITS] == [6, 2, 3]
    widths = set()
    for pictures in dataset.splits.values():
        for picture in pictures:
            with Image.open(picture.file) as image:
                assert image.size == (picture.width, picture.height)
            widths.add(picture.width)
            assert picture.height == 64
            for box in picture.boxes:
                assert 0 <= box.x1 < box.x2 <= picture.width and 0 <= box.y1 < box.y2 <= picture.height
    assert min(widths) >= 40 and max(widths) <= 90 and len(widths) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    info = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert info["splits"]["train"]["pictures"] == 6
    assert settings(tmp_path / "set", **info[SECTION]) == settings(tmp_path / "set")


def test_the_set_is_the_same_whatever_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.data.drawn_set.FEWEST_A_PROCESS", 1)
    draw_dataset(settings(tmp_path / "one", workers=1))
    draw_dataset(settings(tmp_path / "two", workers=2))
    draw_dataset(settings(tmp_path / "other", workers=1, seed=1))
    one, two, other = (content(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not {data for path, data in one.items() if path.suffix == ".jpg"} & set(other.values())


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path):
    few = content(draw_dataset(settings(tmp_path / "few", pictures=[2, 1, 0])).folder)
    more = content(draw_dataset(settings(tmp_path / "more", pictures=[5, 4, 3])).folder)
    pictures = [path for path in few if path.suffix == ".jpg"]
    assert len(pictures) == 3
    assert all(few[path] == more[path] for path in pictures)
    assert len({more[path] for path in more if path.suffix == ".jpg"}) == 12


def test_pictures_without_shapes_are_as_many_as_asked_for(tmp_path):
    def backgrounds(share):
        dataset = draw_dataset(settings(tmp_path / "set", pictures=[60, 0, 0], background=share, replace=True))
        assert list(dataset.splits) == ["train"]
        return sum(not picture.boxes for picture in dataset.split("train"))

    assert (backgrounds(0.0), backgrounds(1.0)) == (0, 60)
    assert 15 <= backgrounds(0.5) <= 45


def test_classes_and_shapes_a_picture_are_those_asked_for(tmp_path):
    chosen = {"classes": ["star", "circle"], "most_shapes": 2, "background": 0.0}
    dataset = draw_dataset(settings(tmp_path / "set", pictures=[25, 0, 0], **chosen))
    assert dataset.classes == ("star", "circle")
    assert {box.label for picture in dataset.split("train") for box in picture.boxes} == {0, 1}
    assert {len(picture.boxes) for picture in dataset.split("train")} == {1, 2}


def test_difficulty_changes_size_overlap_and_contrast():
    def smallest_and_deepest(name):
        """Of circles that the picture does not cut: the least diameter, and how far one reaches into another."""
        smallest, deepest = 200, 0
        for seed in range(40):
            _, shapes = draw_scene(default_rng(seed), 200, 200, 8, ("circle",), DIFFICULTIES[name])
            boxes = np.array([shape.box for shape in shapes])
            whole = boxes[(boxes.min(axis=1) > 0) & (boxes.max(axis=1) < 200)]
            centres, radii = (whole[:, :2] + whole[:, 2:]) / 2, (whole[:, 2:] - whole[:, :2]).max(axis=1) / 2
            apart = np.linalg.norm(centres[:, None] - centres, axis=2) + np.diag(np.full(len(whole), 1000))
            reach = (radii[:, None] + radii - apart) / np.minimum(radii[:, None], radii)
            deepest = max([deepest, *reach.flat])
            smallest = min([smallest, *(2 * radii)])
        return smallest, deepest

    easy, normal, hard = map(smallest_and_deepest, ("easy", "normal", "hard"))
    assert easy[0] > normal[0] > hard[0]
    assert easy[1] < 0.1 < normal[1] < hard[1]
    contrasts = [DIFFICULTIES[name].least_contrast for name in ("easy", "normal", "hard")]
    assert contrasts == sorted(contrasts, reverse=True)


def test_normal_pictures_stay_as_they_were():
    """The weights of `shapes` were trained on them. Means, since platforms differ in the last bit of a sine."""
    means = [np.asarray(draw_scene(default_rng(seed), 160, 120)[0]).mean() for seed in range(len(MEANS))]
    assert means == pytest.approx(MEANS, abs=0.05)


def test_another_data_set_is_replaced_only_when_asked_and_other_folders_never(tmp_path):
    output = tmp_path / "set"
    draw_dataset(settings(output))
    before = content(output)
    with pytest.raises(ToolError, match="--replace"):
        draw_dataset(settings(output, seed=1))
    assert content(output) == before
    draw_dataset(settings(output, seed=1, replace=True))
    assert content(output) != before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    with pytest.raises(ToolError, match="not made by Marina"):
        draw_dataset(settings(tmp_path / "letters", replace=True))
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["love.txt"]


def test_nothing_is_left_of_a_set_that_could_not_be_finished(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ToolError, match="disk is full"):
        draw_dataset(settings(tmp_path / "set"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "kept"), [([1000], [800, 100, 100]), ([7], [5, 1, 1]), ([1, 0, 2], [1, 0, 2])])
def test_one_number_of_pictures_is_the_total(given, kept, tmp_path):
    assert settings(tmp_path, pictures=given).pictures == kept


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pictures", "3", "4"], "pictures: give one total or three numbers, for train, valid, test"),
        (["--pictures", "0"], "pictures: give one total"),
        (["--pictures", "5", "-1", "3"], "pictures: give one total"),
        (["--width", "31"], "width: give one side or from and to, between 32 and 4096"),
        (["--height", "90", "80"], "height: give one side"),
        (["--classes", "star", "hexagon"], "classes: choose from circle, cross"),
        (["--classes", "star", "star"], "each once"),
        (["--background", "1.5"], "background"),
        (["--most-shapes", "0"], "most_shapes"),
    ],
)
def test_wrong_settings_are_named(flags, named, tmp_path, capsys):
    assert main(["data", "draw", "--output", str(tmp_path / "set"), *flags]) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_the_command_draws_and_counts(tmp_path, capsys):
    config = tmp_path / "project.yaml"
    config.write_text("draw: {output: set, width: [48], height: [48], classes: [ring]}\n")
    assert main(["data", "draw", "--config", str(config), "--pictures", "4"]) == 0
    assert f"{tmp_path / 'set'}: 2 train, 1 valid, 1 test pictures, " in capsys.readouterr().out
    assert read_dataset(tmp_path / "set").classes == ("ring",)


def test_help_shows_every_setting_and_needs_no_torch(repository):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert all("--" + name.replace("_", "-") in parser.format_help() for name in DrawSettings.model_fields)
    code = "import tools.data.drawn_set, tools.data.show, sys; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=60)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("count", "splits"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (2, [2, 0, 0]), (1000, [800, 100, 100])])
def test_a_total_leaves_no_split_empty_while_there_are_pictures(tmp_path, count, splits):
    assert settings(tmp_path / "set", pictures=[count]).pictures == splits
