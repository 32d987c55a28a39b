"""`marina evaluate`: archives, weights, servers and predictions on pictures; gates; what is written."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.cli import main
from tools.data.dataset import Box, Dataset, Picture, read_dataset
from tools.data.drawn_set import DrawSettings, draw_dataset
from tools.data.write import write_annotations
from tools.errors import ToolError
from tools.evaluate import sources
from tools.evaluate.evaluation import evaluate
from tools.evaluate.gates import failures, parse_gates
from tools.evaluate.metrics import average_precision, fitness, truth_of
from tools.evaluate.sources import PipelineSource, PredictionsSource, ServerSource, archive_source, recipe_source

THRESHOLD = 0.4  # what archives/shapes serves above


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "set"
    draw_dataset(DrawSettings(output=folder, pictures=[0, 3, 10], width=[320], height=[240], workers=1))
    return folder


@pytest.fixture(scope="module")
def shapes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.archive.build import build_archive
    from tools.archive.recipe import load_recipe

    path = tmp_path_factory.mktemp("shapes") / "shapes.mar"
    build_archive(load_recipe(repository / "archives" / "shapes"), path)
    return path


@pytest.fixture(scope="module")
def source(shapes: Path) -> Iterator[PipelineSource]:
    import torch

    with archive_source(shapes) as source:
        torch.set_num_threads(1)
        yield source


@pytest.fixture(scope="module")
def made(shapes: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of `shapes`, and its predictions beside it."""
    folder = tmp_path_factory.mktemp("made")
    arguments = ["evaluate", str(shapes), "--data", str(drawn), "--output", str(folder / "one")]
    assert main([*arguments, "--save-predictions", str(folder / "predictions.json")]) == 0
    return folder


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def without_speed(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "speed_ms"}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("marina: ") and error.count("\n") == 1
    return error


# ---- an archive


def test_an_evaluation_holds_together(made: Path) -> None:
    content = content_of(made / "one")
    assert content["data"]["split"] == "test" and content["data"]["pictures"] == 10
    overall, curves = content["overall"], content["curves"]
    assert overall["map50"] > 0.8
    # As served is the curve at the threshold that is served.
    index = curves["thresholds"].index(THRESHOLD)
    for rate in ("precision", "recall", "f1", "f2"):
        assert curves["overall"][rate][index] == overall[rate]
        for entry in content["per_class"]:
            assert curves["per_class"][entry["name"]][rate][index] == entry[rate]
    assert content["best"]["f2"]["value"] >= overall["f2"]
    sums = {kind: sum(entry[kind] for entry in content["per_class"]) for kind in ("tp", "fp", "fn")}
    assert overall["f2"] == pytest.approx(5 * sums["tp"] / (5 * sums["tp"] + 4 * sums["fn"] + sums["fp"]), abs=1e-6)
    assert sums["tp"] + sums["fn"] == content["data"]["boxes"] == sum(map(sum, content["confusion"][:-1]))
    assert all(content["speed_ms"][stage] > 0 for stage in ("decode", "preprocess", "inference", "postprocess"))


def test_the_folder_has_a_page_and_its_pictures(made: Path) -> None:
    files = {path.name for path in (made / "one").iterdir()}
    assert files >= {"evaluation.json", "matches.npz", "report.html", "f2.png", "precision_recall.png", "confusion.png"}
    page = (made / "one" / "report.html").read_text()
    assert "circle" in page and page.count("<img") == len(files) - 3


