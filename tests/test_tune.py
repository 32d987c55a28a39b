"""The search, its record and the recipe that it changes; trials here are made of figures. Real ones: tests/e2e."""

import itertools
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from handlers.settings import Runtime
from tools.archive.recipe import Recipe, Serving, load_recipe
from tools.bench.load import Load
from tools.bench.serve import Measured
from tools.cli import main
from tools.errors import ToolError
from tools.tune import space as space_module
from tools.tune.edit import MARK, check_editable, with_sections, write_winner
from tools.tune.objective import Slo, parse_budget, parse_slo
from tools.tune.record import Conditions, Ledger, Trial, conditions_of
from tools.tune.run import Order, Workbench
from tools.tune.search import Outcome, search
from tools.tune.space import Setting, Space, possible_runtimes

TORCH, BF16, ONNX = Runtime(), Runtime("torch", "bf16"), Runtime("onnx")
FIXED = Runtime("openvino", "fp32", "fixed")
SLO = [Slo("p99", 150)]


def setting(runtime: Runtime = TORCH, workers: int = 2, batch_size: int = 1, delay_ms: int = 1) -> Setting:
    return Setting(runtime=runtime, workers=workers, batch_size=batch_size, delay_ms=delay_ms)


def trial(which: Setting, images_per_s: float = 10, p99_ms: float = 100, seconds: float = 20) -> Trial:
    load = Load(4, 8.0, 80, images_per_s, p99_ms / 2, p99_ms * 0.75, p99_ms)
    return Trial(setting=which, seconds=seconds, measured=Measured(load, []))


def failed(which: Setting, seconds: float = 5) -> Trial:
    return Trial(setting=which, seconds=seconds, failure="the server is gone")


@pytest.fixture
def recipe(repository: Path, tmp_path: Path) -> Recipe:
    """A copy of `shapes`."""
    shutil.copytree(repository / "archives/shapes", tmp_path / "shapes")
    return load_recipe(tmp_path / "shapes")


def run_search(
    space: Space,
    measure: Callable[[Setting], Trial],
    budget_s: float = 10_000,
    before: dict[Setting, Trial] | None = None,
) -> tuple[Outcome, list[Setting]]:
    """The outcome and the settings that were measured, in order."""
    made: list[Trial] = []
    outcome = search(space, SLO, before or {}, measure, made.append, budget_s)
    return outcome, [each.setting for each in made]


def test_the_first_trial_is_announced_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run_search(Space([TORCH], cores=1, connections=1, gpu=False), trial)
    assert "tuning, engines: 0 of 1 trials" in capsys.readouterr().err


def test_stages_start_from_the_best_so_far() -> None:
    rates = {TORCH: 10.0, BF16: 20.0, ONNX: 30.0}

    def measure(which: Setting) -> Trial:
        """One worker is better, for ONNX Runtime only; batches of two are, with a long delay."""
        rate = rates[which.runtime] + (5 if which.workers == 1 and which.runtime == ONNX else 0)
        return trial(which, rate + (1 if (which.batch_size, which.delay_ms) == (2, 10) else 0))

    outcome, made = run_search(Space([TORCH, BF16, ONNX], cores=2, connections=4, gpu=False), measure)
    assert made == [
        *(setting(runtime, workers=2) for runtime in (TORCH, BF16, ONNX)),
        *(setting(runtime, workers=1) for runtime in (ONNX, BF16)),
        *(setting(ONNX, 1, size, delay) for size in (2, 4) for delay in (2, 10)),
    ]
    winner = outcome.winner()
    assert winner and winner.setting == setting(ONNX, 1, 2, 10)
    assert not outcome.left_out


def test_workers_and_batches_are_no_more_than_connections_can_feed() -> None:
    space = Space([TORCH], cores=8, connections=3, gpu=False)
    _, made = run_search(space, lambda which: trial(which, which.workers))
    assert [(each.workers, each.batch_size) for each in made] == [(3, 1), (1, 1)]
    _, made = run_search(Space([FIXED], cores=1, connections=64, gpu=False), trial)
    assert made == [setting(FIXED, 1)]


