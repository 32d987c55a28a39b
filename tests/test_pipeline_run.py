"""`marina pipeline`: its parameters, its scripts, the local runner. The whole path: e2e/test_pipeline_store.py."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tools.archive.recipe import load_recipe
from tools.errors import ToolError
from tools.evaluate.evaluation import RESULT
from tools.pipeline import parameters as schema
from tools.pipeline import steps
from tools.pipeline.gate import check_gate, check_live
from tools.pipeline.parameters import Parameters, as_text, from_environment, read_parameters, variable
from tools.pipeline.recipe import change_recipe
from tools.pipeline.run import run_pipeline
from tools.pipeline.state import STATE
from tools.pipeline.steps import STEPS, SUMMARY
from tools.store import command as store_command

NAMES = [step.name for step in STEPS]
NEEDED = {"store": "/store", "dataset": "cells", "model_name": "cells", "require": "map50=0.5"}
# The parameters of flyingthings' pipeline.
S3 = [
    *("GIT_URL", "GIT_REVISION", "GPU_TIMEOUT", "NAMESPACE", "BATCH_SIZE", "NUM_EPOCHS", "IMG_RESIZE", "MAX_WIDTH"),
    *("MODEL_WEIGHTS", "MINIO_ENDPOINT", "DATASET_ZIP", "MINIO_BUCKET", "MINIO_ACCESSKEY", "MINIO_SECRETKEY"),
    *("IMAGE_REGISTRY", "UBI_IMAGE", "MODEL_IMAGE", "MODEL_BASE", "DEPLOY", "DEPLOY_ARTIFACTS", "MODEL_NAME"),
]
HOSTILE = """it's "q" $(touch pwned) `touch pwned`; touch pwned & * ${HOME} \\ -x"""


def parameters(**changes: object) -> Parameters:
    return Parameters(**(NEEDED | changes))  # type: ignore[arg-type]


def write_yaml(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


# --- parameters


def test_every_parameter_of_the_older_pipeline_has_its_place() -> None:
    rows = dict(re.findall(r"^    ([A-Z_, ]+?)  +(.*)$", schema.__doc__ or "", re.MULTILINE))
    assert sorted(name for left in rows for name in left.split(", ")) == sorted(S3)
    for left, right in rows.items():
        words = set(re.findall(r"[a-z0-9_]+", right))
        assert words & set(Parameters.model_fields) or left in ("NAMESPACE", "MODEL_IMAGE"), left


def test_a_file_and_changes_to_it(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "cells.yaml", **NEEDED, epochs=7, max_side=320, deploy=False)
    read = read_parameters(path, ["epochs=9", "max_side=", "deploy=true", "license=a=b", "model_version=1.0"])
    assert (read.epochs, read.max_side, read.deploy) == (9, None, True)
    assert (read.license, read.model_version, read.require) == ("a=b", "1.0", "map50=0.5")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epoch": 3}, "epoch: unknown key; did you mean 'epochs'?"),
        ({"epochs": "many"}, "epochs:"),
        ({"epochs": 0}, "epochs:"),
        ({"dataset": "--output"}, "dataset:"),
        ({"dataset": "../cells"}, "dataset:"),
        ({"weights": "$(id)"}, "weights:"),
        ({"model_name": "-x"}, "model_name:"),
        ({"model_version": "1;2"}, "model_version:"),
        ({"model_version": 1.0}, "model_version: 1.0 is a number where text belongs; put it in quotes"),
        ({"split": "0.8 0.1 --replace"}, "split:"),
        ({"gpu_timeout": "forever"}, "gpu_timeout: 'forever' does not fit; it is: how long to wait"),
        ({"license": "two\nlines"}, "license: must be one line"),
        ({"require": ""}, "require:"),
        ({"require": "map50"}, "require: map50: give FIGURE=NUMBER; figures are map50, "),
        ({"require": "ap50:cell=0.5,map50=7"}, "require: map50=7: '7' is no number above 0 and up to 1"),
        ({"require": "map50=0"}, "require: map50=0: '0' is no number above 0"),
        ({"size": 100}, "size is 100; YOLOv5s takes multiples of 32"),
        ({"definition": "ssd300_vgg16", "size": 320}, "size is 320, but ssd300_vgg16 is made for 300"),
        ({"tools_image": "marina/tools:latest"}, "tools_image:"),
        ({"s3_endpoint": "https://key:secret@s3.example.com"}, "s3_endpoint: a URL with a password"),
        ({"deploy": "perhaps"}, "deploy:"),
        ({"server_management": "http://127.0.0.1:8081"}, "server_inference and server_store_dir go together"),
    ],
)
def test_a_wrong_parameter_is_one_line(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    path = write_yaml(tmp_path / "cells.yaml", **(NEEDED | changes))
    with pytest.raises(ToolError, match=re.escape(says)) as error:
        read_parameters(path, [])
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_change_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="--set epochs: give NAME=VALUE"):
        read_parameters(write_yaml(tmp_path / "cells.yaml", **NEEDED), ["epochs"])