def test_predictions_that_were_saved_give_the_same_average_precision(made: Path, drawn: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--predictions", str(made / "predictions.json"), "--data", str(drawn)]
    assert main([*arguments, "--output", str(tmp_path / "again")]) == 0
    again, first = content_of(tmp_path / "again"), content_of(made / "one")
    for name in ("map50", "map50_95", "map75", "large"):
        assert again["overall"][name] == pytest.approx(first["overall"][name], abs=1e-6)
    assert again["data"] == first["data"] and again["speed_ms"] == {}


def test_weights_with_a_recipe_are_what_their_archive_is(made: Path, drawn: Path, repository: Path) -> None:
    dataset = read_dataset(drawn)
    weights = repository / "archives" / "shapes" / "shapes.safetensors"
    with recipe_source(repository / "archives" / "shapes", weights) as source:
        values = evaluate(source, dataset, "test").values()
    expected = content_of(made / "one")["overall"]
    for name in ("map50", "map50_95", "f2"):
        assert values[name] == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("threshold", [THRESHOLD, 0.93])
def test_serving_suppresses_and_limits_as_the_archive_says(
    threshold: float, source: PipelineSource, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.pipeline, "defaults", replace(source.pipeline.defaults, score_threshold=threshold))
    dataset = read_dataset(drawn)
    pictures = dataset.split("valid")
    for picture, answer in zip(pictures, source.answers(pictures, dataset.classes), strict=True):
        (served,) = source.pipeline.detect([picture.file.read_bytes()], source.pipeline.defaults)
        # The lower threshold has more cells computed together, which rounds otherwise.
        assert np.allclose(answer.served.boxes, served.boxes, atol=1e-3)
        assert np.allclose(answer.served.scores, served.scores, atol=1e-5)
        assert len(answer.ranked.scores) >= len(answer.swept.scores) > len(answer.served.scores)


def test_classes_are_matched_by_name(source: PipelineSource, drawn: Path) -> None:
    dataset = read_dataset(drawn)
    # The set's classes in another order, one of them under a name that the model does not know.
    names = list(reversed(dataset.classes))
    names[names.index("star")] = "asterisk"
    index = {old: len(names) - 1 - number for number, old in enumerate(dataset.classes)}
    pictures = [
        Picture(
            each.file,
            each.name,
            each.width,
            each.height,
            tuple(Box(index[dataset.classes[box.label]], *box.xyxy) for box in each.boxes),
        )
        for each in dataset.split("test")
    ]
    renamed = evaluate(source, Dataset(drawn, tuple(names), {"test": pictures}), "test")
    first = evaluate(source, dataset, "test")
    for name in dataset.classes:
        if name != "star":
            assert renamed.values()[f"f2:{name}"] == pytest.approx(first.values()[f"f2:{name}"], nan_ok=True)
    assert renamed.values()["recall:asterisk"] == 0
    unknown, foreign = renamed.notes
    assert "does not know asterisk" in unknown
    stars = first.counts.tp[:, dataset.classes.index("star")] + first.counts.fp[:, dataset.classes.index("star")]
    assert foreign.startswith(f"{stars.sum()} served detections are of classes that the data set has not")
    assert first.notes == []


def test_a_picture_that_is_refused_counts_as_nothing_found(source: PipelineSource, drawn: Path, tmp_path: Path) -> None:
    dataset = read_dataset(drawn)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    good = dataset.split("test")[0]
    broken = Picture(tmp_path / "broken.jpg", "broken.jpg", 10, 10, (Box(0, 0, 0, 5, 5),))
    result = evaluate(source, Dataset(tmp_path, dataset.classes, {"test": [good, broken]}), "test")
    assert len(result.notes) == 1 and result.notes[0].startswith("1 pictures are refused")
    assert "broken.jpg: " in result.notes[0]
    assert result.counts.fn[1].sum() == 1 and result.counts.tp[1].sum() == result.counts.fp[1].sum() == 0


def test_a_picture_that_is_not_there_ends_it(source: PipelineSource, tmp_path: Path) -> None:
    gone = Picture(tmp_path / "gone.jpg", "gone.jpg", 10, 10)
    with pytest.raises(ToolError, match=r"gone\.jpg cannot be read"):
        evaluate(source, Dataset(tmp_path, ("circle",), {"test": [gone]}), "test")


# ---- the command


def test_gates_decide_the_exit_code(made: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--predictions", str(made / "predictions.json"), "--data", str(drawn)]
    assert main([*arguments, "--require", "map50=0.5", "--require", "ap50:circle=0.1"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*arguments, "--require", "map50=0.5", "--require", "map75=1", "--require", "f1=1"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("marina: map75 is 0.") and first.endswith("but 1 is required")
    assert second.startswith("marina: f1 is 0.")


def test_a_gate_needs_a_known_figure_and_a_share() -> None:
    assert parse_gates(["f2=0.75", "ap:a=b=0.5"], ["a=b"]) == [("f2", 0.75), ("ap:a=b", 0.5)]
    for text in ("map=0.5", "f2", "f2:dog=0.5", "f2=1.5", "f2=nan", "f2=", "=0.5"):
        with pytest.raises(ToolError, match="--require"):
            parse_gates([text], ["cat"])


def test_what_cannot_be_said_fails_a_gate() -> None:
    gates = parse_gates(["precision=0.1", "f1=0.5"], [])
    assert len(failures(gates, {"precision": math.nan, "f1": 0.5})) == 1
    assert failures(gates, {"precision": 0.1, "f1": 0.49999}) == ["f1 is 0.49999, but 0.5 is required"]


def test_a_set_without_test_pictures_is_judged_by_valid(
    made: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = read_dataset(drawn)
    write_annotations(tmp_path, dataset.classes, {"valid": dataset.split("valid")}, {})
    (tmp_path / "none.json").write_text("[]")
    arguments = ["evaluate", "--predictions", str(tmp_path / "none.json"), "--data"]
    assert main([*arguments, str(tmp_path)]) == 0
    assert "on 3 pictures of split valid" in capsys.readouterr().out
    assert main([*arguments, str(drawn), "--split", "valid"]) == 0
    assert "on 3 pictures of split valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say on which data set"),
        (["--data", "DRAWN"], "name one thing to evaluate"),
        (["a.mar", "--url", "http://x", "--data", "DRAWN"], "name one thing to evaluate"),
        (["gone.mar", "--data", "DRAWN"], "gone.mar is not there"),
        (["b.pt", "--data", "DRAWN"], "for weights: marina evaluate RECIPE --weights b.pt"),
        (["a.mar", "--weights", "b.pt", "--data", "DRAWN"], "--weights goes with a recipe"),
        (["a.mar", "--token-file", "t", "--data", "DRAWN"], "--token-file goes with --url"),
        (["--url", "http://x", "--token-file", "gone", "--data", "DRAWN"], "token file gone cannot be read"),
        (["a.mar", "--data", "DRAWN", "--split", "train"], "no pictures in split 'train'"),
        (["a.mar", "--data", "DRAWN", "--output", "DRAWN"], "choose another --output"),
        (["a.mar", "--data", "DRAWN", "--require", "map=1"], "figures are map50, map50_95, map75, precision"),
        (["compare", "a"], "compare takes two evaluations"),
        (
            ["compare", "a", "b", "--require", "f2=1"],
            "compare takes two evaluations, as --output or a training run made them, and no",
        ),
        (["compare", "a", "b"], "a/evaluation.json is not there"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], said: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mar").write_bytes(b"")
    (tmp_path / "b.pt").write_bytes(b"")
    assert main(["evaluate", *(str(drawn) if each == "DRAWN" else each for each in arguments)]) == 1
    assert said in one_line(capsys)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[",
        "[1]",
        '[{"image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]',
        '[{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "score": 0.5}]',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1], "score": 0.5}]',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, NaN], "score": 0.5}]',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]',
        '[{"image_id": 1.5, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]',
        '[{"image_id": 1, "category_id": "1", "bbox": [0, 0, 1, 1], "score": 0.5}]',
    ],
)
def test_predictions_of_another_form_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    picture = Picture(tmp_path / "a.jpg", "a.jpg", 10, 10)
    with pytest.raises(ToolError, match=r"p\.json"):
        list(PredictionsSource(tmp_path / "p.json").answers([picture, picture], ["cat"]))