def test_on_a_gpu_one_worker_and_a_batch_come_first() -> None:
    space = Space([TORCH, FIXED], cores=2, connections=64, gpu=True)
    _, made = run_search(space, lambda which: trial(which, which.batch_size))
    assert made[:4] == [setting(TORCH, 1, 8, 2), setting(FIXED, 1), setting(TORCH, 2, 8, 2), setting(FIXED, 2)]
    assert {each.batch_size for each in made[4:]} == {1, 2, 4, 8, 16, 32}
    assert {each.runtime for each in made[4:]} == {TORCH} and setting(TORCH, 1, 1, 1) in made


def test_the_fastest_that_keeps_the_slo_wins() -> None:
    late, slow, fast = trial(setting(BF16), 90, 151), trial(setting(TORCH), 10, 100), trial(setting(ONNX), 20, 150)
    outcome = Outcome(SLO, [late, failed(setting(FIXED)), slow, fast])
    assert outcome.ranked() == [fast, slow, late]
    assert outcome.winner() == fast
    assert Outcome([Slo("p99", 150), Slo("p50", 50)], [slow, fast]).winner() == slow
    assert Outcome(SLO, [late]).winner() is None
    assert Outcome(SLO, [late, trial(setting(ONNX), 95, 300)]).ranked()[0] == late
    lines = outcome.as_table().splitlines()
    assert [line.startswith("* onnx fp32, 2 workers, batch 1 ") for line in lines] == [False, True, False, False, False]
    assert lines[1].split()[7:12] == ["20.00", "75.0", "112.5", "150.0", "kept"] and " missed " in lines[3]
    assert lines[4].split("  ")[-1] == "FAILED: the server is gone"


def test_a_failure_is_a_row_and_the_search_goes_on() -> None:
    space = Space([TORCH, BF16, ONNX], cores=2, connections=4, gpu=False)
    outcome, made = run_search(space, lambda which: failed(which) if which.runtime == ONNX else trial(which))
    assert [each.failure for each in outcome.trials[:3]] == [None, None, "the server is gone"]
    # It is not looked at again.
    assert {each.runtime for each in made[3:]} == {TORCH, BF16}
    winner = outcome.winner()
    assert winner and winner.setting.runtime != ONNX
    outcome, made = run_search(space, failed)
    assert len(made) == 3 and outcome.winner() is None


def test_no_trial_begins_that_would_pass_the_budget() -> None:
    space = Space([TORCH, BF16, ONNX], cores=2, connections=4, gpu=False)
    outcome, made = run_search(space, lambda which: trial(which, seconds=20), budget_s=59)
    assert made == [setting(TORCH), setting(BF16)]
    assert outcome.left_out[0] == setting(ONNX)
    assert len(outcome.left_out) == 5  # that engine, two with one worker, two batches of the best
    _, made = run_search(space, lambda which: trial(which, seconds=20), budget_s=60)
    assert len(made) == 3
    # The first begins whatever the budget, unless trials made before say how long one takes.
    assert len(run_search(space, trial, budget_s=1)[1]) == 1
    before = {setting(BF16): trial(setting(BF16), seconds=2)}
    outcome, made = run_search(space, trial, 1, before)
    assert not made and [each.setting for each in outcome.trials] == [setting(BF16)]


def conditions(**changes: Any) -> Conditions:
    values: dict[str, Any] = {"recipe": "a", "weights": "b", "pictures": ["c"], "calibration": None, "seconds": 8}
    values |= {"machine": {"cpu": "Z80", "cores": 2}, "packages": {"torch": "2.12"}, "connections": 4}
    return Conditions(**values | changes)


