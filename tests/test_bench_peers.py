"""Ours beside the peers: who is compared, how equal answers must be, and that each peer gives them."""

import json
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from handlers.labels import load_labels
from handlers.settings import Runtime
from tools.archive.build import Built
from tools.archive.recipe import Recipe, load_recipe
from tools.bench.engines import build_variant, variant
from tools.bench.load import Load
from tools.bench.peers import compare
from tools.bench.peers.compare import INT8, Contender, PeerRow, PeersReport, check_equal
from tools.bench.peers.network import write_network
from tools.bench.peers.start import OTHERS, STOCK, STOCK_THREADS, detections, peer
from tools.bench.serve import Measured, Target
from tools.bench.usage import Usage
from tools.cli import main
from tools.errors import ToolError


def detection(label: str = "cat", score: float = 0.9, box: tuple[float, ...] = (10, 10, 110, 110)) -> dict[str, Any]:
    return {"label": label, "score": score, "box": list(box)}


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ([detection(score=0.85, box=(11, 10, 111, 112))], None),
        ([detection(), detection("dog", score=0.3)], None),
        ([], "missing cat 0.90"),
        ([detection("dog")], "missing cat"),
        ([detection(score=0.8)], "missing cat"),
        ([detection(box=(20, 10, 120, 110))], "missing cat"),
        ([detection(), detection("dog")], r"unexpected dog 0.90 \[10, 10, 110, 110\]"),
    ],
)
def test_equal_answers(other: list[dict[str, Any]], problem: str | None) -> None:
    if problem is None:
        check_equal([[detection()]], [other])
    else:
        with pytest.raises(ToolError, match=f"picture 1 gets another answer .*: {problem}"):
            check_equal([[detection()]], [other])


