"""The walk-throughs of `archives/`: a file each, and two commands."""

import argparse
import shutil
from pathlib import Path

import pytest
import yaml
from labelled_sets import coco_set, yolo_set

from tools.cli import main
from tools.config import add_flags, settle
from tools.data.dataset import read_dataset
from tools.data.drawn_set import DrawSettings
from tools.data.prepare import PrepareSettings
from tools.train.config import TrainSettings

ARCHIVES = Path(__file__).resolve().parent.parent / "archives"
PROJECTS = sorted(ARCHIVES.glob("*/project.yaml"))


SECTIONS = {
    "prepare": (PrepareSettings, ["--source", "a", "--output", "b"]),
    "draw": (DrawSettings, ["--output", "b"]),
    "train": (TrainSettings, ["--data", "b"]),
}


@pytest.mark.parametrize(
    ("project", "section"),
    [
        pytest.param(path, section, id=path.parent.name)
        for path in PROJECTS
        for section in yaml.safe_load(path.read_text())
    ],
)
def test_every_setting_is_known(project, section):
    kind, flags = SECTIONS[section]
    parser = argparse.ArgumentParser()
    add_flags(parser, kind, section)
    settings = settle(parser.parse_args(["--config", str(project), *flags]), kind, section)
    given = yaml.safe_load(project.read_text())[section]
    assert given and {name for name in settings.model_fields_set if name in given} == set(given)


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_the_commands_it_shows_are_those_that_it_is_for(project):
    text = project.read_text()
    first, second = yaml.safe_load(text)
    for command in (f"data {first}", second):
        assert f"marina {command} --config {project.relative_to(ARCHIVES.parent)}" in text


def test_masks_from_a_zip_of_roboflow(tmp_path, capsys):
    names = "['no mask', incorrect, mask]"
    folder = yolo_set(tmp_path / "masks", {"train": 6, "valid": 2, "test": 2}, names=names, split_first=True)
    archive = shutil.make_archive(str(tmp_path / "masks"), "zip", tmp_path, folder.name)
    config, data = str(ARCHIVES / "masks" / "project.yaml"), str(tmp_path / "data")
    assert main(["data", "prepare", "--config", config, "--source", archive, "--output", data]) == 0
    assert read_dataset(tmp_path / "data").classes == ("no mask", "incorrect", "mask")
    small = ["--size", "64", "--batch", "2", "--workers", "0", "--devices", "cpu", "--fast-dev-run"]
    run = tmp_path / "run"
    assert main(["train", "--config", config, "--data", data, "--output", str(run), *small]) == 0
    recipe = yaml.safe_load((run / "archive.yaml").read_text())
    assert (recipe["name"], recipe["license"], recipe["model"]["args"]) == ("masks", "AGPL-3.0", {"size": "s"})


def test_sea_animals_from_a_coco_folder_of_roboflow(tmp_path):
    """Whose category 0 is no class."""
    categories = [{"id": 0, "name": "creatures", "supercategory": "none"}] + [
        {"id": number, "name": name, "supercategory": "creatures"} for number, name in enumerate(("fish", "puffin"), 1)
    ]
    for number, split in enumerate(("train", "valid")):
        (tmp_path / "sea" / split).mkdir(parents=True)
        boxes = [(1, 1, [4, 4, 20, 20]), (2, 2, [8, 8, 30, 30])]
        coco_set(tmp_path / "sea" / split, categories, boxes, seed=10 * number)
    config = str(ARCHIVES / "fasterrcnn-aquarium" / "project.yaml")
    data = tmp_path / "data"
    assert main(["data", "prepare", "--config", config, "--source", str(tmp_path / "sea"), "--output", str(data)]) == 0
    dataset = read_dataset(data)
    assert dataset.classes == ("fish", "puffin")
    assert {split: len(found) for split, found in dataset.splits.items() if found} == {"train": 2, "valid": 2}
