"""The benchmarks measure what they say, on a real archive; how fast it is, no test says."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.archive.build import build_archive
from tools.archive.recipe import load_recipe
from tools.bench.build import bench_build, measure
from tools.bench.handler import FORWARD, OVERHEAD, STAGES, bench_handler
from tools.cli import main
from tools.errors import ToolError


@pytest.fixture(scope="module")
def shapes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "shapes.mar"
    return build_archive(load_recipe(repository / "archives/shapes"), path).path


def test_handler_stages_add_up_to_the_request(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    assert main(["bench", "handler", str(shapes), "--runs", "1", "--report", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    times = {stage: values["median"] for stage, values in report["milliseconds"].items()}
    assert list(times) == [*STAGES, OVERHEAD, "whole request"]
    assert all(value > 0 for value in times.values())
    assert sum(times[stage] for stage in STAGES) == pytest.approx(times["whole request"], abs=0.01)
    assert times[OVERHEAD] == pytest.approx(times["whole request"] - times[FORWARD], abs=0.01)
    assert times[FORWARD] > times["answer"]
    assert "640x480" in report["picture"]
    assert report["machine"]["cores"] >= 1

    table = capsys.readouterr().out
    assert all(stage in table for stage in times)
    assert "  ms" in table
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


def test_handler_takes_the_given_picture(shapes: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small.jpg", tmp_path / "large.jpg"
    Image.linear_gradient("L").convert("RGB").save(small)
    Image.linear_gradient("L").convert("RGB").resize((2048, 2048)).save(large)
    first, second = (bench_handler(shapes, path, 3, 1) for path in (small, large))
    assert "256x256" in first.picture
    assert "2048x2048" in second.picture
    # 64 times the pixels.
    assert second.milliseconds["decode"]["median"] > 4 * first.milliseconds["decode"]["median"]


def test_handler_refuses_in_one_line(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for arguments, words in (
        (["--image", str(tmp_path / "none.jpg")], "none.jpg cannot be read"),
        (["--image", str(text)], "which is no JPEG"),
        (["--threads", "4096"], "--threads is 4096"),
        (["--report", str(tmp_path / "none" / "a.json"), "--image", str(text)], "a.json cannot be written"),
        (["--report", str(tmp_path)], "cannot be written"),
    ):
        assert main(["bench", "handler", str(shapes), *arguments]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["bench", "handler", str(shapes), "--runs", "0"])


def test_build_beside_the_archiver(repository: Path) -> None:
    report = bench_build(repository / "archives/shapes", None, 1)
    ours, theirs, alone = report.marina[0], report.archiver[0], report.import_torch[0]
    assert report.ratio == pytest.approx(ours["seconds"] / theirs["seconds"], abs=0.001)
    # The process that imports torch is a child of the build, the archiver never imports it.
    assert ours["peak"] > alone["peak"] > theirs["peak"]
    assert report.beyond_import == ours["peak"] - alone["peak"]
    assert report.allowed == report.weights + 300_000_000
    assert f"{ours['seconds']:.2f}" in report.as_table()


def test_cost_counts_processes_of_processes() -> None:
    work = "data = bytes(range(256)) * 800_000; import hashlib; [hashlib.sha256(data) for _ in range(3)]"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    idle, busy = measure([sys.executable, "-c", "pass"]), measure([sys.executable, "-c", nested])
    assert busy.peak > idle.peak + 200_000_000
    assert busy.cpu_seconds > 2 * idle.cpu_seconds


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(ToolError, match=r"exit code 3: the last line$"):
        measure([sys.executable, "-c", "print('the first'); print('the last line'); raise SystemExit(3)"])


def test_no_archiver(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="pip install torch-model-archiver"):
        bench_build(repository / "archives/shapes", None, 1)
