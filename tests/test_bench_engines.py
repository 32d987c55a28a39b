"""Engines in processes of their own, side by side; how fast one is, no test says."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from PIL import Image

from handlers.errors import BadArchive
from handlers.settings import Runtime
from tools.archive.build import Built
from tools.archive.recipe import Recipe, load_recipe
from tools.bench import engines
from tools.bench.engine import Engine, bare_loop
from tools.bench.engines import EngineRow, EnginesReport, Figures, build_variant, name_of, runtimes, variant
from tools.cli import main
from tools.errors import ToolError


@pytest.fixture(scope="module")
def recipe(repository: Path) -> Recipe:
    return load_recipe(repository / "archives/shapes")


@pytest.fixture(scope="module")
def archive(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "torch.mar"
    return build_variant(variant(recipe, Runtime()), path, None, None).path


@pytest.fixture(scope="module")
def picture(recipe: Recipe) -> bytes:
    return recipe.beside(recipe.golden[0].image).read_bytes()


def test_an_engine_answers_and_tells_its_times(archive: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    core = sorted(os.sched_getaffinity(0))[-1:]
    before = set(psutil.Process().children())
    with Engine(archive, [picture], 1, core) as engine:
        (child,) = set(psutil.Process().children()) - before
        assert child.cpu_affinity() == core
        assert 0 < engine.first_answer_s < 300
        requests, network = engine.ask("requests", runs=5), engine.ask("network", runs=5)
        assert len(requests) == len(network) == 5
        assert min(requests) > 0 and min(network) > 0
        assert bare_loop([engine], 0.2) > 0
        rss, uss = engine.memory()
        assert rss > uss > 50_000_000
        folder = Path(child.cwd())
        assert "handlers" in {path.name for path in folder.iterdir()}
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(BadArchive, match="ended with exit code -9"):
            engine.ask("requests", runs=1)
    assert not folder.exists()
    assert set(psutil.Process().children()) <= before


def test_an_engine_that_cannot_answer_says_why(archive: Path, recipe: Recipe, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(BadArchive, match=r"which is no JPEG"):
        Engine(archive, [b"no picture"], 1)
    with pytest.raises(BadArchive, match=r"none.mar: no such file"):
        Engine(tmp_path / "none.mar", [b""], 1)
    assert set(psutil.Process().children()) <= before


def test_variants_of_a_recipe(recipe: Recipe) -> None:
    changed = variant(recipe, Runtime("openvino", "bf16", "fixed"), "square", version="9")
    assert (changed.runtime.precision, changed.preprocess.shape, changed.version) == ("bf16", "square", "9")
    assert changed.preprocess.size == recipe.preprocess.size == 320
    assert [entry.detections for entry in changed.golden] == [None, None]
    assert changed.beside(changed.golden[0].image).is_file()
    assert recipe.golden[0].detections


def test_which_engines_are_tried() -> None:
    names = [name_of(runtime) for runtime in runtimes(["openvino", "torch"], gpu=False)]
    assert names[:3] == ["torch fp32", "torch bf16", "openvino fp32"]
    assert "openvino int8 fixed" in names and not any("fp16" in name for name in names)
    assert "torch fp16" in [name_of(runtime) for runtime in runtimes(["torch"], gpu=True)]


def test_side_by_side(
    repository: Path,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both engines are the one archive here, the second of them out of bounds; a third cannot be built."""

    def build(recipe: Recipe, *_: object, even_beyond: bool) -> Built:
        assert even_beyond
        if recipe.runtime.backend == "onnx":
            raise ToolError("onnxruntime is not installed")
        return Built(archive, 1, [], [], "a box is elsewhere" if recipe.runtime.precision == "bf16" else None)

    monkeypatch.setattr(engines, "build_variant", build)
    picture = tmp_path / "a.jpg"
    Image.linear_gradient("L").convert("RGB").save(picture)
    arguments = ["bench", "engines", str(repository / "archives/shapes"), "--backends", "onnx", "torch", "--runs", "10"]
    arguments += ["--image", str(picture), "--report", str(tmp_path / "a.json"), "--chart", str(tmp_path / "a.png")]
    assert main(arguments) == 0
    first, second, third = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["engine"] for row in (first, second, third)] == ["torch fp32", "torch bf16", "onnx fp32"]
    assert (first["network_ratio"], first["request_ratio"]) == (1, 1)
    ratio = first["figures"]["network_median"] / second["figures"]["network_median"]
    assert second["network_ratio"] == pytest.approx(ratio, abs=0.001)
    assert third["figures"] is None and third["missing"] == "onnxruntime is not installed"
    assert (first["beyond"], second["beyond"]) == (None, "a box is elsewhere")
    shown = capsys.readouterr().out
    assert "320x320, JPEG of 256x256" in shown
    lines = shown.splitlines()
    assert lines[-4].split()[:3] == ["torch", "fp32", f"{first['figures']['network_median']:.1f}"]
    assert lines[-3].split()[:3] == ["torch", "bf16", f"{second['figures']['network_median']:.1f}"]
    assert lines[-2:] == [
        "  out of bounds  a box is elsewhere",
        "onnx fp32        not there: onnxruntime is not installed",
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_no_engine_at_all_is_a_failure(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> Built:
        raise ToolError("it cannot be had")

    monkeypatch.setattr(engines, "build_variant", build)
    assert main(["bench", "engines", str(repository / "archives/shapes"), "--backends", "torch"]) == 1
    assert "no engine can run" in capsys.readouterr().err
    assert main(["bench", "engines", str(repository / "archives/shapes"), "--threads", "4096"]) == 1
    assert "--threads is 4096" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'nncf'", name="nncf")

    monkeypatch.setattr(engines, "build_archive", build)
    with pytest.raises(ToolError, match=r"^nncf is not installed$"):
        build_variant(recipe, tmp_path / "a.mar", None, None)


def test_without_torch_there_are_no_ratios() -> None:
    figures = Figures(10.04, 11, 15, 16, 400_000_000, 300_000_000, 2.5)
    rows = [EngineRow("onnx fp32", figures)]
    table = EnginesReport("shapes", "a picture", 640, 10, 1, rows).as_table()
    assert table.splitlines()[-1].split() == [
        "onnx",
        "fp32",
        "10.0",
        "11.0",
        "–",
        "15.0",
        "16.0",
        "–",
        "400/300",
        "2.5",
    ]
