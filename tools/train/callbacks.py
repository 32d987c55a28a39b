"""What happens around training: results, weights and checkpoint of every epoch, early stopping, a line to look at."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from pytorch_lightning import Callback, Trainer

from tools.train.config import TrainSettings
from tools.train.module import Training
from tools.train.run import BEST, CHECKPOINT, LAST, RESULTS, write_rows, writing
from tools.train.weights import save_weights

REDRAW_S = 0.2


class Record(Callback):
    """Keeps a run folder, and stops a training that has stopped getting better.

    rows: of `results.csv`. labels: those of the network, in order.
    """

    def __init__(self, run: Path, settings: TrainSettings, labels: list[str]):
        self.run = run
        self.settings = settings
        self.labels = labels
        self.rows: list[dict[str, Any]] = []
        self.best_epoch = 0
        self.best_fitness = -1.0
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best_epoch": self.best_epoch, "best_fitness": self.best_fitness}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]
        self.best_epoch, self.best_fitness = state_dict["best_epoch"], state_dict["best_fitness"]

    def on_train_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        self._started = time.monotonic()
        if trainer.is_global_zero and self.rows:
            # The run may have been cut off between a row and the checkpoint that goes with it.
            write_rows(self.run / RESULTS, self.rows)
        self._stop_if_stale(trainer)

    def on_train_epoch_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        epoch = trainer.current_epoch + 1
        module.check_weights()
        fitness = module.metrics["fitness"]
        better = fitness > self.best_fitness
        if better:
            self.best_epoch, self.best_fitness = epoch, fitness
        self.rows.append(self._row(trainer, module, epoch))
        if trainer.is_global_zero:
            self._write(trainer, module, epoch, better)
        self._checkpoint(trainer)
        self._stop_if_stale(trainer)

    def _row(self, trainer: Trainer, module: Training, epoch: int) -> dict[str, Any]:
        seconds = time.monotonic() - self._started
        losses = {f"train/{name}": round(value, 6) for name, value in module.mean_losses().items()}
        metrics = {f"valid/{name}": round(value, 6) for name, value in module.metrics.items()}
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        return {"epoch": epoch, **losses, **metrics, "lr": rate, "seconds": round(seconds, 1)}

    def _write(self, trainer: Trainer, module: Training, epoch: int, better: bool) -> None:
        write_rows(self.run / RESULTS, self.rows)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in self.rows[-1].items() if k != "epoch"}, step=epoch)
        period = self.settings.save_period
        names = [
            LAST,
            *([BEST] if better else []),
            *([f"epoch-{epoch}.safetensors"] if period and epoch % period == 0 else []),
        ]
        for name in names:
            save_weights(module.average, self.run / name, self.labels)

    def _checkpoint(self, trainer: Trainer) -> None:
        """The last thing that an epoch writes: what it says has been done is there."""
        path = self.run / CHECKPOINT
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with writing(path):
                trainer.save_checkpoint(temporary)
                if trainer.is_global_zero:
                    os.replace(temporary, path)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)

    def _stop_if_stale(self, trainer: Trainer) -> None:
        patience = self.settings.patience
        if patience and self.rows and self.rows[-1]["epoch"] - self.best_epoch >= patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"no better fitness for {patience} epochs than that of epoch {self.best_epoch}: training stops")


class Console(Callback):
    """On a terminal a line that is redrawn, elsewhere a line an epoch. For the first process, after its record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._visible = sys.stderr.isatty()
        self._drawn = self._began = self._epoch_began = 0.0
        self._pictures = self._first_epoch = 0
        self._trained_s = 0.0

    def on_train_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        # Lightning leaves out the start of the epoch that a run goes on with.
        self._began = self._epoch_began = time.monotonic()
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        self._epoch_began, self._pictures = time.monotonic(), 0

    def on_train_batch_end(self, trainer: Trainer, module: Training, outputs: Any, batch: Any, index: int) -> None:  # type: ignore[override]  # no other module comes
        self._pictures += len(batch.images) * trainer.world_size
        self._trained_s = time.monotonic() - self._epoch_began
        if self._visible and time.monotonic() - self._drawn > REDRAW_S:
            self._drawn = time.monotonic()
            share = (index + 1) / trainer.num_training_batches
            losses = "  ".join(f"{name} {value.item():.4f}" for name, value in module.losses.items())
            self._draw(
                f"{self._head(trainer)} {share:4.0%}  {losses}  {self._tail(trainer, trainer.current_epoch + share)}"
            )

    def on_validation_batch_end(self, trainer: Trainer, module: Training, *rest: Any) -> None:  # type: ignore[override]  # no other module comes
        if self._visible and time.monotonic() - self._drawn > REDRAW_S:
            self._drawn = time.monotonic()
            self._draw(f"{self._head(trainer)}  validation, {len(module.found)} pictures")

    def on_train_epoch_end(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]  # no other module comes
        row = self.record.rows[-1]
        losses = "  ".join(
            f"{name.removeprefix('train/')} {row[name]:.4f}" for name in row if name.startswith("train/")
        )
        metrics = f"mAP50 {row['valid/map50']:.4f}  mAP50-95 {row['valid/map50_95']:.4f}"
        if self._visible:
            self._draw("")
        print(f"{self._head(trainer)}  {losses}  {metrics}  {self._tail(trainer, row['epoch'])}", flush=True)

    def _head(self, trainer: Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"

    def _tail(self, trainer: Trainer, epochs_done: float) -> str:
        speed = self._pictures / max(self._trained_s, 1e-9)
        elapsed = time.monotonic() - self._began
        left = elapsed / max(epochs_done - self._first_epoch, 1e-9) * ((trainer.max_epochs or 0) - epochs_done)
        return f"{speed:.1f} images/s  {memory_gb():.1f} GB  {_duration(left)} left"

    def _draw(self, text: str) -> None:
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()


def memory_gb() -> float:
    """The most that the GPU has held, where there is one, else what this process takes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
