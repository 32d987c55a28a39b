"""`marina tune` on real servers. What is fastest here, no test says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from handlers.settings import Runtime
from tools.archive.build import build_archive
from tools.archive.recipe import Recipe, load_recipe
from tools.cli import main
from tools.tune.objective import Slo
from tools.tune.run import Order, Workbench
from tools.tune.space import Setting

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("wrk") is None, reason="WRK MISSING: apt install wrk; nothing is tuned"),
]


@pytest.fixture
def recipe(repository: Path, tmp_path: Path) -> Recipe:
    """A copy of `shapes`."""
    shutil.copytree(repository / "archives/shapes", tmp_path / "shapes")
    return load_recipe(tmp_path / "shapes")


def test_a_recipe_is_tuned(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as twenty seconds go, then on from there without any time, then with an SLO that nothing keeps."""
    before = recipe.path.read_text()
    arguments = ["tune", str(recipe.path), "--backends", "torch", "onnx", "--seconds", "2"]
    assert main([*arguments, "--slo", "p99=60000ms", "p50=60000ms", "--budget", "20s"]) == 0
    said = capsys.readouterr().out
    assert "  kept  " in said and "the budget is spent; left out: " in said
    after = recipe.path.read_text()
    assert after.startswith(f"{before}# marina tune: ")
    record = json.loads((recipe.path.parent / "tuning.json").read_text())
    winner = max(record["trials"], key=lambda trial: trial["measured"]["load"]["images_per_s"])
    assert f"{winner['measured']['load']['images_per_s']:.1f} images/s" in after
    assert (record["winner"], record["slo"]) == (winner["setting"], ["p99=60000ms", "p50=60000ms"])
    # The front end and the workers that the setting asks for.
    assert len(winner["measured"]["usage"]) == 1 + winner["setting"]["workers"]

    tuned = load_recipe(recipe.path)
    assert tuned.runtime == Runtime(**winner["setting"]["runtime"])
    assert tuned.serving == Setting(**winner["setting"] | {"runtime": tuned.runtime}).serving(recipe.serving)
    assert build_archive(tuned, tmp_path / "tuned.mar").answers

    assert main([*arguments, "--slo", "p99=0.1ms", "--budget", "1s"]) == 1
    output = capsys.readouterr()
    assert f"going on with the {len(record['trials'])} trials of " in output.out
    assert "no setting keeps p99=0.1ms; the nearest is " in output.err
    assert recipe.path.read_text() == after
    assert json.loads((recipe.path.parent / "tuning.json").read_text())["trials"] == record["trials"]


# After the picture that says that it is up, under load.
DIES = b"""
import os
from itertools import count

_seen, _handle = count(), DetectionHandler.handle


def _dying(self, data, context):
    if next(_seen) == 3:
        os._exit(3)
    return _handle(self, data, context)


DetectionHandler.handle = _dying
"""


def test_a_server_that_dies_is_a_failure(recipe: Recipe, tmp_path: Path) -> None:
    order = Order(recipe.path, [Slo("p99", 1000)], None, [], None, 2, 1, 60, None, None)
    bench = Workbench(order, recipe, [], tmp_path)
    whole, dying = build_archive(recipe, tmp_path / "whole.mar").path, tmp_path / "dying.mar"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(dying, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + (DIES if name == "detection_handler.py" else b""))
    bench.archives[Runtime()] = dying
    made = bench.trial(Setting(runtime=Runtime(), workers=1, batch_size=1, delay_ms=1))
    assert made.measured is None
    # TorchServe says so, if it has noticed before the load ends.
    assert made.failure and re.search(r"Worker died|no answer in", made.failure)


def test_an_interrupt_says_how_to_go_on(recipe: Recipe, tmp_path: Path) -> None:
    """Ctrl-C in the first trial."""
    recipe.path.write_text(recipe.path.read_text() + "serving: {device: cpu}\n")
    before = recipe.path.read_bytes()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "tools.cli", "tune", str(recipe.path), "--slo", "p99=150ms"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    while not list(scratch.glob("marina-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    *progress, line = errors.splitlines()
    assert (process.returncode, said) == (130, "")
    assert line == "marina: interrupted; the same command goes on after the last finished trial"
    assert all(shown.startswith("tuning, engines: 0 of ") for shown in progress)
    assert not list(scratch.iterdir())
    assert recipe.path.read_bytes() == before
