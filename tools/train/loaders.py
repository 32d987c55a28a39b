"""What brings pictures to training and validation."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from handlers.settings import Preprocess
from model_defs.contract import Detector
from tools.data.dataset import Dataset, Picture
from tools.errors import ToolError
from tools.train.cache import Cache, loader_settings
from tools.train.config import TrainSettings
from tools.train.launch import Place
from tools.train.pictures import TrainingPictures, ValidationPictures, make_loader, validation_batches
from tools.train.sampler import EpochBatches


class Loaders(NamedTuple):
    """samples: what `training` loads. pictures: those of validation. batch: pictures a step of training, over all
    processes."""

    training: DataLoader[Any]
    validation: DataLoader[Any]
    batches: EpochBatches
    samples: TrainingPictures
    pictures: Sequence[Picture]
    batch: int


def make_loaders(
    dataset: Dataset, settings: TrainSettings, detector: Detector, folder: Path, here: Place, on_gpu: bool
) -> Loaders:
    """folder: for a cache on disk. Raises ToolError for an empty split and for pictures that cannot be read."""
    rank, world = here.rank, here.world
    if settings.batch % world:
        raise ToolError(f"--batch is {settings.batch}, which {world} processes cannot share evenly")
    train, valid = dataset.split("train"), dataset.split("valid")
    cache = Cache(settings.cache, int(settings.cache_gb * 1e9), folder)
    own = settings.batch // world
    preprocess = Preprocess(settings.size, "rect") if detector.letterbox else None

    training = TrainingPictures(train, settings.size, settings, settings.seed, detector.letterbox, cache)
    batches = EpochBatches(len(train), own, settings.seed, rank, world)
    validation = ValidationPictures(valid, preprocess, detector.stride, cache)
    # Lightning wants a batch for every process; what is found twice on a picture counts once.
    parts = validation_batches(valid, preprocess, detector.stride, own)
    parts = parts[rank::world] or parts[:1]

    workers = _workers(here, on_gpu) if settings.workers is None else settings.workers
    how = loader_settings(workers, own * 3 * settings.size**2)
    if how.note and rank == 0:
        print(how.note, file=sys.stderr)
    return Loaders(
        make_loader(training, batches, how, on_gpu),
        make_loader(validation, parts, how, on_gpu),
        batches,
        training,
        valid,
        settings.batch,
    )


def _workers(here: Place, on_gpu: bool) -> int:
    """On the CPU training takes all cores itself."""
    return min(8, max(1, len(os.sched_getaffinity(0)) // here.local_world)) if on_gpu else 1
