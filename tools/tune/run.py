"""One tuning: every setting tried on a real server, every trial kept as soon as it is made.

recipe -> archive of an engine, its answers proven -> the same with a setting in it -> server -> load -> trial
          built once                                  for every trial
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from handlers.errors import MarinaError
from handlers.settings import Runtime, parse_settings
from tools.archive.build import CONFIG, build_archive, model_config
from tools.archive.reader import open_archive
from tools.archive.recipe import Recipe, load_recipe
from tools.archive.writer import write_archive
from tools.bench.pictures import given_pictures, golden_picture
from tools.bench.serve import Measured, serve_and_load
from tools.errors import ToolError
from tools.serve.java import find_java
from tools.tune.edit import check_editable, write_winner
from tools.tune.objective import Slo
from tools.tune.record import NAME, Conditions, Ledger, Trial, conditions_of
from tools.tune.search import Outcome, search
from tools.tune.space import Setting, Space, possible_runtimes

WARMUP_S = 2


@dataclass(frozen=True)
class Order:
    """What to tune. images: to send in turn, the first golden picture without any. backends: None for all that build in
    seconds. seconds: of load, a trial. budget_s: for trials. output: the record, beside the recipe for None."""

    recipe: Path
    slos: Sequence[Slo]
    weights: Path | None
    images: Sequence[Path]
    calibration: Path | None
    connections: int
    seconds: int
    budget_s: float
    backends: Sequence[str] | None
    output: Path | None


class Workbench:
    """Where trials are made. folder: an empty one, for archives. bodies: the pictures given, encoded."""

    def __init__(self, order: Order, recipe: Recipe, bodies: Sequence[bytes], folder: Path):
        self._order = order
        self._recipe = recipe
        self._bodies = bodies
        self._folder = folder
        self.archives: dict[Runtime, Path] = {}

    def trial(self, setting: Setting) -> Trial:
        """A setting under load; one that cannot be built, does not start or dies is a failure with its reason."""
        start = time.monotonic()
        measured, failure = None, None
        try:
            measured = self._measure(setting)
        except ModuleNotFoundError as error:
            failure = f"{error.name} is not installed"
        except MarinaError as error:
            failure = str(error)
        return Trial(setting=setting, seconds=round(time.monotonic() - start, 1), measured=measured, failure=failure)

    def _measure(self, setting: Setting) -> Measured:
        if setting.runtime not in self.archives:
            path = self._folder / f"{len(self.archives)}.mar"
            recipe = self._recipe.model_copy(update={"runtime": setting.runtime})
            built = build_archive(recipe, path, self._order.weights, calibration=self._order.calibration)
            self.archives[setting.runtime] = built.path
        archive = self.archives[setting.runtime]
        if not self._bodies:
            with open_archive(archive) as opened:
                self._bodies = [golden_picture(opened)]
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            served = Path(folder) / archive.name
            with_setting(archive, self._recipe, setting, served)
            return serve_and_load(served, self._bodies, self._order.connections, self._order.seconds, WARMUP_S)


def with_setting(archive: Path, recipe: Recipe, setting: Setting, output: Path) -> None:
    """The archive of a recipe, built for the setting's runtime, with the rest of the setting in its configuration.

    It is good for a trial only: its provenance still speaks of the other.
    """
    with open_archive(archive) as source, write_archive(output, {}) as writer:
        changed = recipe.model_copy(update={"serving": setting.serving(recipe.serving)})
        config = model_config(changed, parse_settings(source.config["handler"]))
        for name in source.names():
            if name == CONFIG:
                writer.add(name, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
                continue
            with writer.open(name) as sink:
                for chunk in source.chunks(name):
                    sink.write(chunk)


def tune(order: Order, say: Callable[[str], None]) -> None:
    """Find the best setting and write it into the recipe. say: takes lines for people.

    Raises MarinaError with one line for what concerns all trials, and when no setting keeps the SLOs: the recipe is
    as it was then.
    """
    recipe = load_recipe(order.recipe)
    check_editable(recipe)
    _check_tools()
    bodies = given_pictures(order.images)
    conditions = _conditions(order, recipe, bodies)
    gpu = _has_gpu(recipe)
    runtimes = possible_runtimes(recipe, order.backends, order.calibration is not None, gpu)
    space = Space(runtimes, len(os.sched_getaffinity(0)), order.connections, gpu)
    ledger = _open_ledger(order.output or recipe.path.with_name(NAME), conditions, say)
    with tempfile.TemporaryDirectory(prefix="marina-") as folder:
        bench = Workbench(order, recipe, bodies, Path(folder))
        outcome = search(space, order.slos, ledger.trials, bench.trial, ledger.add, order.budget_s)
    say(outcome.as_table())
    if outcome.left_out:
        left = "; ".join(map(str, outcome.left_out))
        say(f"the budget is spent; left out: {left}. The same command goes on with them.")
    winner = outcome.winner()
    ledger.close([str(slo) for slo in order.slos], winner.setting if winner else None)
    if winner is None:
        raise _no_winner(outcome, recipe)
    _write(order, winner, conditions)
    say(f"{recipe.path} now has the winner, {winner.setting}; every trial is in {ledger.path}")
    if winner.setting.runtime.precision == "int8":
        say(f"build it with --calibration {order.calibration}")


def _check_tools() -> None:
    if shutil.which("wrk") is None:
        raise ToolError("wrk is not installed, which sends the pictures; apt install wrk")
    find_java()


def _conditions(order: Order, recipe: Recipe, bodies: Sequence[bytes]) -> Conditions:
    if not bodies and not recipe.golden:
        raise ToolError(f"recipe {recipe.path} has no golden picture to send; give pictures with --image FILE")
    pictures = bodies or [recipe.beside(recipe.golden[0].image).read_bytes()]
    return conditions_of(recipe, order.weights, pictures, order.calibration, order.connections, order.seconds)


def _has_gpu(recipe: Recipe) -> bool:
    if recipe.serving.device == "cpu":
        return False
    # Not before: it takes seconds, in which a wrong argument could have been told.
    import torch

    return torch.cuda.is_available()


def _open_ledger(path: Path, conditions: Conditions, say: Callable[[str], None]) -> Ledger:
    ledger = Ledger(path, conditions)
    if ledger.changed:
        say(f"{path} is of another {', '.join(ledger.changed)}: starting anew")
    elif ledger.trials:
        say(f"going on with the {len(ledger.trials)} trials of {path}")
    return ledger


def _no_winner(outcome: Outcome, recipe: Recipe) -> ToolError:
    wanted = ", ".join(map(str, outcome.slos))
    ranked = outcome.ranked()
    if not ranked:
        return ToolError(f"nothing could be measured: {outcome.trials[0].failure}")
    assert ranked[0].measured
    load = ranked[0].measured.load
    found = ", ".join(f"{slo.percentile} {slo.latency_ms(load):.1f} ms" for slo in outcome.slos)
    return ToolError(
        f"no setting keeps {wanted}; the nearest is {ranked[0].setting} with {found}; {recipe.path} stays as it was"
    )


def _write(order: Order, winner: Trial, conditions: Conditions) -> None:
    assert winner.measured
    load = winner.measured.load
    evidence = (
        f"{load.images_per_s:.1f} images/s, p99 {load.p99_ms:.0f} ms over {load.connections} connections,"
        f" on {conditions.machine['usable_cores']} cores of {conditions.machine['cpu']}"
    )
    # As it is now: people may have worked on it meanwhile.
    recipe = load_recipe(order.recipe)
    write_winner(recipe, winner.setting.runtime, winner.setting.serving(recipe.serving), evidence)
