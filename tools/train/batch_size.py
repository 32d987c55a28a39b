"""How many pictures a step should have on this machine, found by trying."""

import gc
import resource
import time
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from model_defs.contract import Detector
from tools.train.config import TrainSettings
from tools.train.loss import alone
from tools.train.model import losses_of, make_model
from tools.train.pictures import Batch

MOST, MOST_ON_CPU = 1024, 64
LEAST_STEPS = 8  # in an epoch
GPU_SHARE = 0.8  # of the GPU's memory
CPU_SHARE = 0.5  # of the memory that is free
WORTH_MORE = 1.05  # a batch of twice the size has to be so many times faster
OBJECTS = 8  # in each picture that is tried


def find_batch(settings: TrainSettings, classes: tuple[str, ...], pictures: int, gpu: int | None) -> tuple[int, str]:
    """A power of two that leaves an epoch some steps, and why: on a GPU the largest that fits, on the CPU the
    smallest that is about as fast as any.

    gpu: its number, None for the CPU.
    """
    device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
    detector = make_model(settings, classes)[0].to(device)
    sizes = _sizes(min(MOST_ON_CPU if gpu is None else MOST, max(1, pictures // LEAST_STEPS)))
    best = _largest(detector, settings, sizes, device) if gpu is not None else _fastest(detector, settings, sizes)
    del detector
    gc.collect()
    if gpu is not None:
        torch.cuda.empty_cache()
    return best


def _sizes(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _largest(
    detector: Detector, settings: TrainSettings, sizes: Iterator[int], device: torch.device
) -> tuple[int, str]:
    total = torch.cuda.get_device_properties(device).total_memory
    best, taken = 1, 0
    for size in sizes:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            _step(detector, settings, size, device)
        except torch.OutOfMemoryError:
            break
        used = torch.cuda.max_memory_reserved(device)
        if used > GPU_SHARE * total:
            break
        best, taken = size, used
    return best, f"it takes {taken / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB"


def _fastest(detector: Detector, settings: TrainSettings, sizes: Iterator[int]) -> tuple[int, str]:
    best, best_speed = 1, 0.0
    limit = _peak_bytes() + CPU_SHARE * psutil.virtual_memory().available
    _step(detector, settings, 1, torch.device("cpu"))  # the first is slower
    for size in sizes:
        before = _peak_bytes()
        speed = size / min(_seconds(detector, settings, size) for _ in range(2))
        if speed > best_speed * WORTH_MORE:
            best, best_speed = size, speed
        elif size >= 4 * best:
            break
        # The next one takes about twice what this one has added.
        if _peak_bytes() + 2 * (_peak_bytes() - before) > limit:
            break
    return best, f"{best_speed:.1f} images/s; larger ones are hardly faster, or do not fit into memory"


def _seconds(detector: Detector, settings: TrainSettings, size: int) -> float:
    started = time.perf_counter()
    _step(detector, settings, size, torch.device("cpu"))
    return time.perf_counter() - started


def _step(detector: Detector, settings: TrainSettings, size: int, device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision != "fp32"):
        losses = losses_of(detector, settings, _noise(settings, size, device, detector.letterbox), alone)
    torch.stack(list(losses.values())).sum().backward()
    detector.zero_grad()


def _noise(settings: TrainSettings, size: int, device: torch.device, canvas: bool) -> Batch:
    """Squares of the size of training with objects in them."""
    side = settings.size
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
    low = torch.rand(size * OBJECTS, 2) * 0.5 * side
    extent = (0.05 + 0.3 * torch.rand(size * OBJECTS, 2)) * side
    owners = torch.arange(size).repeat_interleave(OBJECTS)[:, None]
    targets = torch.cat((owners, torch.zeros_like(owners), low + extent / 2, extent), dim=1).to(device)
    whole: Tensor | list[Tensor] = images.contiguous(memory_format=torch.channels_last) if canvas else list(images)
    return Batch(whole, targets)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
