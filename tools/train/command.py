"""marina train"""

import argparse
import time
from pathlib import Path

from handlers.errors import MarinaError
from tools.config import add_flags, settle
from tools.errors import ToolError
from tools.train.config import SECTION, TrainSettings, read_config
from tools.train.launch import launch, launched, place, processes_wanted
from tools.train.run import check_start, check_unfinished, new_run

SPEAK_FIRST_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, TrainSettings, SECTION)
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run from its last finished epoch")
    parser.add_argument(
        "--search", type=int, metavar="TRIALS", help="train so often to find hyperparameters, each time for all epochs"
    )


def run(args: argparse.Namespace) -> int:
    if args.search is not None and args.search < 1:
        raise ToolError(f"--search is {args.search}; give at least one trial")
    if args.resume is not None:
        folder, settings = args.resume, _resumed(args)
    else:
        folder, settings = _started(args)
    if args.search is not None:
        from tools.train.search import search

        search(settings, folder, args.search)
        return 0
    processes = processes_wanted(settings)
    if processes > 1 and not launched():
        return launch(folder, processes)
    from tools.train.trainer import train

    try:
        train(settings, folder)
    except MarinaError:
        # Mostly the first process says the same, and torchrun ends this one then.
        time.sleep(SPEAK_FIRST_S if place().rank else 0)
        raise
    return 0


def _resumed(args: argparse.Namespace) -> TrainSettings:
    given = [name for name in TrainSettings.model_fields if hasattr(args, name)]
    if given or args.config is not None:
        flag = "--" + (given[0] if given else "config").replace("_", "-")
        raise ToolError(f"--resume goes on with the settings of the run itself; leave out {flag}")
    settings = read_config(args.resume)
    check_unfinished(args.resume)
    return settings


def _started(args: argparse.Namespace) -> tuple[Path, TrainSettings]:
    """The folder of a new run, made by the first process, with the settings in it."""
    settings = settle(args, TrainSettings, SECTION).resolved()
    check_start(settings)
    if not launched():
        if settings.batch == 0:
            settings = _with_batch(settings)
        return new_run(settings), settings
    if settings.output is None or settings.batch == 0:
        raise ToolError("under torchrun all processes have to agree; give --output, and a --batch above 0")
    if place().rank == 0:
        new_run(settings)
    return settings.output, settings


def _with_batch(settings: TrainSettings) -> TrainSettings:
    from tools.data.dataset import read_dataset
    from tools.train.batch_size import find_batch
    from tools.train.trainer import uses_gpu

    dataset = read_dataset(settings.data)
    processes = processes_wanted(settings)
    gpu = (settings.gpus or [0])[0] if uses_gpu(settings) else None
    batch, why = find_batch(settings, dataset.classes, len(dataset.split("train")) // processes, gpu)
    print(f"batch: {batch * processes} ({why})", flush=True)
    return settings.model_copy(update={"batch": batch * processes})
