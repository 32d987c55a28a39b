"""What is tried, and in which order. Each stage starts from the best of those before it:

1. engines: every engine and precision, one picture a batch, as many workers as cores and connections can keep busy;
   on a GPU one worker and a batch
2. workers: the two best engines with the other numbers of workers; threads follow, cores divided by workers
3. batches: the best of all with other batch sizes, each with a short and a longer delay

That is a dozen trials where all combinations would be hundreds. A batch is never larger than what the connections can
fill: TorchServe makes every batch that is not full wait its whole delay.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from handlers.errors import BadSettings
from handlers.settings import PRECISIONS, Runtime
from tools.archive.recipe import Recipe, Serving
from tools.bench.engines import name_of, runtimes
from tools.errors import ToolError
from tools.export.support import check_runtime
from tools.strict import Strict

# Compiles for a minute, so it is tried only where it is named.
SLOW_TO_BUILD = ("aoti",)
NEEDED = {
    "torch": (),
    "aoti": (),
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "tensorrt": ("onnx", "onnxruntime"),
}
ENGINES_KEPT = 2
NO_DELAY_MS = 1  # the least that a recipe can say; a batch of one does not wait
DELAYS_MS = (2, 10)
FIRST_BATCH_ON_GPU = 8
LARGEST_BATCH = 32


class Setting(Strict):
    """One way to serve a recipe."""

    runtime: Runtime
    workers: int
    batch_size: int
    delay_ms: int

    def serving(self, serving: Serving) -> Serving:
        """The recipe's section with this setting in it."""
        return serving.model_copy(
            update={
                "min_workers": self.workers,
                "max_workers": self.workers,
                "batch_size": self.batch_size,
                "max_batch_delay_ms": self.delay_ms,
            }
        )

    def __str__(self) -> str:
        text = (
            f"{name_of(self.runtime)}, {self.workers} worker{'s' if self.workers > 1 else ''}, batch {self.batch_size}"
        )
        return text + (f" within {self.delay_ms} ms" if self.batch_size > 1 else "")


@dataclass(frozen=True)
class Space:
    """All that may be tried. connections: how many requests there are at a time."""

    runtimes: Sequence[Runtime]
    cores: int
    connections: int
    gpu: bool

    @property
    def stages(self) -> Mapping[str, Callable[[Sequence[Setting]], list[Setting]]]:
        """Names, and what gives the settings to try when those that have run are given, the best first."""
        return {"engines": self._engines, "workers": self._workers, "batches": self._batches}

    def _engines(self, _: Sequence[Setting]) -> list[Setting]:
        if self.gpu:
            size = max(size for size in self._sizes(1) if size <= FIRST_BATCH_ON_GPU)
            return [self._setting(runtime, 1, size) for runtime in self.runtimes]
        return [self._setting(runtime, self._worker_counts()[0], 1) for runtime in self.runtimes]

    def _workers(self, ranked: Sequence[Setting]) -> list[Setting]:
        first: dict[Runtime, Setting] = {}
        for setting in ranked:
            first.setdefault(setting.runtime, setting)
        return [
            self._setting(runtime, workers, min(best.batch_size, self._sizes(workers)[-1]))
            for runtime, best in list(first.items())[:ENGINES_KEPT]
            for workers in self._worker_counts()
            if workers != best.workers
        ]

    def _batches(self, ranked: Sequence[Setting]) -> list[Setting]:
        if not ranked or ranked[0].runtime.shape == "fixed":
            return []
        best = ranked[0]
        tried = [
            Setting(runtime=best.runtime, workers=best.workers, batch_size=size, delay_ms=delay)
            for size in self._sizes(best.workers)
            for delay in (DELAYS_MS if size > 1 else [NO_DELAY_MS])
        ]
        return [setting for setting in tried if setting != best]

    def _setting(self, runtime: Runtime, workers: int, size: int) -> Setting:
        if runtime.shape == "fixed":
            size = 1  # that is what the network is written for
        delay = DELAYS_MS[0] if size > 1 else NO_DELAY_MS
        return Setting(runtime=runtime, workers=workers, batch_size=size, delay_ms=delay)

    def _worker_counts(self) -> list[int]:
        """From the largest that has something to do down to one, by halves."""
        return list(_halves(min(self.cores, self.connections)))

    def _sizes(self, workers: int) -> list[int]:
        """Of batches, by doubling, that the connections can fill for every worker at once."""
        most = min(LARGEST_BATCH, max(1, self.connections // workers))
        return [1 << power for power in range(most.bit_length())]


def _halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


def possible_runtimes(recipe: Recipe, backends: Sequence[str] | None, calibrated: bool, gpu: bool) -> list[Runtime]:
    """The engines and precisions that are installed, that this machine has and that can run the recipe's network.

    backends: those asked for, None for all that build in seconds. calibrated: there are pictures to fit int8 to.
    Raises ToolError for one that was asked for and cannot be had in any precision.
    """
    found: list[Runtime] = []
    for backend in backends or [name for name in PRECISIONS if name not in SLOW_TO_BUILD]:
        obstacles = {runtime: _obstacle(recipe, runtime, calibrated, gpu) for runtime in runtimes([backend], gpu)}
        able = [runtime for runtime, obstacle in obstacles.items() if obstacle is None]
        if backends and not able:
            raise ToolError(f"--backends names {backend}: {next(iter(obstacles.values()))}")
        found += able
    return list(dict.fromkeys(found))


def _obstacle(recipe: Recipe, runtime: Runtime, calibrated: bool, gpu: bool) -> str | None:
    needed = [*NEEDED[runtime.backend], *(["nncf"] if runtime.precision == "int8" else [])]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        return f"{missing[0]} is not installed; pip install {missing[0]}, or leave {runtime.backend} out"
    if runtime.precision == "int8" and not calibrated:
        return "int8 is fitted to pictures; give a folder of them with --calibration DIR"
    if runtime.backend == "tensorrt" and not gpu:
        return "tensorrt runs on NVIDIA's GPUs alone, and torch finds none here; leave it out"
    try:
        check_runtime(recipe.model.definition, runtime, recipe.preprocess, recipe.serving.device)
    except BadSettings as error:
        return str(error)
    return None
