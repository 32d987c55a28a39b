"""A training from its settings to its summary, in this process: one of several where torchrun has started it."""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DDPStrategy

from handlers.weights import load_state, read_safetensors
from model_defs.yolov5 import YOLOv5
from tools.data.dataset import Dataset, read_dataset
from tools.errors import ToolError
from tools.train.anchors import check_anchors
from tools.train.callbacks import Console, Record
from tools.train.config import TrainSettings
from tools.train.launch import Place, place
from tools.train.loaders import make_loaders
from tools.train.loggers import close_loggers, make_loggers
from tools.train.model import label_names, make_model
from tools.train.module import Training
from tools.train.report import draw_data, write_results
from tools.train.run import BEST, CHECKPOINT, SUMMARY, write_json

CACHE = "cache"  # of decoded pictures, in the folder of a run that has not ended
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
WORKER_FAILED = "in DataLoader worker"
DEV_RUN: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1}


def train(
    settings: TrainSettings, run: Path, callbacks: Sequence[Callback] = (), report: bool = True
) -> dict[str, Any]:
    """Train to the last epoch, from the checkpoint in the run folder where there is one, then validate the best
    weights as they have been stored. Returns what `summary.json` says.

    report: whether the folder gets pictures, a page and a recipe as well.
    Raises ToolError with one line for whatever is wrong with settings, data, weights, disk or loss.
    """
    here = place()
    quieten()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_world))
    uses_gpu(settings)  # before all that takes time
    dataset = read_dataset(settings.data)
    module, notes = make_training(settings, dataset, run, here)
    record = Record(run, settings, label_names(settings, dataset.classes))
    checkpoint = run / CHECKPOINT if (run / CHECKPOINT).exists() else None
    if here.rank == 0:
        print("\n".join([f"goes on from {checkpoint}"] if checkpoint else notes), flush=True)
        if report:
            draw_data(run, dataset, module.loaders.samples)
    trainer = _make_trainer(settings, run, here, [record, *([Console(record)] if here.rank == 0 else []), *callbacks])
    with _plain_errors():
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        summary = _validate_best(trainer, module, record)
    if here.rank == 0:
        if report:
            write_results(run, settings, dataset, module.average.cpu(), record.labels, module.found)
        shutil.rmtree(run / CACHE, ignore_errors=True)
        # The last file: with it the run has ended.
        write_json(run / SUMMARY, summary)
        _say(run, summary)
    return summary


def _make_trainer(settings: TrainSettings, run: Path, here: Place, callbacks: list[Callback]) -> Trainer:
    gpu = uses_gpu(settings)
    return Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=(settings.gpus if gpu else None) or here.local_world,
        num_nodes=here.world // here.local_world,
        strategy=DDPStrategy(process_group_backend="nccl" if gpu else "gloo") if here.world > 1 else "auto",
        **(DEV_RUN if settings.fast_dev_run else {}),
        max_epochs=settings.epochs,
        precision=PRECISIONS[settings.precision],  # type: ignore[arg-type]  # each is one of Lightning's
        logger=make_loggers(settings, run) if here.rank == 0 else False,
        callbacks=callbacks,
        default_root_dir=run,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What others wrap, as it was raised; and the loggers closed."""
    try:
        yield
    except ToolError as error:
        if WORKER_FAILED not in str(error):
            raise
        # torch puts the traceback of a worker into the message.
        raise ToolError(str(error).rpartition(f"{ToolError.__name__}: ")[2]) from error
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from error
    finally:
        close_loggers()


def make_training(settings: TrainSettings, dataset: Dataset, run: Path, here: Place) -> tuple[Training, list[str]]:
    """And lines that say what weights and anchors it starts from."""
    # Empty splits before all that takes time.
    pictures, _ = dataset.split("train"), dataset.split("valid")
    detector, notes = make_model(settings, dataset.classes)
    if isinstance(detector, YOLOv5):
        notes.append(_fit_anchors(detector, settings, pictures))
    loaders = make_loaders(dataset, settings, detector, run / CACHE, here, on_gpu=uses_gpu(settings))
    return Training(detector, settings, loaders), notes


def _fit_anchors(detector: YOLOv5, settings: TrainSettings, pictures: Any) -> str:
    strides = torch.tensor(detector.head.strides)[:, None, None]
    check = check_anchors((detector.head.anchors * strides).numpy(), pictures, settings.size, settings.seed)
    if not check.changed:
        return f"anchors: {check.recall_before:.1%} of the boxes match one"
    detector.head.anchors.copy_(torch.from_numpy(check.anchors) / strides)
    return (
        f"anchors: {check.recall_before:.1%} of the boxes matched one, so new ones were made: {check.recall_after:.1%}"
    )


def _validate_best(trainer: Trainer, module: Training, record: Record) -> dict[str, Any]:
    """With the weights as they have been stored."""
    best = record.run / BEST
    if not best.exists():
        raise ToolError(f"{best} is not there; it was there when epoch {record.best_epoch} ended")
    load_state(module.average, read_safetensors(best))
    module.average.requires_grad_(False)
    trainer.validate(module, verbose=False)
    return {"epochs": len(record.rows), "best_epoch": record.best_epoch, **module.metrics}


def _say(run: Path, summary: dict[str, Any]) -> None:
    metrics = f"mAP50 {summary['map50']:.4f}  mAP50-95 {summary['map50_95']:.4f}"
    print(f"{run / BEST}: {metrics}  (epoch {summary['best_epoch']}, measured again as stored in half precision)")


def uses_gpu(settings: TrainSettings) -> bool:
    """Raises ToolError for a GPU that is asked for and not there, and for what only GPUs do."""
    if settings.gpus and max(settings.gpus) >= torch.cuda.device_count():
        raise ToolError(f"--devices {settings.devices}: this machine has {torch.cuda.device_count()} usable GPUs")
    gpu = settings.devices != "cpu" and settings.processes == 1 and torch.cuda.is_available()
    if settings.precision == "fp16" and not gpu:
        raise ToolError("--precision fp16 needs a GPU; on the CPU use bf16 or fp32")
    return gpu


def quieten() -> None:
    """Keep Lightning's advice and torch's notes on its own future from the terminal; errors are ToolErrors."""
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\b")
    for name in ("pytorch_lightning", "lightning_fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