def test_a_stopped_search_goes_on_after_its_last_trial(tmp_path: Path) -> None:
    space = Space([TORCH, BF16, ONNX], cores=2, connections=4, gpu=False)
    path = tmp_path / "tuning.json"
    rates = itertools.count(10)
    results: dict[Setting, Trial] = {}

    def whole(which: Setting) -> Trial:
        results[which] = trial(which, next(rates))
        return results[which]

    expected, order = run_search(space, whole)

    def stopped(which: Setting) -> Trial:
        if which == order[4]:
            raise KeyboardInterrupt
        return failed(which) if which == order[0] else results[which]

    ledger = Ledger(path, conditions())
    with pytest.raises(KeyboardInterrupt):
        search(space, SLO, ledger.trials, stopped, ledger.add, 10_000)
    ledger = Ledger(path, conditions())
    assert not ledger.changed
    # What failed may have passed.
    assert list(ledger.trials) == order[1:4]
    outcome, made = run_search(space, results.__getitem__, before=ledger.trials)
    assert made == [order[0], *order[4:]]
    assert outcome == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recipe", "x"),
        ("weights", "x"),
        ("pictures", []),
        ("machine", {"cpu": "6502"}),
        ("connections", 5),
        ("seconds", 9),
    ],
)
def test_trials_under_other_conditions_do_not_count(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "tuning.json"
    first = Ledger(path, conditions())
    first.add(trial(setting()))
    first.close(["p99=150ms"], setting())
    assert json.loads(path.read_text())["winner"]["runtime"]["backend"] == "torch"
    changed = Ledger(path, conditions(**{name: value}))
    assert (changed.changed, changed.trials) == ([name], {})
    # Nothing is lost before there is something new.
    assert list(Ledger(path, conditions()).trials) == [setting()]


def test_what_makes_trials_comparable(recipe: Recipe) -> None:
    """All of the recipe but what a tuning changes, the weights, the pictures."""

    def now(pictures: list[bytes], **changes: object) -> Conditions:
        return conditions_of(recipe.model_copy(update=changes), None, pictures, None, 4, 8)

    base = now([b"a"])
    assert base == now([b"a"], runtime=ONNX, serving=Serving(max_workers=3))
    assert base.recipe != now([b"a"], preprocess=recipe.preprocess.__class__(640)).recipe
    assert base.recipe != now([b"a"], serving=Serving(device="cpu")).recipe
    assert base.pictures != now([b"b"]).pictures
    assert base.weights == recipe.weights.sha256
    assert {"cpu", "cores", "usable_cores"} <= base.machine.keys() and "load" not in base.machine


def test_calibration_pictures_are_a_condition(recipe: Recipe, tmp_path: Path) -> None:
    folder = recipe.path.parent / "golden"
    digests = set()
    for _ in range(2):
        digests.add(conditions_of(recipe, None, [], folder, 4, 8).calibration)
        shutil.copy(folder / "scene.jpg", folder / "more.jpg")
    assert len(digests) == 2 and None not in digests
    with pytest.raises(ToolError, match=r"calibration folder .* is not there"):
        conditions_of(recipe, None, [], tmp_path / "none", 4, 8)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"conditions": {}, "trials": []}'])
def test_another_file_is_not_taken_for_a_record(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ToolError, match="is no record of a tuning"):
        Ledger(path, conditions())
    assert path.read_text() == content


def test_which_engines_can_be_had(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "NEEDED", dict.fromkeys(space_module.NEEDED, ()))
    found = possible_runtimes(recipe, None, calibrated=False, gpu=False)
    assert found == [TORCH, BF16, ONNX, Runtime("openvino"), Runtime("openvino", "bf16")]
    square = recipe.model_copy(update={"preprocess": recipe.preprocess.__class__(320, "square")})
    assert FIXED in possible_runtimes(square, None, calibrated=False, gpu=False)
    gpu = possible_runtimes(recipe, None, calibrated=False, gpu=True)
    assert Runtime("tensorrt", "fp16") in gpu and Runtime("torch", "fp16") in gpu
    assert possible_runtimes(recipe, ["aoti"], calibrated=False, gpu=False) == [Runtime("aoti")]
    with pytest.raises(ToolError, match="--backends names tensorrt: tensorrt runs on NVIDIA's GPUs alone"):
        possible_runtimes(recipe, ["torch", "tensorrt"], calibrated=False, gpu=False)
    monkeypatch.setattr(space_module, "NEEDED", space_module.NEEDED | {"onnx": ("no_such_package",)})
    assert ONNX not in possible_runtimes(recipe, None, calibrated=False, gpu=False)
    with pytest.raises(ToolError, match="--backends names onnx: no_such_package is not installed"):
        possible_runtimes(recipe, ["onnx"], calibrated=False, gpu=False)


@pytest.mark.skipif(find_spec("nncf") is None, reason="NNCF MISSING: int8 is not tried")
def test_int8_needs_pictures(recipe: Recipe) -> None:
    int8 = Runtime("openvino", "int8")
    assert int8 not in possible_runtimes(recipe, ["openvino"], calibrated=False, gpu=False)
    assert int8 in possible_runtimes(recipe, ["openvino"], calibrated=True, gpu=False)


