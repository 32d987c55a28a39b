"""Better hyperparameters, by short trainings under Optuna.

<run>/search.db   every trial, so that a search goes on where it was stopped
<run>/trial-N     the run folder of each
<run>/best.yaml   the settings of the best one, for `marina train --config`
"""

from pathlib import Path
from typing import Any

import optuna
from pytorch_lightning import Callback, Trainer

from tools.errors import ToolError
from tools.train.config import TrainSettings, write_config
from tools.train.launch import processes_wanted
from tools.train.module import LossNotFinite, Training
from tools.train.run import new_run
from tools.train.trainer import train

DATABASE = "search.db"
BEST_CONFIG = "best.yaml"
DONE = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)

# Lowest and highest value; rates and decay are drawn evenly in their logarithm.
RATE_FACTORS = (0.1, 10.0)  # times the learning rate given
WEIGHT_DECAYS = (1e-5, 1e-2)
RANGES = {
    "momentum": (0.6, 0.98),
    "hsv_h": (0.0, 0.1),
    "hsv_s": (0.0, 0.9),
    "hsv_v": (0.0, 0.9),
    "translate": (0.0, 0.5),
    "scale": (0.0, 0.9),
    "flip_lr": (0.0, 0.5),
}
YOLOV5_RANGES = {
    "box_gain": (0.02, 0.2),
    "objectness_gain": (0.2, 4.0),
    "class_gain": (0.2, 4.0),
    "mosaic": (0.0, 1.0),
}


def search(settings: TrainSettings, run: Path, trials: int) -> dict[str, Any]:
    """Until there have been `trials` in all, the first with the settings given. A trial that is worse than half of
    the earlier ones were at the same epoch ends early. Returns the changes to the settings that were best.

    Raises ToolError for what `train` raises it for, a loss that is not finite apart.
    """
    if processes_wanted(settings) > 1:
        raise ToolError("--search trains in one process; leave --processes and all but one GPU out")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{(run / DATABASE).resolve()}",
        study_name="search",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(),
    )
    for cut_off in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(cut_off.number, state=optuna.trial.TrialState.FAIL)
    # A sampler starts with random trials: not again with those that there have been.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
    if not study.trials:
        study.enqueue_trial({name: getattr(settings, name) for name in _ranges(settings)})

    while (done := len(study.get_trials(states=DONE))) < trials:
        trial = study.ask()
        changes = _draw(trial, settings)
        print(f"trial {done + 1}/{trials}: " + "  ".join(f"{name} {value:.4g}" for name, value in changes.items()))
        _run(study, trial, settings.model_copy(update=changes), run)
        if study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            write_config(settings.model_copy(update=study.best_params), run / BEST_CONFIG)
    return _report(study, run)


def _run(study: optuna.Study, trial: optuna.Trial, settings: TrainSettings, run: Path) -> None:
    settings = settings.model_copy(update={"output": run / f"trial-{trial.number}"})
    try:
        summary = train(settings, new_run(settings), [Prune(trial)], report=False)
    except (optuna.TrialPruned, LossNotFinite) as reason:
        print(f"trial ended early: {reason}")
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    study.tell(trial, summary["fitness"])


def _report(study: optuna.Study, run: Path) -> dict[str, Any]:
    if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise ToolError("no trial came to its end; give a lower --lr or more epochs")
    best = study.best_trial
    print(f"best: trial {best.number}, fitness {best.value:.4f}; marina train --config {run / BEST_CONFIG}")
    return best.params


def _ranges(settings: TrainSettings) -> dict[str, tuple[float, float]]:
    rates = {"lr": (settings.rate * RATE_FACTORS[0], settings.rate * RATE_FACTORS[1]), "weight_decay": WEIGHT_DECAYS}
    return rates | RANGES | (YOLOV5_RANGES if settings.family == "yolov5" else {})


def _draw(trial: optuna.Trial, settings: TrainSettings) -> dict[str, float]:
    return {
        name: trial.suggest_float(name, low, high, log=name in ("lr", "weight_decay"))
        for name, (low, high) in _ranges(settings).items()
    }


class Prune(Callback):
    """Ends a training that is worse than half of the earlier ones."""

    def __init__(self, trial: optuna.Trial):
        self.trial = trial

    def on_train_epoch_end(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        self.trial.report(module.metrics["fitness"], trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"fitness {module.metrics['fitness']:.4f} at epoch {trainer.current_epoch + 1}")