def test_the_environment_of_a_step_says_the_same() -> None:
    """Also with every parameter that can be left out."""
    given = parameters(max_side=320, deploy=False, license=HOSTILE, split="0.8 0.1 0.1", weights="base@latest")
    for each in (given, parameters()):
        environment = steps.SUMMARY.environment(each)
        assert environment.keys() == {variable(name) for name in Parameters.model_fields}
        assert from_environment(environment) == each
    assert as_text(None) == "" and as_text(True) == "true"


# --- scripts


def fake(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def run_script(name: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With `bin` of the folder before the system's programs."""
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        ["sh", str(steps.SCRIPTS / f"{name}.sh")],
        cwd=folder,
        env={"PATH": path} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("device", "usable", "code", "chosen", "says"),
    [
        ("auto", True, 0, "gpu", ""),
        ("gpu", True, 0, "gpu", ""),
        ("auto", False, 0, "cpu", "THE CPU TRAINS, all 40 epochs"),
        ("cpu", True, 0, "cpu", ""),
        ("gpu", False, 1, None, "device is gpu: give more gpu_timeout than 1s"),
    ],
)
def test_what_trains_is_waited_for_and_said(
    tmp_path: Path, device: str, usable: bool, code: int, chosen: str | None, says: str
) -> None:
    fake(tmp_path / "bin", "python", "exit 0" if usable else "exit 2")
    environment = {"MARINA_DEVICE": device, "MARINA_GPU_TIMEOUT": "1s", "MARINA_EPOCHS": "40"}
    assert run_script("wait-for-gpu", tmp_path, **environment).returncode == 0
    done = run_script("choose-device", tmp_path, **environment, MARINA_RESULT=str(tmp_path / "result"))
    assert done.returncode == code and says in done.stderr
    assert [path.read_text() for path in (tmp_path / "device", tmp_path / "result") if path.exists()] == (
        [chosen] * 2 if chosen else []
    )


def test_a_gpu_of_the_last_time_is_not_one_of_now(tmp_path: Path) -> None:
    (tmp_path / "gpu").touch()
    fake(tmp_path / "bin", "python", "exit 2")
    assert run_script("wait-for-gpu", tmp_path, MARINA_DEVICE="auto", MARINA_GPU_TIMEOUT="1s").returncode == 0
    assert not (tmp_path / "gpu").exists()


def test_a_gpu_that_is_late_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    environment = {"MARINA_DEVICE": "auto", "MARINA_GPU_TIMEOUT": "2h"}
    fake(tmp_path / "bin", "sleep", "echo >> slept")
    fake(tmp_path / "bin", "date", "wc -l < slept | sed 's/$/000/'")  # a thousand seconds a sleep
    for late, found in ((3, True), (99, False)):
        (tmp_path / "slept").write_text("")
        fake(tmp_path / "bin", "python", f"[ $(wc -l < slept) -ge {late} ]")
        done = run_script("wait-for-gpu", tmp_path, **environment)
        assert done.returncode == 0 and (tmp_path / "gpu").exists() == found
        assert len((tmp_path / "slept").read_text()) == (3 if found else 8)
    assert done.stdout == "no GPU within 2h\n"


@pytest.mark.parametrize("step", [*STEPS, SUMMARY], ids=lambda step: step.name)
def test_what_stands_in_a_parameter_is_never_run(tmp_path: Path, step: steps.Step) -> None:
    """Every one of them hostile, as none can be once `marina pipeline check` has seen them."""
    fake(tmp_path / "bin", "marina", """for each in "$@"; do printf '%s\\n' "$each"; done >> arguments; echo 1""")
    fake(tmp_path / "bin", "python", "exit 1")
    (tmp_path / "weights").mkdir()
    for name in ("device", "version", "weights/w.pt", "run.id", "archive.id", "gate.txt"):
        (tmp_path / name).write_text("cpu")
    environment = {variable(name): HOSTILE for name in step.sees}
    numbers = {variable(name): "1" for name in ("demo_pictures", "epochs") if name in step.sees}
    special = {"deploy": {"MARINA_DEPLOY": "true"}}
    done = run_script(step.name, tmp_path, **(environment | numbers | special.get(step.name, {})), MARINA_STATUSES="")
    assert not (tmp_path / "pwned").exists()
    assert done.returncode == (1 if step.name == "wait-for-gpu" else 0), done.stderr  # which has to count
    arguments = (tmp_path / "arguments").read_text().splitlines() if (tmp_path / "arguments").exists() else []
    whole = {"fetch": 5, "train": 8, "gate": 2, "deploy": 4, "export": 1, "prepare": 2}
    assert arguments.count(HOSTILE) == whole.get(step.name, 0)


def test_figures_of_classes_with_spaces_are_required(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "marina", """for each in "$@"; do printf '%s\\n' "$each"; done >> arguments; echo 1""")
    required = {"MARINA_REQUIRE": "map50=0.8,ap50:no mask=0.6"}
    done = run_script("push", tmp_path, MARINA_S3_ENDPOINT="", MARINA_MODEL_NAME="m", **required)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "arguments").read_text().splitlines()
    figures = ["--evaluation", "evaluation", "--require", "map50=0.8", "--require", "ap50:no mask=0.6"]
    assert lines[: 5 + len(figures)] == ["store", "push", "run", "--name", "m", *figures]