def test_an_archive_that_is_out_of_bounds_is_a_failure(recipe: Recipe, tmp_path: Path) -> None:
    """bf16 differs from fp32 by more than nothing at all."""
    text = recipe.path.read_text() + "parity: {max_score_difference: 0}\n"
    recipe.path.write_text(text)
    order = Order(recipe.path, SLO, None, [], None, 4, 1, 60, None, None)
    bench = Workbench(order, load_recipe(recipe.path), [], tmp_path)
    made = bench.trial(setting(BF16))
    assert made.failure and "parity.max_score_difference is 0" in made.failure
    assert made.measured is None and made.seconds > 0
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize(
    "text", ["p99", "p99=150", "p95=150ms", "p99=ms", "p99=0ms", "p99=-1ms", "p99 = 150ms", "150ms"]
)
def test_what_is_no_slo(text: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(recipe.path), "--slo", text]) == 1
    assert capsys.readouterr().err == (
        f"marina: --slo is {text!r}; write p50, p90 or p99 and milliseconds above 0, as in p99=150ms\n"
    )


@pytest.mark.parametrize("text", ["20", "m", "0s", "20 m", "-1m", "20d", "soon"])
def test_what_is_no_budget(text: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(recipe.path), "--slo", "p99=1ms", f"--budget={text}"]) == 1
    assert capsys.readouterr().err.startswith(f"marina: --budget is {text!r}; write a time above 0")


def test_slos_and_budgets() -> None:
    assert parse_slo("p50=12.5ms") == Slo("p50", 12.5)
    assert str(parse_slo("p90=100ms")) == "p90=100ms"
    assert [parse_budget(text) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]


