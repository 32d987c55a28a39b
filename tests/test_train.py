"""`marina train` from its command line to the run folder."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import Callback
from train_set import SHORT, rows_of, write_set

import model_defs
from handlers.weights import load_state, read_safetensors
from tools import cli
from tools.checkpoint import open_checkpoint
from tools.data.dataset import ANNOTATIONS
from tools.data.draw import CLASSES
from tools.errors import ToolError
from tools.train.config import read_config
from tools.train.module import LossNotFinite
from tools.train.trainer import train


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "shapes")


@pytest.fixture(autouse=True)
def threads() -> Any:
    """A training sets how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def marina(*arguments: object) -> int:
    return cli.main(["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    more = ["--epochs", 3, "--save-period", 2, "--nominal-batch", 8]
    assert marina("--data", shapes, "--output", run, *SHORT.split(), *more) == 0
    return run


def test_a_run_leaves_all_that_it_promises(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "results.csv", "best.safetensors", "last.safetensors", "last.ckpt", "summary.json"}
    assert "epoch-2.safetensors" in names
    assert not [name for name in names if name.startswith(".")]
    assert list((whole / "tensorboard").glob("events.*"))
    rows = rows_of(whole)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"train/box", "train/objectness", "train/classes", "valid/map50", "valid/map50_95", "lr"} <= rows[0].keys()
    summary = json.loads((whole / "summary.json").read_text())
    best = max(rows, key=lambda row: row["valid/fitness"])
    assert summary["best_epoch"] == best["epoch"]
    assert summary["map50_95"] == pytest.approx(best["valid/map50_95"], abs=0.01)


def test_the_weights_are_those_of_the_model_with_its_names(whole: Path) -> None:
    with open_checkpoint(whole / "best.safetensors") as checkpoint:
        assert checkpoint.names == list(CLASSES)
        assert checkpoint.size == "n"
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float16", "int64"}
    load_state(model_defs.build("yolov5", len(CLASSES), size="n"), read_safetensors(whole / "last.safetensors"))


def test_the_config_of_a_run_repeats_it(whole: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((whole / "config.yaml").read_text())["train"]
    assert config["lr"] == 0.01
    assert "output" not in config
    assert marina("--config", whole / "config.yaml", "--output", tmp_path / "again") == 0
    assert rows_of(tmp_path / "again") == rows_of(whole)
    assert (tmp_path / "again" / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from pytorch_lightning import Callback
from tools.train.config import read_config
from tools.train.trainer import train
import tools.train.callbacks

class Kill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (trainer.current_epoch, index) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)

def kill(record, trainer):
    if trainer.current_epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint(record, trainer)

if sys.argv[2] == "before the checkpoint":
    checkpoint = tools.train.callbacks.Record._checkpoint
    tools.train.callbacks.Record._checkpoint = kill
    callbacks = []
else:
    callbacks = [Kill()]
train(read_config(Path(sys.argv[1])), Path(sys.argv[1]), callbacks)
"""


@pytest.mark.parametrize("moment", ["in mid-epoch", "before the checkpoint"])
def test_a_killed_run_goes_on_to_the_same_end(moment: str, whole: Path, tmp_path: Path, repository: Path) -> None:
    run = tmp_path / "killed"
    run.mkdir()
    (run / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    done = subprocess.run([sys.executable, "-c", KILLED, run, moment], cwd=repository, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 0
    assert len(rows_of(run)) == (1 if moment == "in mid-epoch" else 2)
    assert marina("--resume", run) == 0
    assert rows_of(run) == rows_of(whole)
    for name in ("last.safetensors", "best.safetensors", "summary.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """10 pictures in batches of 4: the last batch has one a process. The one picture of validation they both find."""
    shapes = write_set(tmp_path / "shapes", valid=1)
    plain = [f"--{name}=0" for name in ("mosaic", "scale", "translate", "flip-lr", "hsv-h", "hsv-s", "hsv-v")]
    common = ["--data", shapes, *SHORT.split(), *plain, "--freeze-norms", "--nominal-batch", 4]
    assert marina(*common, "--output", tmp_path / "one") == 0
    assert marina(*common, "--output", tmp_path / "two", "--processes", 2) == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(two) == 2
    for single, double in zip(one, two, strict=True):
        for name in ("train/box", "train/objectness", "train/classes"):
            assert double[name] == pytest.approx(single[name], rel=1e-4), name
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["epochs"] == 2


def test_a_failure_in_many_processes_is_the_failure_of_the_command(
    shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", shapes, *SHORT.split(), "--output", tmp_path / "run", "--processes", 2, "--freeze", 99]
    before = signal.getsignal(signal.SIGINT)
    assert marina(*arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("marina: --freeze is 99")
    assert error.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is before


class AtSecondEpoch(Callback):
    def __init__(self, action: Any):
        self.action = action

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            self.action(module)


def new_folder(whole: Path, run: Path) -> Path:
    run.mkdir()
    (run / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    return run


def test_a_loss_that_is_not_finite_stops_at_its_step(whole: Path, tmp_path: Path) -> None:
    run = new_folder(whole, tmp_path / "run")

    def spoil(module: Any) -> None:
        module.detector.head.m[0].bias.data[:] = float("nan")

    with pytest.raises(LossNotFinite, match=r"not finite at epoch 2, step 1 .*--lr"):
        train(read_config(run), run, [AtSecondEpoch(spoil)])
    assert marina("--resume", run) == 0
    assert rows_of(run) == rows_of(whole)


def test_torchvisions_random_draws_are_the_same_in_a_run_that_goes_on(tmp_path: Path) -> None:
    """At 160 pixels there are more anchors than are drawn to learn from."""
    data = write_set(tmp_path / "set", train=2, valid=1, width=160, height=160)
    definition = ["--definition", "fasterrcnn_mobilenet_v3_large_320_fpn", "--size", 160, "--batch", 2]
    assert marina("--data", data, "--output", tmp_path / "whole", *SHORT.split(), *definition) == 0
    run = new_folder(tmp_path / "whole", tmp_path / "run")

    def stop(module: Any) -> None:
        raise ToolError("stopped")

    with pytest.raises(ToolError, match="stopped"):
        train(read_config(run), run, [AtSecondEpoch(stop)])
    assert marina("--resume", run) == 0
    assert rows_of(run) == rows_of(tmp_path / "whole")


def test_a_full_disk_leaves_the_checkpoint_before(whole: Path, tmp_path: Path) -> None:
    run = new_folder(whole, tmp_path / "run")
    before: dict[str, bytes] = {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(module: Any) -> None:
        before.update({path.name: path.read_bytes() for path in run.glob("*.*")})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))

    try:
        with pytest.raises(ToolError, match="cannot be written"):
            train(read_config(run), run, [AtSecondEpoch(fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (run / "last.ckpt").read_bytes() == before["last.ckpt"]
    assert (run / "best.safetensors").read_bytes() == before["best.safetensors"]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_training_stops_when_it_gets_no_better(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert marina("--data", shapes, "--output", run, *SHORT.split(), "--epochs", 9, "--patience", 1, "--lr", 1e-9) == 0
    assert len(rows_of(run)) == 2
    assert "training stops" in capsys.readouterr().out


def test_what_has_ended_does_not_go_on(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert marina("--resume", whole) == 1
    assert "has ended" in capsys.readouterr().err
    assert marina("--resume", whole, "--epochs", 9) == 1
    assert "leave out --epochs" in capsys.readouterr().err


@pytest.mark.parametrize("definition", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_torchvisions_models_train(
    definition: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And take weights of another number of classes, without the head."""
    other = model_defs.build(definition, 3, **({"min_size": 64, "max_size": 64} if "fast" in definition else {}))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    size = ["--size", 64] if "fast" in definition else []
    run = tmp_path / "run"
    short = ["--definition", definition, *size, "--batch", 2, "--workers", 0, "--devices", "cpu", "--fast-dev-run"]
    assert marina("--data", shapes, "--output", run, "--weights", tmp_path / "other.pth", *short) == 0
    said = capsys.readouterr().out
    assert "they are for 3 labels, not 7: the head" in said
    settings = read_config(run)
    assert settings.freeze_norms
    assert settings.optimizer == "adamw"
    served = model_defs.build(definition, len(CLASSES) + 1, **settings.model_args)
    load_state(served, read_safetensors(run / "best.safetensors"))
    # What is frozen is as it was, up to half precision.
    norm = next(name for name in other.state_dict() if name.endswith("running_var"))
    assert torch.allclose(served.state_dict()[norm], other.state_dict()[norm], rtol=1e-3)


def test_other_loggers(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    assert marina("--data", shapes, "--output", run, *SHORT.split(), "--fast-dev-run", "--wandb", "--mlflow") == 0
    assert list((run / "wandb").glob("offline-run-*"))
    assert list((run / "mlruns").glob("*/*/metrics/valid/map50"))


def test_a_search_finds_settings_and_goes_on(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "search"
    assert marina("--data", shapes, "--output", run, *SHORT.split(), "--fast-dev-run", "--search", 1) == 0
    assert read_config(run / "trial-0").lr == 0.01
    assert marina("--resume", run, "--search", 2) == 0
    assert sorted(path.name for path in run.glob("trial-*")) == ["trial-0", "trial-1"]
    assert "best: trial" in capsys.readouterr().out
    best = yaml.safe_load((run / "best.yaml").read_text())["train"]
    assert best["data"] == str(shapes)


def test_a_picture_that_cannot_be_read_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "set")
    (data / "train" / "3.png").write_bytes(b"no picture")
    for number, cache in enumerate(("ram", "none")):
        arguments = [
            "--data",
            data,
            "--output",
            tmp_path / str(number),
            *SHORT.split(),
            "--cache",
            cache,
            "--workers",
            1,
        ]
        assert marina(*arguments) == 1
        error = capfd.readouterr().err
        assert error.startswith(f"marina: {data / 'train' / '3.png'} cannot be read")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--data", "nowhere"], "nowhere holds no dataset.json"),
        (["--freeze", "26"], "--freeze is 26, but YOLOv5 has 25 layers"),
        (["--freeze", "25"], "leaves nothing to train"),
        (["--batch", "3", "--processes", "2"], "batch is 3"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["--devices", "7"], "--devices 7"),
        (["--size", "100"], "multiples of 32"),
        (["--definition", "ssd300_vgg16", "--size", "320"], "made for 300"),
        (["--weights", "nowhere.pt"], "nowhere.pt is not there"),
        (["--search", "0"], "--search is 0"),
        (["--mosaic", "2"], "mosaic"),
    ],
)
def test_bad_settings_are_one_line(
    change: list[str], named: str, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert marina("--data", shapes, "--output", tmp_path / "run", *SHORT.split(), *change) == 1
    error = capfd.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_what_is_missing_is_said_before_a_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "set")
    for split in ("train", "valid"):
        content = json.loads((data / split / ANNOTATIONS).read_text())
        (data / split / ANNOTATIONS).write_text(json.dumps(content | {"annotations": []}))
        assert marina("--data", data, "--output", tmp_path / "run", *SHORT.split()) == 1
        assert f"has no box in split '{split}'" in capsys.readouterr().err
        (data / split / ANNOTATIONS).write_text(json.dumps(content))
    assert marina("--data", data, "--output", tmp_path / "run", "--weights", tmp_path / "none.pt") == 1
    assert not (tmp_path / "run").exists()


def test_weights_of_another_size_are_named(
    shared: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", shared / "real" / "agpl" / "yolov5n.pt", "--model-size", "s"]
    assert marina("--data", shapes, "--output", tmp_path / "run", *SHORT.split(), *weights) == 1
    assert "yolov5n.pt is a YOLOv5n; give --model-size n, it is s" in capsys.readouterr().err


def test_weights_that_the_last_step_has_blown_up_are_not_kept(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No loss comes after it that could be infinite."""
    wild = ["--epochs", 1, "--lr", 1e30, "--warmup-epochs", 0]
    assert marina("--data", shapes, "--output", tmp_path / "run", *SHORT.split(), *wild) == 1
    assert "the weights have grown to" in capsys.readouterr().err
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_an_empty_split_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "set", valid=0)
    assert marina("--data", data, "--output", tmp_path / "run", *SHORT.split()) == 1
    assert "no pictures in split 'valid'" in capsys.readouterr().err


def test_the_folder_is_checked_before_anything(
    shapes: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(whole.iterdir())
    assert marina("--data", shapes, "--output", whole) == 1
    assert f"go on with it: --resume {whole}" in capsys.readouterr().err
    assert sorted(whole.iterdir()) == before
    (tmp_path / "file").touch()
    assert marina("--data", shapes, "--output", tmp_path / "file" / "run") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]
    # Without a name, the next free one.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "yolov5-1").mkdir(parents=True)
    assert marina("--data", shapes, *SHORT.split(), "--fast-dev-run", "--cache", "disk") == 0
    assert (tmp_path / "runs" / "yolov5-2" / "summary.json").exists()
    assert not (tmp_path / "runs" / "yolov5-2" / "cache").exists()