def test_predictions_need_no_torch(made: Path, drawn: Path) -> None:
    code = (
        "import sys; from tools.cli import main; main(sys.argv[1:]); "
        "sys.exit(1 if {'torch', 'matplotlib'} & set(sys.modules) else 0)"
    )
    arguments = ["evaluate", "--predictions", str(made / "predictions.json"), "--data", str(drawn)]
    assert subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True).returncode == 0


# ---- a server; tests/e2e asks a real one


@contextmanager
def server(*answers: tuple[int, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Gives these answers in turn, the last one for ever, and keeps the headers that it was asked with."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, content = answers[min(len(asked), len(answers) - 1)]
            asked.append(dict(self.headers))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/predictions/shapes", asked
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    (tmp_path / "a.jpg").write_bytes(b"a picture")
    return Picture(tmp_path / "a.jpg", "a.jpg", 10, 10)


def ask(url: str, picture: Picture) -> sources.Answer:
    (answer,) = ServerSource(url, "secret").answers([picture], ["cat"])
    return answer


CAT = {"label": "cat", "index": 0, "score": 0.9, "box": [0, 0, 5, 5]}
DOG = {"label": "dog", "index": 1, "score": 0.8, "box": [0, 0, 5, 5]}


def test_a_server_is_asked_as_served_and_for_what_figures_need(picture: Picture) -> None:
    with server((200, {"detections": [CAT, DOG], "timing_ms": {"decode": 1.5}})) as (url, asked):
        answer = ask(url, picture)
    assert answer.served.labels.tolist() == [0] and answer.foreign == 1 and answer.timing_ms == {"decode": 1.5}
    served, swept, ranked = asked
    assert not any(name.startswith("Marina-") and name != "Marina-Format" for name in served)
    assert swept["Marina-Score-Threshold"] == "0.001" and "Marina-Iou-Threshold" not in swept
    assert ranked["Marina-Iou-Threshold"] == "0.6" and ranked["Marina-Max-Detections"] == "300"
    assert all(each["Authorization"] == "Bearer secret" for each in asked)


def test_a_busy_server_is_asked_again(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PAUSE_S", 0)
    busy = (503, {"code": 503, "type": "ServiceUnavailableException", "message": "busy"})
    with server(busy, busy, (200, {"detections": [CAT]})) as (url, asked):
        assert ask(url, picture).served.scores.tolist() == [0.9]
    assert len(asked) == 5
    with server(busy) as (url, asked), pytest.raises(ToolError, match="busy 8 times"):
        ask(url, picture)


def test_what_a_server_refuses_is_nothing_found_but_a_fault_is_a_fault(picture: Picture) -> None:
    with server((400, {"code": 400, "type": "InvalidImage", "message": "truncated"})) as (url, _):
        answer = ask(url, picture)
    assert answer.refusal == "truncated" and not len(answer.served.scores) and not len(answer.ranked.scores)
    with server((413, "too large")) as (url, _):
        assert "413" in str(ask(url, picture).refusal)
    for status, content, said in (
        (
            404,
            {"code": 404, "type": "ModelNotFoundException", "message": "no such model"},
            "404: .*no such model.*predictions/NAME",
        ),
        (400, {"code": 400, "type": "InvalidKeyException", "message": "token"}, "--token-file"),
        (200, [{"cat": [0, 0, 1, 1], "score": 0.5}], "only models that Marina built"),
        (200, {"detections": [{"label": "cat"}]}, "only models that Marina built"),
    ):
        with server((status, content)) as (url, _), pytest.raises(ToolError, match=said):
            ask(url, picture)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/predictions/x", "ftp://x", "nonsense", "http://["])
def test_a_server_that_cannot_be_reached_is_named(url: str, picture: Picture) -> None:
    with pytest.raises(ToolError, match=r"cannot be reached|no address of a model"):
        ask(url, picture)


# ---- the official weights against the figures of their own program


@pytest.mark.real
@pytest.mark.parametrize(("shape", "ap", "ap50"), [("rect", 0.3602, 0.5829), ("square", 0.3592, 0.5656)])
def test_official_weights_reach_their_reference(
    shape: str, ap: float, ap50: float, shared: Path, repository: Path, tmp_path: Path
) -> None:
    import torch
    import yaml

    content = json.loads((shared / "real" / "coco_mini" / "instances.json").read_text())
    label = {category["id"]: index for index, category in enumerate(content["categories"])}
    boxes: dict[int, list[Box]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        box = Box(label[entry["category_id"]], x, y, x + w, y + h, bool(entry["iscrowd"]))
        boxes[entry["image_id"]].append(box)
    pictures = [
        Picture(
            shared / "real" / "coco_mini" / "images" / image["file_name"],
            image["file_name"],
            image["width"],
            image["height"],
            tuple(boxes[image["id"]]),
        )
        for image in content["images"]
    ]
    classes = [category["name"] for category in content["categories"]]
    official = repository / "archives" / "yolov5n-coco"
    recipe = yaml.safe_load((official / "archive.yaml").read_text())
    recipe |= {"golden": [], "preprocess": {"size": 640, "shape": shape}}
    (tmp_path / "archive.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "index_to_name.json").symlink_to(official / "index_to_name.json")
    with recipe_source(tmp_path, shared / "real" / "agpl" / "yolov5n.pt") as source:
        torch.set_num_threads(1)
        answers = list(source.answers(pictures, classes))
    result = average_precision(
        [truth_of(each) for each in pictures], [answer.ranked for answer in answers], len(classes)
    )
    assert result.map50_95 == pytest.approx(ap, abs=0.01)
    assert result.map50 == pytest.approx(ap50, abs=0.01)
    assert fitness(result) == pytest.approx(0.1 * ap50 + 0.9 * ap, abs=0.01)