def test_a_volume_that_served_another_run_gives_nothing_to_this_one(tmp_path: Path) -> None:
    """It would be pushed as what this run has made."""
    fake(tmp_path / "bin", "marina", "exit 0")
    for name in ("run", "data", "evaluation"):
        (tmp_path / name).mkdir()
    for name in ("version", "device", "gpu", "gate.txt", "archive.mar", "run.id", "archive.id", "run/summary.json"):
        (tmp_path / name).write_text("old")
    environment = steps.STEPS[0].environment(parameters(model_version="7.0"))
    assert run_script("fetch", tmp_path, **environment).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "raw", "version"]
    assert (tmp_path / "version").read_text() == "7.0\n"


@pytest.mark.parametrize("code", [0, 1])
def test_the_gate_ends_the_pipeline_and_is_kept_for_the_summary(tmp_path: Path, code: int) -> None:
    fake(tmp_path / "bin", "marina", f"echo what it says >&2; exit {code}")
    done = run_script("gate", tmp_path, MARINA_REQUIRE="map50=0.8", MARINA_LIVE="")
    assert (done.returncode, done.stdout) == (code, "what it says\n")
    assert (tmp_path / "gate.txt").read_text() == "what it says\n"


@pytest.mark.parametrize(
    ("there", "device", "trained"),
    [
        ((), "cpu", "--devices cpu"),
        ((), "gpu", "--devices 0"),  # auto would take the CPU without a word
        (("config.yaml",), "cpu", "--devices cpu"),  # stopped before its first epoch ended
        (("config.yaml", "last.ckpt"), "gpu", "train --resume run"),
        (("config.yaml", "last.ckpt", "summary.json"), "gpu", ""),
    ],
)
def test_a_training_that_was_stopped_goes_on(tmp_path: Path, there: tuple[str, ...], device: str, trained: str) -> None:
    fake(tmp_path / "bin", "marina", """echo "$@" >> calls""")
    (tmp_path / "device").write_text(device)
    (tmp_path / "version").write_text("7.0")
    (tmp_path / "run").mkdir()
    for name in there:
        (tmp_path / "run" / name).touch()
    (step,) = (step for step in STEPS if step.name == "train")
    assert run_script("train", tmp_path, **step.environment(parameters(epochs=9))).returncode == 0
    *training, recipe = (tmp_path / "calls").read_text().splitlines()
    assert recipe == "pipeline recipe run --version 7.0"
    assert [line.endswith(trained) for line in training] == ([True] if trained else [])
    assert not training or "--resume" in training[0] or "--epochs 9 " in training[0]


