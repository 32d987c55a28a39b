"""`marina loop` with a real Label Studio: a class that the model in production never saw becomes one that it finds."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import captured_items
import pytest
import yaml
from label_studio_server import Studio
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw

from tools.archive.build import build_archive
from tools.archive.reader import open_archive
from tools.archive.recipe import load_recipe
from tools.data.draw import CLASSES, draw_scene
from tools.evaluate.evaluation import RESULT
from tools.labelstudio.client import connect
from tools.labelstudio.project import set_up
from tools.labelstudio.push import push
from tools.store.promote import promote
from tools.store.store import Store
from tools.train.run import BEST, CONFIG

pytestmark = pytest.mark.e2e

SIDE = 320
NEW = "moon"


def marina(folder: Path, *arguments: object) -> str:
    command = [Path(sys.executable).with_name("marina"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def with_moon(generator: Generator) -> tuple[Image.Image, list[tuple[str, tuple[float, float, float, float]]]]:
    """A scene with a crescent in front of it, and what is on it; shapes that it hides are as they were."""
    image, shapes = draw_scene(generator, SIDE, SIDE)
    diameter = int(generator.integers(60, 110))
    left, top = (int(value) for value in generator.integers(0, SIDE - diameter, 2))
    stamp = Image.new("L", (diameter, diameter))
    draw = ImageDraw.Draw(stamp)
    draw.ellipse((0, 0, diameter - 1, diameter - 1), fill=255)
    draw.ellipse((diameter * 0.35, -diameter * 0.1, diameter * 1.35, diameter * 0.9), fill=0)
    colour = tuple(int(value) for value in generator.integers(0, 256, 3))
    image.paste(Image.new("RGB", stamp.size, colour), (left, top), stamp)
    x1, y1, x2, y2 = stamp.getbbox()
    box = (left + x1, top + y1, left + x2, top + y2)
    rest = [(shape.label, shape.box) for shape in shapes if not _hidden(shape.box, box)]
    return image, [*rest, (NEW, box)]


def _hidden(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    area = (one[2] - one[0]) * (one[3] - one[1])
    return width > 0 and height > 0 and width * height > 0.3 * area


def region(label: str, box: tuple[float, float, float, float]) -> dict[str, Any]:
    x1, y1, x2, y2 = (100 * value / SIDE for value in box)
    value = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}


def put_into_production(repository: Path, folder: Path, store: Store, pictures: int) -> None:
    """The model of the tree, as a training would have left it, and the data set that it is good at."""
    marina(folder, "data", "draw", "--output", "drawn", "--pictures", pictures, "--width", SIDE, "--height", SIDE)
    marina(folder, "data", "prepare", "--source", "drawn", "--output", "base")
    store.push(folder / "base", "shapes")
    run = folder / "run"
    shutil.copytree(repository / "archives" / "shapes", run)
    (run / "shapes.safetensors").rename(run / BEST)
    recipe = yaml.safe_load((run / "archive.yaml").read_text())
    recipe["weights"]["file"] = BEST
    (run / "archive.yaml").write_text(yaml.safe_dump(recipe))
    (run / CONFIG).write_text("train: {}\n")
    build_archive(load_recipe(run), folder / "shapes.mar")
    marina(folder, "evaluate", "run", "--data", "base", "--output", "evaluation")
    for path, kind, name in ((run, "runs", "shapes"), (folder / "shapes.mar", "archives", None)):
        pushed = store.push(path, name, folder / "evaluation", ["map50=0.5"])
        assert pushed.kind == kind
        promote(store, pushed, "production", None, None)


def annotate_moons(studio: Studio, title: str, folder: Path, count: int) -> None:
    """Pictures as a capture keeps them, pushed, and drawn on by somebody who sees everything."""
    truths = {}
    for number in range(count):
        image, there = with_moon(default_rng(1000 + number))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        truths[captured_items.write_item(folder, number, buffer.getvalue(), (SIDE, SIDE))] = there
    with connect(studio.url, studio.token_file) as client:
        set_up(client, title, [*CLASSES, NEW])
        push(client, title, str(folder))
    for task in studio.tasks(title):
        studio.annotate(task["id"], [region(*each) for each in truths[task["data"]["item"]]])


def go_round(folder: Path, studio: Studio, title: str) -> str:
    line = ["loop", "shapes.yaml", "--project", title, "--url", studio.url, "--token-file", studio.token_file]
    return marina(folder, *line)


def figures(folder: Path, name: str) -> dict[str, float]:
    """AP50 of each class, by the evaluation `name` of the only round."""
    (work,) = (folder / "loops" / "shapes" / "rounds").iterdir()
    return {each["name"]: each["ap50"] for each in json.loads((work / name / RESULT).read_text())["per_class"]}


@pytest.mark.parametrize(
    ("pictures", "moons", "epochs", "least"),
    [
        # As far as it goes in seconds: the new class is learnt of, and nothing is forgotten.
        pytest.param(48, 24, 1, 0.0, id="short"),
        pytest.param(300, 150, 20, 0.25, id="whole", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_a_class_that_was_never_seen_comes_into_production(
    repository: Path,
    tmp_path: Path,
    label_studio: Studio,
    monkeypatch: pytest.MonkeyPatch,
    pictures: int,
    moons: int,
    epochs: int,
    least: float,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    store = Store(str(tmp_path / "store"))
    put_into_production(repository, tmp_path, store, pictures)
    content = {"store": str(tmp_path / "store"), "dataset": "shapes", "model_name": "shapes", "size": SIDE}
    content |= {"model_size": "n", "epochs": epochs, "batch": 8, "license": "Apache-2.0", "device": "cpu"}
    require = f"map50=0.5,ap50:{NEW}={least}" if least else "map50=0.5"
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(content | {"require": require}))
    title = f"loop {pictures}"
    annotate_moons(label_studio, title, tmp_path / "captured", moons)

    said = go_round(tmp_path, label_studio, title)

    assert "they know 6 of the 7 labels" in said
    before, after = figures(tmp_path, "live-evaluation"), figures(tmp_path, "evaluation")
    assert mean(after[name] for name in CLASSES) >= mean(before[name] for name in CLASSES) - 0.02
    assert before[NEW] == 0 and after[NEW] >= least
    live = store.find("shapes@production", "archives")
    assert live.version != "1.0" and store.find("shapes@production", "runs").id != live.id
    with open_archive(store.pull(live, tmp_path / "live.mar")) as archive:
        assert NEW in archive.read("index_to_name.json").decode()
    assert "have changed since the last round" in go_round(tmp_path, label_studio, title)