def test_int8_may_differ_more_and_rect_is_compared_with_rect(monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal([[detection()]], [[detection(score=0.7)]], INT8)
    with pytest.raises(ToolError, match="unexpected dog"):
        check_equal([[detection()]], [[detection(), detection("dog")]], INT8)
    answers = {"a": [detection()], "b": [detection("dog")], "c": [detection("dog")], "d": [detection()]}
    monkeypatch.setattr(compare, "detections", lambda target, body: answers[target.url])
    shapes = zip("abcd", ("square", "rect", "rect", "rect"), strict=True)
    group = [Contender(name, partial(nullcontext, Target(name)), shape) for name, shape in shapes]
    first: dict[str, float] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        assert list(compare._start(group, [b""], stack, first, failures)) == ["a", "b", "c"]
    assert list(failures) == ["d"] and "missing dog" in failures["d"]


def measured(images_per_s: float) -> Measured:
    load = Load(4, 10.0, round(images_per_s * 10), images_per_s, 100, 200, 300)
    return Measured(load, [Usage("front", 1, 10_000_000, 9_000_000), Usage("worker", 8, 300_000_000, 200_000_000)])


def test_the_table_compares_medians() -> None:
    rows = [
        PeerRow(STOCK, [measured(rate) for rate in (8, 11, 10)], 9.0),
        PeerRow("fastapi", [measured(20)], 2.0),
        PeerRow("litserve", [], missing="litserve is not installed"),
        PeerRow("mosec", [measured(90)], 2.0, failure="answers 500"),
        PeerRow("marina, onnx fp32 square", [measured(30)], 3.0),
    ]
    report = PeersReport("yolov5n", ["a picture"], 4, 10, 3, rows)
    lines = report.as_table().splitlines()
    assert lines[-1].split()[:7] == ["marina,", "onnx", "fp32", "square", "30.00", "3.00", "1.50"]
    assert lines[-1].split()[-1] == "3.0"
    assert lines[-5].split()[2:4] == ["10.00", "1.00"]
    assert lines[-3].endswith("left out: litserve is not installed")
    assert lines[-2].endswith("FAILED: answers 500")
    assert report.failures == ["mosec: answers 500"]
    assert report.as_bars() == {STOCK: 10, "fastapi": 20, "marina, onnx fp32 square": 30}


def contenders(*names: str, start: Any) -> list[Contender]:
    return [Contender(name, lambda name=name: start(name)) for name in names]


def test_rounds_go_by_turns_and_who_fails_is_out(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[str] = []
    closed: list[str] = []
    answers = {name: [detection()] for name in (STOCK, "fastapi", "litserve")} | {"mosec": [detection("dog")]}

    @contextmanager
    def start(name: str) -> Any:
        if name == "litserve":
            raise ToolError("litserve ended with exit code 1: no")
        yield Target(name)
        closed.append(name)

    def load(target: Target, *_: Any) -> Measured:
        turns.append(target.url)
        if turns.count("fastapi") == 2 and target.url == "fastapi":
            raise ToolError("it died")
        return measured(10)

    monkeypatch.setattr(compare, "detections", lambda target, body: answers[target.url])
    monkeypatch.setattr(compare, "load_target", load)
    monkeypatch.setattr(compare, "_contenders", lambda *_: contenders(STOCK, *OTHERS, start=start))
    (tmp_path / "a.jpg").write_bytes(b"a")
    arguments = ["bench", "peers", str(repository / "archives/shapes"), "--image", str(tmp_path / "a.jpg")]
    arguments += ["--report", str(tmp_path / "a.json"), "--chart", str(tmp_path / "a.png")]
    assert main(arguments) == 1
    assert turns == [STOCK, "fastapi", STOCK, "fastapi", STOCK]
    assert sorted(closed) == sorted([STOCK, "fastapi", "mosec"])
    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert [len(rows[name]["rounds"]) for name in (STOCK, "fastapi", "mosec")] == [3, 1, 0]
    error = capsys.readouterr().err
    assert "fastapi: it died" in error and "litserve ended" in error and "mosec: picture 1 gets another answer" in error
    assert "starting: 0 of 4 servers" in error and "load: 0 of 6 turns" in error


def test_a_recipe_of_another_network_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(repository / "archives/fasterrcnn-aquarium")
    assert main(["bench", "peers", recipe, "--image", "a.jpg"]) == 1
    assert "the peers are written for yolov5" in capsys.readouterr().err


def test_what_is_not_installed_is_a_row(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(changed: Recipe, output: Path, *_: Any) -> Built:
        if changed.runtime.precision == "int8":
            raise ToolError("runtime.precision is int8, give pictures")
        return Built(output, 1, [], [])

    monkeypatch.setattr(compare, "build_variant", build)
    monkeypatch.setattr(compare, "write_network", lambda *_: None)
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "mosec" else True)
    missing: dict[str, str] = {}
    found = [contender.name for contender in compare._contenders(recipe, None, None, b"", tmp_path, missing)]
    assert found[:4] == [STOCK, STOCK_THREADS, "fastapi", "litserve"]
    assert missing["mosec"] == "mosec is not installed; pip install '.[bench]'"
    assert sum("int8" in name for name in missing) == 2 and not any("int8" in name for name in found)
    assert "building: 0 of 8 archives" in capsys.readouterr().err


@pytest.fixture(scope="module")
def recipe(repository: Path) -> Recipe:
    return load_recipe(repository / "archives/shapes")


@pytest.fixture(scope="module")
def network(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            pytest.skip(f"{package.upper()} MISSING: no peer is tested")
    folder = tmp_path_factory.mktemp("peers")
    archive = build_variant(variant(recipe, Runtime()), folder / "torch.mar", None, None).path
    write_network(archive, folder / "network.onnx")
    return folder / "network.onnx"


@pytest.mark.parametrize("name", OTHERS)
def test_a_peer_answers_as_we_do(name: str, recipe: Recipe, network: Path) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name.upper()} MISSING: this peer is not tested; pip install '.[bench]'")
    expected = json.loads(recipe.beside(recipe.golden[0].detections or "").read_text())["detections"]
    body = recipe.beside(recipe.golden[0].image).read_bytes()
    settings = {
        "size": 320,
        "labels": load_labels(recipe.beside(recipe.labels)),
        "score_threshold": recipe.postprocess.score_threshold,
        "iou_threshold": recipe.postprocess.iou_threshold,
        "workers": 1,
        "threads": 1,
    }
    with peer(name, network, settings, body) as target:
        check_equal([expected], [detections(target, body)])
        assert target.pid is not None


def test_a_peer_that_does_not_start_says_why(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OTHERS, "nothing", "/")
    with (
        pytest.raises(ToolError, match=r"nothing ended with exit code 1: .*nothing_onnx"),
        peer("nothing", network, {}, b""),
    ):
        pass


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.floats(0.1, 0.9))
def test_the_peers_suppress_as_torchvision_does(seed: int, count: int, iou: float) -> None:
    detector_module = pytest.importorskip("tools.bench.peers.detector", reason="ONNXRUNTIME MISSING")
    detector = object.__new__(detector_module.Detector)
    detector.score_threshold, detector.iou_threshold = 0.25, iou
    rows = np.random.default_rng(seed).random((count, 8), dtype=np.float32)
    rows[:, :4] = rows[:, :4] * 100 + 20
    boxes, scores, labels = detector.select(rows)
    classes = torch.from_numpy(rows[:, 5:] * rows[:, 4:5])
    best, index = classes.max(dim=1)
    keep = best > 0.25
    corners = torch.from_numpy(np.concatenate((rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2), axis=1))
    chosen = batched_nms(corners[keep].double(), best[keep].double(), index[keep], iou)
    assert labels.tolist() == index[keep][chosen].tolist()
    assert np.allclose(boxes, corners[keep][chosen]) and np.allclose(scores, best[keep][chosen])