def test_a_server_that_is_named_is_updated(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "marina", """for each in "$@"; do printf '%s\\n' "$each"; done > "$2" """)
    (tmp_path / "archive.id").write_text("20260101T000000000000Z-0000000000000000")
    server = {"server_management": "http://m", "server_inference": "http://i", "server_store_dir": "/a b"}
    (deploy,) = (step for step in STEPS if step.name == "deploy")
    for token_file in (None, "/key file"):
        given = parameters(**server, server_token_file=token_file)
        assert run_script("deploy", tmp_path, **deploy.environment(given)).returncode == 0
        parser = argparse.ArgumentParser()
        store_command.add_arguments(parser)
        args = parser.parse_args((tmp_path / "deploy").read_text().splitlines()[1:])
        assert (args.management, args.inference, args.store_dir) == ("http://m", "http://i", Path("/a b"))
        assert args.token_file == (token_file and Path(token_file))
        promoted = parser.parse_args((tmp_path / "promote").read_text().splitlines()[1:])
        assert (promoted.target, promoted.to) == (args.target, "production")
    (tmp_path / "promote").unlink()
    assert run_script("deploy", tmp_path, **deploy.environment(parameters(deploy=False))).returncode == 0
    assert not (tmp_path / "promote").exists()


def test_a_push_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "marina", 'echo "$2" >> actions; echo 1')
    for _ in range(2):
        run_script("push", tmp_path, MARINA_S3_ENDPOINT="", MARINA_MODEL_NAME="m", MARINA_REQUIRE="map50=0.8")
    assert (tmp_path / "actions").read_text().split() == ["push", "push", *["promote"] * 4]


# --- what the scripts call


def write_evaluation(folder: Path, map50: float) -> Path:
    overall = dict.fromkeys(("map50", "map50_95", "map75", "precision", "recall", "f1", "f2"), map50)
    ofclass = {"name": "no mask"} | dict.fromkeys(("ap50", "ap", "precision", "recall", "f1", "f2"), None)
    data = {"split": "test", "pictures": 3, "digest": "0"}
    folder.mkdir()
    (folder / "evaluation.json").write_text(
        json.dumps({"model": "cells 1.0", "data": data, "overall": overall, "per_class": [ofclass]})
    )
    return folder


def test_the_gate(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {}\n")
    evaluation = write_evaluation(tmp_path / "evaluation", 0.7)
    assert check_gate(tmp_path / "run", evaluation, "map50=0.7,f2=0.5").line()
    for require, says in (
        ("map50=0.5,f2=0.71", r"f2 0.7 \(required: 0.71\)"),
        ("ap50:no mask=0.1", "unknown"),  # a figure that cannot be said
        ("map=0.5", "--require map=0.5"),
        ("map50=high", "no number"),
    ):
        with pytest.raises(ToolError, match=says):
            check_gate(tmp_path / "run", evaluation, require)


def test_a_model_that_is_worse_than_the_live_one_is_stopped(tmp_path: Path) -> None:
    """On the classes that the live one finds: what is new to it does not make up for them."""

    def write(name: str, digest: str = "a", **found: float | None) -> Path:
        per_class = [{"name": label, "ap50": value} for label, value in found.items()]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / RESULT).write_text(json.dumps({"data": {"digest": digest}, "per_class": per_class}))
        return tmp_path / name

    live = write("live", cat=0.8, dog=0.6, moon=0.0, sun=None)
    assert check_live(write("new", cat=0.79, dog=0.58, moon=0.9, sun=None), live, 0.02) == (
        "mAP50 of cat, dog is 0.685, 0.7 with the model that serves now"
    )
    for found in ({"cat": 0.9, "dog": 0.4}, {"cat": None, "dog": 0.9}):
        with pytest.raises(ToolError, match=r"the gate is not passed: mAP50 of cat, dog is .* it may be 0\.02 lower"):
            check_live(write("new", **found, moon=1.0, sun=1.0), live, 0.02)
    with pytest.raises(ToolError, match="not of the same pictures"):
        check_live(write("new", "b", cat=0.9, dog=0.9, moon=0.9, sun=0.9), live, 0.02)
    with pytest.raises(ToolError, match="holds no evaluation"):
        check_live(live, tmp_path, 0.02)
    assert "finds nothing" in check_live(write("new", cat=0.1), write("live", cat=0.0), 0.0)