def failure_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a tuning that does not begin."""
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_wrong_before_the_first_trial(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["tune", str(recipe.path), "--slo", "p99=150ms"]
    before = recipe.path.read_bytes()
    assert "none.jpg cannot be read" in failure_of([*base, "--image", str(tmp_path / "none.jpg")], capsys)
    assert "none.pt are not there" in failure_of([*base, "--weights", str(tmp_path / "none.pt")], capsys)
    assert "tensorrt runs on NVIDIA" in failure_of([*base, "--backends", "tensorrt"], capsys)
    there = failure_of([*base, "--output", str(tmp_path / "none" / "a.json")], capsys)
    assert "none cannot be written, or is not there" in there
    (tmp_path / "other.json").write_text("{}")
    assert "is no record" in failure_of([*base, "--output", str(tmp_path / "other.json")], capsys)
    monkeypatch.setenv("PATH", "")
    assert "wrk is not installed" in failure_of(base, capsys)
    assert recipe.path.read_bytes() == before
    assert not (recipe.path.parent / "tuning.json").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{NAME, serving: {batch_size: 1}}\n", "no block of lines"),
        ("NAME\nserving: &x {batch_size: 1}\n---\n", "is not YAML"),
        ("NAME\n? serving\n: {batch_size: 1}\n", "cannot be replaced"),
        ("NAME\n...\n", "cannot be replaced"),
        ("NAME\npreprocess: &none {}\nserving: *none\n", "serving is an alias"),
        ("NAME\nlabels: |\n  index_to_name.json", "other keys would change"),
    ],
)
def test_a_recipe_that_cannot_be_changed_is_refused_before(
    recipe: Recipe, text: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"name": "a", "version": '"1"', "license": "x", "model": "{definition: yolov5}", "weights": "{file: a}"}
    joint = ", " if text.startswith("{") else "\n"
    recipe.path.write_text(text.replace("NAME", joint.join(f"{key}: {value}" for key, value in keys.items())))
    assert problem in failure_of(["tune", str(recipe.path), "--slo", "p99=150ms"], capsys)


def test_the_winner_goes_into_the_recipe(recipe: Recipe) -> None:
    before = recipe.path.read_text()
    recipe.path.chmod(0o640)
    check_editable(recipe)
    assert recipe.path.read_text() == before
    write_winner(recipe, BF16, setting(BF16, 2, 4, 10).serving(recipe.serving), "41.5 images/s, p99 90 ms")
    assert recipe.path.read_text() == before + (
        "# marina tune: 41.5 images/s, p99 90 ms\n"
        "runtime: {backend: torch, precision: bf16}\n"
        "serving: {min_workers: 2, max_workers: 2, batch_size: 4, max_batch_delay_ms: 10}\n"
    )
    assert recipe.path.stat().st_mode & 0o777 == 0o640
    again = load_recipe(recipe.path)
    write_winner(again, TORCH, setting(TORCH, 1, 1, 1).serving(again.serving), "50 images/s")
    assert recipe.path.read_text() == before + (
        "# marina tune: 50 images/s\n"
        "runtime: {backend: torch, precision: fp32}\n"
        "serving: {min_workers: 1, max_workers: 1, batch_size: 1, max_batch_delay_ms: 1}\n"
    )
    assert [path.name for path in recipe.path.parent.glob(".*")] == []


def test_comments_and_other_settings_stay(recipe: Recipe) -> None:
    head, tail = recipe.path.read_text().split("preprocess:")
    recipe.path.write_text(
        f"{head}serving:  # of the small machine\n  device: cpu\n  # patience\n  response_timeout_s: 90  # seconds\n"
        f"\n# the engine\nruntime: {{backend: torch}} # plain\npreprocess:{tail}"
    )
    changed = load_recipe(recipe.path)
    write_winner(changed, ONNX, setting(ONNX).serving(changed.serving), "9 images/s")
    serving = (
        "min_workers: 2, max_workers: 2, batch_size: 1, max_batch_delay_ms: 1, response_timeout_s: 90, device: cpu"
    )
    assert recipe.path.read_text() == (
        f"{head}# of the small machine\n# patience\nserving: {{{serving}}}  # seconds\n"
        f"\n# the engine\n# marina tune: 9 images/s\nruntime: {{backend: onnx, precision: fp32}} # plain\n"
        f"preprocess:{tail}"
    )


COMMENTS = st.sampled_from(["", "# a", "# runtime: {backend: onnx}", "#", "# é # ü"])
SECTIONS = {"runtime": {"backend": "onnx", "precision": "fp32"}, "serving": {"batch_size": 4, "device": "cpu"}}


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """Recipes as people write them: any order, both styles, comments everywhere, either line ending."""
    blocks = [["name: 'a # b'"], ["license: |-", "  # no comment", "  serving: {}"], ["golden:", "- {image: a.jpg}"]]
    for name, key, value in (("runtime", "backend", "torch"), ("serving", "batch_size", "8")):
        match draw(st.sampled_from(["block", "flow", "lines", "none"])):
            case "block":
                blocks.append(
                    [f"{name}: {draw(COMMENTS)}", f"  {draw(COMMENTS)}", f"  {key}: {value}  {draw(COMMENTS)}"]
                )
            case "flow":
                blocks.append([f'"{name}": {{{key}: {value}}}  {draw(COMMENTS)}'])
            case "lines":
                blocks.append([f"{name}: {{ {draw(COMMENTS)}", f"  {key}: {value} }}"])
    lines = []
    for block in draw(st.permutations(blocks)):
        lines += [draw(COMMENTS), *block]
    indent = draw(st.sampled_from(["", "  "]))
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    return newline.join(indent + line for line in lines) + draw(st.sampled_from(["", newline]))


@given(layouts())
@example("runtime: {backend: torch}\n")
@example("\nruntime: {backend: torch}")
def test_an_edit_changes_two_sections_and_no_more(text: str) -> None:
    changed = with_sections(text, SECTIONS, "fast")
    assert yaml.safe_load(changed) == yaml.safe_load(text) | SECTIONS
    comments = [line[line.index("#") :].strip() for line in text.splitlines() if "#" in line]
    kept = [line[line.index("#") :].strip() for line in changed.splitlines() if "#" in line]
    assert sorted(kept) == sorted([*comments, f"{MARK} fast"])
    others = [line for line in text.splitlines() if not any(part in line for part in ("runtime", "serving", "  "))]
    assert set(others) <= set(changed.splitlines())
    assert ("\r\n" in changed) == ("\r\n" in text)
    # A second edit finds its own remark.
    assert with_sections(changed, SECTIONS, "fast") == changed
