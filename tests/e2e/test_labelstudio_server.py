"""`marina label` and the gateway as an ML backend, with a real Label Studio."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import captured_items
import httpx
import pytest
from e2e.conftest import free_port, run_gateway
from label_studio_server import Studio

from tools.cli import main
from tools.data.dataset import Dataset, Picture, read_dataset
from tools.data.prepare import PrepareSettings, prepare
from tools.errors import ToolError
from tools.gateway.auth import new_key
from tools.gateway.settings import Server, Settings
from tools.labelstudio.client import LabelStudio, connect
from tools.labelstudio.project import set_up
from tools.labelstudio.pull import pull
from tools.labelstudio.push import push
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e

CIRCLE = ("circle", 0.5, (10.0, 10.0, 30.0, 40.0))

Label = Callable[..., tuple[int, str, str]]


@pytest.fixture
def label(label_studio: Studio, capsys: pytest.CaptureFixture[str]) -> Label:
    """`marina label` with arguments: exit code, output, errors."""

    def run(*arguments: object, token: Path = label_studio.token_file) -> tuple[int, str, str]:
        capsys.readouterr()
        options = ["--url", label_studio.url, "--token-file", str(token)]
        status = main(["label", *map(str, arguments), *options])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def studio(label_studio: Studio) -> Iterator[LabelStudio]:
    with connect(label_studio.url, label_studio.token_file) as client:
        yield client


def archive(server: TorchServe) -> Path:
    return server.store / "shapes.mar"


def region(label: str, x: float, y: float, width: float, height: float, rotation: float = 0) -> dict[str, Any]:
    """As the page of Label Studio sends it."""
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}


def pictures(dataset: Dataset) -> dict[str, Picture]:
    return {picture.file.stem: picture for split in dataset.splits.values() for picture in split}


def test_setup_makes_a_project_once_and_adds_classes(
    label: Label, label_studio: Studio, shapes_server: TorchServe
) -> None:
    status, said, _ = label("setup", archive(shapes_server), "--project", "setup")
    assert status == 0 and "made" in said
    config = label_studio.project("setup")["label_config"]
    status, said, _ = label("setup", archive(shapes_server), "--project", "setup")
    assert status == 0 and "was there" in said and "new" not in said
    assert label_studio.project("setup")["label_config"] == config
    status, said, _ = label("setup", archive(shapes_server), "--project", "setup", "--add", "moon & sun", "circle")
    assert status == 0 and "new: moon & sun\n" in said
    labels = label_studio.project("setup")["parsed_label_config"]["label"]["labels"]
    assert labels == ["circle", "cross", "ring", "square", "star", "triangle", "moon & sun"]


def test_a_project_that_does_not_fit_is_refused(label: Label, label_studio: Studio, shapes_server: TorchServe) -> None:
    config = (
        '<View><Image name="i" value="$image"/>'
        '<PolygonLabels name="l" toName="i"><Label value="a"/></PolygonLabels></View>'
    )
    label_studio.call("POST", "/api/projects/", json={"title": "polygons", "label_config": config})
    for arguments in (("setup", archive(shapes_server)), ("push", "nowhere"), ("pull", "nowhere")):
        status, _, error = label(*arguments, "--project", "polygons")
        assert status == 1 and "0 tags RectangleLabels" in error
    for arguments in (("push", "nowhere"), ("pull", "nowhere")):
        status, _, error = label(*arguments, "--project", "absent")
        assert status == 1 and "no project 'absent'" in error and "marina label setup" in error
    for _ in range(2):
        label_studio.call("POST", "/api/projects/", json={"title": "twice", "label_config": config})
    status, _, error = label("push", "nowhere", "--project", "twice")
    assert status == 1 and "2 projects 'twice'" in error


def test_push_adds_what_is_new_and_finishes_what_was_cut_off(
    label: Label, label_studio: Studio, studio: LabelStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        detections = [CIRCLE] if number else []
        captured_items.write_item(tmp_path, number, captured_items.scene(number), (96, 64), detections)
    set_up(studio, "pushed", ["circle"])
    project = label_studio.project("pushed")["id"]
    call = LabelStudio.call

    def cut_off(self: LabelStudio, method: str, path: str, **options: Any) -> Any:
        if path.endswith("/import") and "json" in options:
            raise KeyboardInterrupt
        return call(self, method, path, **options)

    monkeypatch.setattr(LabelStudio, "call", cut_off)
    with pytest.raises(KeyboardInterrupt):
        push(studio, "pushed", str(tmp_path))
    monkeypatch.undo()
    assert not label_studio.tasks("pushed")
    status, said, _ = label("push", tmp_path, "--project", "pushed")
    assert status == 0 and "3 tasks made (3 of shapes 1.0), 0 were there" in said
    assert len(label_studio.call("GET", f"/api/projects/{project}/file-uploads", params={"all": "true"})) == 3
    newest = captured_items.write_item(tmp_path, 3, captured_items.scene(3), (96, 64), version="1.1")
    (tmp_path / captured_items.DAY / f"{captured_items.write_item(tmp_path, 4, b'', (96, 64))}.jpg").unlink()
    status, said, _ = label("push", tmp_path, "--project", "pushed")
    assert status == 0 and "1 tasks made (1 of shapes 1.1), 3 were there" in said
    assert f"left out: item {captured_items.item_id(4)}: its picture cannot be read" in said
    tasks = label_studio.tasks("pushed")
    assert [task["data"]["item"] for task in tasks] == [captured_items.item_id(number) for number in range(4)]
    assert label_studio.project("pushed")["model_version"] == "shapes 1.1"
    one = tasks[1]
    assert one["data"]["reasons"] == "near-threshold, random" and one["data"]["captured"].startswith("2026-11-20T")
    (predicted,) = one["predictions"]
    (found,) = predicted["result"]
    assert predicted["model_version"] == "shapes 1.0" and predicted["score"] == found["score"] == 0.5
    value = found["value"]
    assert [value[key] for key in ("x", "y", "width", "height")] == pytest.approx(
        [10 / 0.96, 10 / 0.64, 20 / 0.96, 30 / 0.64]
    )
    assert value["rectanglelabels"] == ["circle"]
    assert tasks[3]["data"]["item"] == newest and tasks[0]["predictions"][0]["result"] == []


def test_push_refuses_labels_that_the_project_lacks(
    label: Label, label_studio: Studio, studio: LabelStudio, tmp_path: Path
) -> None:
    captured_items.write_item(tmp_path, 1, captured_items.scene(1), (96, 64), [CIRCLE, ("moon", 0.5, (0, 0, 5, 5))])
    set_up(studio, "lacking", ["circle"])
    status, _, error = label("push", tmp_path, "--project", "lacking")
    assert status == 1 and "'moon'" in error and "circle" not in error
    assert not label_studio.tasks("lacking")


def test_pull_brings_annotations_once_with_where_they_came_from(
    label: Label, label_studio: Studio, studio: LabelStudio, tmp_path: Path
) -> None:
    source, output = tmp_path / "captured", tmp_path / "set"
    bodies = [captured_items.scene(number) for number in range(6)]
    bodies[5] = captured_items.scene(5, orientation=6)
    for number, body in enumerate(bodies):
        size = (64, 96) if number == 5 else (96, 64)
        captured_items.write_item(source, number, body, size, [CIRCLE])
    set_up(studio, "pulled", ["circle", "star"])
    status, _, error = label("pull", output, "--project", "pulled")
    assert status == 1 and "annotate some" in error and not output.exists()
    push(studio, "pulled", str(source))
    tasks = label_studio.tasks("pulled")
    names = [captured_items.item_id(number) for number in range(6)]
    label_studio.annotate(tasks[0]["id"], [])
    label_studio.annotate(tasks[1]["id"], tasks[1]["predictions"][0]["result"])
    label_studio.annotate(tasks[2]["id"], [], was_cancelled=True)
    label_studio.annotate(tasks[3]["id"], [region("circle", 0, 0, 50, 50)])
    last = label_studio.annotate(tasks[3]["id"], [region("star", 50, 50, 25, 25, rotation=45)])
    label_studio.annotate(tasks[5]["id"], [region("star", 0, 0, 50, 25)])
    status, said, _ = label("pull", output, "--project", "pulled")
    assert status == 0 and "4 pictures added, 0 changed, 0 removed, 0 as they were" in said
    assert "1 tasks were skipped" in said and "1 tasks have several" in said and "1 turned rectangles" in said
    dataset = read_dataset(output)
    found = pictures(dataset)
    assert dataset.classes == ("circle", "star") and sorted(found) == [names[number] for number in (0, 1, 3, 5)]
    assert all(found[names[number]].file.read_bytes() == bodies[number] for number in (0, 1, 3, 5))
    assert not found[names[0]].boxes and [box.xyxy for box in found[names[1]].boxes] == [CIRCLE[2]]
    assert [box.label for box in found[names[3]].boxes] == [1]
    # A quarter turned by its EXIF: half of its width and a quarter of its height as it is looked at.
    turned = found[names[5]]
    assert (turned.width, turned.height) == (64, 96) and turned.boxes[0].xyxy == (0, 0, 32, 24)
    origin = json.loads((output / "history.json").read_text())["pictures"][f"train/{names[3]}.jpg"]
    assert origin["item"] == names[3] and (origin["model"], origin["version"]) == ("shapes", "1.0")
    assert (origin["task"], origin["annotation"], origin["annotator"]) == (tasks[3]["id"], last, 1) and origin["time"]
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    status, said, _ = label("pull", output, "--project", "pulled")
    assert status == 0 and "0 pictures added, 0 changed, 0 removed, 4 as they were" in said
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == written

    # Another one, one that is changed, one that is withdrawn, and one whose task is gone.
    label_studio.annotate(tasks[4]["id"], [region("circle", 0, 0, 50, 50), region("star", 0, 0, 0, 50)])
    label_studio.call("PATCH", f"/api/annotations/{last}/", json={"result": [region("circle", 0, 0, 100, 100)]})
    (mine,) = label_studio.call("GET", f"/api/tasks/{tasks[1]['id']}/annotations/")
    label_studio.call("DELETE", f"/api/annotations/{mine['id']}/")
    label_studio.call("DELETE", f"/api/tasks/{tasks[0]['id']}/")
    status, said, _ = label("pull", output, "--project", "pulled")
    assert status == 0 and "1 pictures added, 1 changed, 1 removed, 1 as they were" in said
    assert "1 pictures stay" in said and f"left out: task {tasks[4]['id']}: a region" in said
    found = pictures(read_dataset(output))
    assert sorted(found) == [names[number] for number in (0, 3, 4, 5)]
    assert found[names[3]].boxes[0].xyxy == (0, 0, 96, 64) and len(found[names[4]].boxes) == 1
    history = json.loads((output / "history.json").read_text())
    assert len(history["pictures"]) == 4 and [entry["added"] for entry in history["pulls"]] == [4, 1]
    prepared = prepare(PrepareSettings(source=[output], output=tmp_path / "prepared", workers=1))
    assert prepared.report is not None and prepared.report.pictures == 4 and not prepared.report.count("dropped")[0]


def test_pull_leaves_all_as_it_was_when_it_cannot_go_on(
    label: Label, label_studio: Studio, studio: LabelStudio, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    for number in range(3):
        captured_items.write_item(tmp_path, number, captured_items.scene(number), (96, 64))
    set_up(studio, "refused", ["circle", "star"])
    push(studio, "refused", str(tmp_path))
    project, tasks = label_studio.project("refused"), label_studio.tasks("refused")
    label_studio.annotate(tasks[0]["id"], [region("circle", 0, 0, 50, 50)])
    assert pull(studio, "refused", output).added == 1
    before = (output / "history.json").read_bytes()
    label_studio.annotate(tasks[1]["id"], [region("star", 0, 0, 50, 50)])
    less = project["label_config"].replace('value="star"', 'value="moon"')
    label_studio.call("PATCH", f"/api/projects/{project['id']}/", json={"label_config": less})
    with pytest.raises(ToolError, match=f"no longer has: 'star' in 1 tasks, such as {tasks[1]['id']}"):
        pull(studio, "refused", output)
    assert (output / "history.json").read_bytes() == before
    label_studio.call("PATCH", f"/api/projects/{project['id']}/", json={"label_config": project["label_config"]})
    # A picture from elsewhere is told and left out; one of nobody's capture is taken.
    mine = {"image": tasks[2]["data"]["image"]}
    added = label_studio.call(
        "POST",
        f"/api/projects/{project['id']}/import",
        params={"return_task_ids": "true"},
        json=[{"data": {"image": "http://127.0.0.1:9/data/a.jpg"}}, {"data": mine}],
    )["task_ids"]
    for task in added:
        label_studio.annotate(task, [region("circle", 0, 0, 50, 50)])
    pulled = pull(studio, "refused", output)
    assert pulled.added == 2 and len(pulled.left_out) == 1
    assert f"task {added[0]}: " in pulled.left_out[0] and "not at this Label Studio" in pulled.left_out[0]
    assert f"task-{added[1]}" in pictures(read_dataset(output))
    set_up(studio, "another", ["circle"])
    with pytest.raises(ToolError, match="choose another folder"):
        pull(studio, "another", output)


@pytest.mark.parametrize("name", ["", " ", " moon"])
def test_a_label_that_is_none_is_refused_before_anything_is_made(studio: LabelStudio, name: str) -> None:
    with pytest.raises(ToolError, match="is empty, or has spaces around it"):
        set_up(studio, "nameless", ["circle", name])
    assert studio.project("nameless") is None


def test_a_label_named_twice_is_one(studio: LabelStudio) -> None:
    assert set_up(studio, "two moons", ["circle", "moon", "moon"]).labels == ("circle", "moon")


def test_annotators_get_live_predictions_of_the_served_model(
    label: Label, label_studio: Studio, shapes_server: TorchServe, pictures_of: Path, tmp_path: Path
) -> None:
    """Label Studio itself asks the gateway, which asks TorchServe."""
    key, line = new_key("studio")
    (tmp_path / "keys").write_text(line)
    (tmp_path / "key").write_text(key)
    (tmp_path / "wrong").write_text("marina_wrong")
    settings = Settings(
        backends=[Server(url=shapes_server.url, token_file=shapes_server.token_file, models=["shapes"])],
        keys_file=tmp_path / "keys",
        port=free_port(),
        storage=str(tmp_path / "uploads"),
        label_studio_url=label_studio.url,
        label_studio_token_file=label_studio.token_file,
    )
    url = f"http://127.0.0.1:{settings.port}/label-studio"
    setup = ["setup", archive(shapes_server), "--project", "live", "--ml-backend", url, "--ml-key-file"]
    with run_gateway(settings):
        status, _, error = label(*setup, tmp_path / "wrong")
        assert status == 1 and "authentication parameters" in error and "marina_wrong" not in error
        for _ in range(2):
            assert label(*setup, tmp_path / "key")[0] == 0
        assert label("push", pictures_of, "--project", "live")[0] == 0
        project = label_studio.project("live")
        (backend,) = label_studio.call("GET", "/api/ml/", params={"project": project["id"]})
        assert backend["state"] == "CO" and backend["model_version"] == "shapes 1.0"
        assert project["model_version"] == backend["title"]
        assert label_studio.call("GET", "/api/webhooks/", params={"project": project["id"]}) == []
        # As the page does when an annotator opens the next task.
        shown = label_studio.call("GET", f"/api/projects/{project['id']}/next/")["predictions"]
    (live,) = [one for one in shown if one["model_version"] == "shapes 1.0"]
    (body,) = [path.read_bytes() for path in pictures_of.rglob("*.jpg")]
    headers = {"Authorization": f"Bearer {shapes_server.token}", "Marina-Format": "detections"}
    answer = httpx.post(shapes_server.prediction_url("shapes"), content=body, headers=headers, timeout=120).json()
    assert (answer["width"], answer["height"]) == (240, 320) and answer["detections"]
    for found, detection in zip(live["result"], answer["detections"], strict=True):
        value, (x1, y1, x2, y2) = found["value"], detection["box"]
        assert value["rectanglelabels"] == [detection["label"]] and found["score"] == pytest.approx(detection["score"])
        expected = [x1 / 2.4, y1 / 3.2, (x2 - x1) / 2.4, (y2 - y1) / 3.2]
        assert [value[name] for name in ("x", "y", "width", "height")] == pytest.approx(expected, abs=0.01)


@pytest.fixture
def pictures_of(tmp_path: Path) -> Path:
    """One captured item, whose picture EXIF turns by a quarter, of an older version of the model."""
    folder = tmp_path / "captured"
    body = captured_items.scene(1, 320, 240, orientation=6)
    captured_items.write_item(folder, 1, body, (240, 320), [CIRCLE], version="0.9")
    return folder


def test_tokens_of_each_kind(label: Label, label_studio: Studio, studio: LabelStudio, tmp_path: Path) -> None:
    set_up(studio, "tokens", ["circle"])
    captured_items.write_item(tmp_path, 1, captured_items.scene(1), (96, 64), [CIRCLE])
    personal = tmp_path / "personal"
    personal.write_text(label_studio.call("POST", "/api/token/")["token"])
    assert label("push", tmp_path, "--project", "tokens", token=personal)[0] == 0
    (tmp_path / "wrong").write_text(personal.read_text()[:-4] + "AAAA")
    status, _, error = label("push", tmp_path, "--project", "tokens", token=tmp_path / "wrong")
    assert status == 1 and "does not take the token (Token is invalid)" in error and error.count("\n") == 1
    label_studio.call("POST", "/api/jwt/settings", json={"legacy_api_tokens_enabled": False})
    try:
        status, _, error = label("push", tmp_path, "--project", "tokens")
        assert status == 1 and "legacy token authentication has been disabled" in error
        assert label("push", tmp_path, "--project", "tokens", token=personal)[0] == 0
    finally:
        with connect(label_studio.url, personal) as client:
            client.call(
                "POST", "/api/jwt/settings", json={"legacy_api_tokens_enabled": True, "api_tokens_enabled": True}
            )