def test_the_live_model_is_the_beginning_and_the_measure(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "marina", """echo "$@" >> calls""")
    for name in ("fetch", "train", "evaluate", "gate"):
        (step,) = (step for step in STEPS if step.name == name)
        given = step.environment(parameters(live="cells@production", live_drop="0.1"))
        (tmp_path / "device").write_text("cpu")
        assert run_script(name, tmp_path, **given).returncode == 0
    called = (tmp_path / "calls").read_text().splitlines()
    assert "store pull cells@production --kind runs --output live" in called
    assert any(line.startswith("train ") and line.count("--weights live/best.safetensors") == 1 for line in called)
    assert "evaluate live --data data --output live-evaluation" in called
    gate = "pipeline gate run --evaluation evaluation --require map50=0.5 --live live-evaluation --live-drop 0.1"
    assert (tmp_path / "gate.txt").exists() and gate in called + (tmp_path / "gate.txt").read_text().splitlines()


def test_version_and_engine_go_into_the_recipe(tmp_path: Path, repository: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(repository / "archives" / "shapes", run)
    before = load_recipe(run)
    change_recipe(run, "1.20260101.120000", None)
    change_recipe(run, None, "onnx")
    after = load_recipe(run)
    assert (after.version, after.runtime.backend) == ("1.20260101.120000", "onnx")
    assert after.model_dump(exclude={"version", "runtime"}) == before.model_dump(exclude={"version", "runtime"})


# --- the runner


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps that note their names."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in (*NAMES, "summary"):
        (folder / f"{name}.sh").write_text(f"echo {name} >> order; echo {name} is well\n")
    monkeypatch.setattr(steps, "SCRIPTS", folder)
    return folder


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_steps_run_in_order_and_the_state_is_kept(scripts: Path, tmp_path: Path) -> None:
    state = run_pipeline(parameters(), tmp_path / "work", resume=False)
    assert state.failed is None and list(state.done) == NAMES
    assert order(tmp_path / "work") == [*NAMES, "summary"]
    assert json.loads((tmp_path / "work" / STATE).read_text())["done"] == NAMES
    assert (tmp_path / "work" / "logs" / "train.log").read_text() == "train is well\n"


def test_a_step_that_fails_is_the_last_and_the_summary_says_why(scripts: Path, tmp_path: Path) -> None:
    (scripts / "gate.sh").write_text("echo too bad >&2; exit 3\n")
    (scripts / "summary.sh").write_text('echo "$MARINA_STATUSES" > statuses\n')
    state = run_pipeline(parameters(), tmp_path / "work", resume=False)
    assert (state.failed, state.reason) == ("gate", "too bad")
    statuses = (tmp_path / "work" / "statuses").read_text().split()
    assert statuses[NAMES.index("gate") :] == [
        "gate=Failed",
        *(f"{name}=None" for name in NAMES[NAMES.index("gate") + 1 :]),
    ]
    assert "push" not in order(tmp_path / "work")


def test_resume_goes_on_after_the_last_step_that_ended_well(scripts: Path, tmp_path: Path) -> None:
    well = (scripts / "train.sh").read_text()
    (scripts / "train.sh").write_text("exit 1\n")
    assert run_pipeline(parameters(), tmp_path / "work", resume=False).reason == "exit code 1, without a word"
    before = order(tmp_path / "work")
    (scripts / "train.sh").write_text(well)
    state = run_pipeline(parameters(), tmp_path / "work", resume=True)
    assert state.failed is None and state.reason is None
    assert order(tmp_path / "work") == [*before, *NAMES[NAMES.index("train") :], "summary"]


def test_resume_with_other_parameters_is_refused(scripts: Path, tmp_path: Path) -> None:
    run_pipeline(parameters(), tmp_path / "work", resume=False)
    with pytest.raises(ToolError, match="max_side was nothing and is 64; epochs was 100 and is 9"):
        run_pipeline(parameters(epochs=9, max_side=64), tmp_path / "work", resume=True)


def test_a_folder_holds_one_pipeline(scripts: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="holds no pipeline that can go on"):
        run_pipeline(parameters(), tmp_path / "work", resume=True)
    run_pipeline(parameters(), tmp_path / "work", resume=False)
    with pytest.raises(ToolError, match="go on with it by --resume"):
        run_pipeline(parameters(), tmp_path / "work", resume=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").touch()
    with pytest.raises(ToolError, match="mine is not empty"):
        run_pipeline(parameters(), tmp_path / "mine", resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(ToolError, match="cannot be written"):
        run_pipeline(parameters(), tmp_path / "file" / "work", resume=False)


def test_a_step_sees_its_own_parameters_as_they_are(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARINA_STORE", "of somebody else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    (scripts / "train.sh").write_text("env -0 | sort -z > seen\n")
    assert run_pipeline(parameters(license=HOSTILE), tmp_path / "work", resume=False).failed is None
    lines = (tmp_path / "work" / "seen").read_text().split("\0")
    seen = dict(line.split("=", 1) for line in lines if line.startswith("MARINA_"))
    train = next(step for step in STEPS if step.name == "train")
    assert seen == train.environment(parameters(license=HOSTILE)) and seen["MARINA_LICENSE"] == HOSTILE
    kept = (tmp_path / "work" / STATE).read_text()
    assert "hidden" not in kept


DRIVER = """
import sys
from pathlib import Path
from tools.pipeline import steps
from tools.pipeline.parameters import Parameters
from tools.pipeline.run import run_pipeline
steps.SCRIPTS = Path(sys.argv[1])
print(run_pipeline(Parameters.model_validate_json(sys.argv[2]), Path(sys.argv[3]), False))
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def runner(scripts: Path, tmp_path: Path) -> "Runner":
    (scripts / "train.sh").write_text("echo $$ > pid.part; mv pid.part pid; while :; do sleep 0.1; done\n")
    return Runner(scripts, tmp_path / "work")


class Runner:
    """A runner in a process of its own, in the middle of its step `train`."""

    def __init__(self, scripts: Path, folder: Path):
        self.folder = folder
        command = [sys.executable, "-c", DRIVER, str(scripts), parameters().model_dump_json(), str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: (folder / "pid").exists() or self.process.poll() is not None)
        self.step = int((folder / "pid").read_text())


def end_at_once(scripts: Path) -> None:
    """From now on; the step that runs goes round in its loop."""
    (scripts / "train.new").write_text("echo train >> order\n")
    (scripts / "train.new").rename(scripts / "train.sh")


def test_two_at_once_in_one_folder_are_refused(runner: Runner, scripts: Path) -> None:
    end_at_once(scripts)
    try:
        for resume in (False, True):
            with pytest.raises(ToolError, match="another pipeline runs in"):
                run_pipeline(parameters(), runner.folder, resume)
    finally:
        runner.process.terminate()
        runner.process.wait()


def test_a_runner_that_is_stopped_stops_its_step(runner: Runner) -> None:
    runner.process.terminate()
    assert runner.process.wait() != 0
    wait_until(lambda: not is_alive(runner.step))
    assert json.loads((runner.folder / STATE).read_text())["done"] == NAMES[: NAMES.index("train")]


def test_a_step_whose_runner_was_killed_keeps_the_next_one_out(runner: Runner, scripts: Path) -> None:
    runner.process.kill()
    runner.process.wait()
    end_at_once(scripts)
    with pytest.raises(ToolError, match="another pipeline runs in"):
        run_pipeline(parameters(), runner.folder, resume=True)
    os.killpg(runner.step, signal.SIGKILL)
    wait_until(lambda: not is_alive(runner.step))
    # The child of the step may live a moment longer.
    wait_until(lambda: _free(runner.folder))
    assert run_pipeline(parameters(), runner.folder, resume=True).failed is None
    assert order(runner.folder) == [*NAMES, "summary"]


def _free(folder: Path) -> bool:
    from tools.pipeline.state import alone

    try:
        with alone(folder):
            return True
    except ToolError:
        return False
