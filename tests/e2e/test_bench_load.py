"""`marina bench serve` and the stock contender of `bench peers` on real servers."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_archive import write_archive

from handlers.labels import load_labels
from tools.bench.load import LoadFailure, run_load
from tools.bench.peers.compare import check_equal
from tools.bench.peers.start import detections, stock
from tools.cli import main
from tools.serve import ENGINES
from tools.serve.server import TorchServe

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("wrk") is None, reason="WRK MISSING: apt install wrk; no load is tested"),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_archive_is_served_and_loaded(
    engine: str, shapes_server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = shapes_server.archives[0].path
    arguments = ["bench", "serve", str(archive), "--engine", engine]
    arguments += ["--concurrency", "2", "--seconds", "5", "--warmup", "1"]
    assert main([*arguments, "--report", str(tmp_path / "a.json"), "--chart", str(tmp_path / "a.png")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    (row,) = report["rows"]
    load, usage = row["measured"]["load"], row["measured"]["usage"]
    assert load["requests"] > 0
    assert load["images_per_s"] == pytest.approx(load["requests"] / load["seconds"], rel=0.01)
    # What takes the requests, and the archive's one worker.
    assert [process["name"] for process in usage] == ["front", "worker"]
    assert all(process["cpu_seconds"] > 0 for process in usage)
    assert all(process["rss"] > process["uss"] > 10_000_000 for process in usage)
    assert row["bare"]["1 bare loop"] > 0
    assert "640x480" in report["pictures"][0]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert report["server"] == f"shapes 1.0, {engine}, 1 worker(s)"
    assert f"{load['images_per_s']:.2f}" in capsys.readouterr().out


def test_a_wrong_token_is_a_failure(shapes_server: TorchServe) -> None:
    picture = shapes_server.archives[0].image
    with pytest.raises(LoadFailure, match=r"the first 400: .*InvalidKeyException"):
        run_load(shapes_server.prediction_url("shapes"), [picture], 1, 1, "wrong")


DIES_AT_THE_TWENTIETH_PICTURE = """
import os

seen = 0


def handle(data, context):
    global seen
    seen += 1
    if seen > 20:
        os._exit(3)
    return [b"[]"] * len(data or [])
"""


def test_a_worker_that_dies_under_load_is_a_failure(tmp_path: Path) -> None:
    write_archive(tmp_path / "dies.mar", "dies", handler=DIES_AT_THE_TWENTIETH_PICTURE)
    with TorchServe(tmp_path, port=0) as server, pytest.raises(LoadFailure, match=r"the first 50[07]: .*Worker died"):
        run_load(server.prediction_url("dies"), [b"\xff\xd8\xff"], 2, 1, server.token)


def test_stock_torchserve_answers_as_we_do(shapes_server: TorchServe, repository: Path) -> None:
    source = repository / "archives/shapes"
    expected = json.loads((source / "golden/scene.json").read_text())["detections"]
    picture = (source / "golden/scene.jpg").read_bytes()
    settings = {
        "size": 320,
        "labels": load_labels(source / "index_to_name.json"),
        "score_threshold": 0.4,
        "iou_threshold": 0.45,
        "args": {"size": "n"},
        "threads": 1,
    }
    with stock(shapes_server.archives[0].path, settings, picture) as target:
        check_equal([expected], [detections(target, picture)])
