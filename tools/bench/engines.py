"""Every engine that can run a recipe's network, side by side, in rounds by turns."""

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.errors import MarinaError
from handlers.settings import PRECISIONS, Preprocess, Runtime
from tools.archive.build import Built, build_archive
from tools.archive.reader import open_archive
from tools.archive.recipe import Recipe, load_recipe
from tools.bench.engine import Engine
from tools.bench.pictures import described, given_pictures, golden_picture
from tools.bench.table import table
from tools.bench.usage import MB
from tools.errors import ToolError
from tools.progress import Progress

FIRST = Runtime("torch", "fp32")
ROUNDS = 5


@dataclass(frozen=True)
class Figures:
    """Milliseconds: network, from the tensor to candidates; request, from the picture's bytes to those of the answer.
    rss, uss: bytes of the process after them. first_answer_s: seconds from its start to its first answer."""

    network_median: float
    network_p90: float
    request_median: float
    request_p90: float
    rss: int
    uss: int
    first_answer_s: float


@dataclass(frozen=True)
class EngineRow:
    """figures: None where the engine cannot be had, `missing` says why. The ratios: how many times as fast as torch in
    fp32; None where that was not measured. beyond: how its answers are out of the bounds of parity, None where they are
    within, so that `archive build` would make it."""

    engine: str
    figures: Figures | None
    network_ratio: float | None = None
    request_ratio: float | None = None
    missing: str | None = None
    beyond: str | None = None


@dataclass(frozen=True)
class EnginesReport:
    recipe: str
    picture: str
    size: int
    runs: int
    threads: int
    rows: list[EngineRow]

    def as_table(self) -> str:
        header = ["engine", "network ms", "p90", "ratio", "request ms", "p90", "ratio", "RSS/USS MB", "first answer s"]
        lines = [
            f"{self.recipe} at {self.size}x{self.size}, {self.picture}",
            f"{self.runs} runs in {ROUNDS} rounds by turns, {self.threads} thread(s) on as many cores",
            "",
        ]
        return "\n".join(lines + table(header, [cells for row in self.rows for cells in _lines(row)]))

    @property
    def chart_title(self) -> str:
        return f"{self.recipe}: ms a request, {self.threads} thread(s)"

    def as_bars(self) -> dict[str, float]:
        """For a chart: names and milliseconds of a request."""
        return {row.engine: row.figures.request_median for row in self.rows if row.figures}


def _lines(row: EngineRow) -> list[list[str]]:
    return [_cells(row), *([["  out of bounds", row.beyond]] if row.beyond else [])]


def _cells(row: EngineRow) -> list[str]:
    figures = row.figures
    if figures is None:
        return [row.engine, f"not there: {row.missing}"]
    return [
        row.engine,
        f"{figures.network_median:.1f}",
        f"{figures.network_p90:.1f}",
        _ratio(row.network_ratio),
        f"{figures.request_median:.1f}",
        f"{figures.request_p90:.1f}",
        _ratio(row.request_ratio),
        f"{figures.rss / MB:.0f}/{figures.uss / MB:.0f}",
        f"{figures.first_answer_s:.1f}",
    ]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def name_of(runtime: Runtime) -> str:
    return " ".join([runtime.backend, runtime.precision, *(["fixed"] if runtime.shape == "fixed" else [])])


def runtimes(backends: Sequence[str], gpu: bool) -> Iterator[Runtime]:
    """All that the backends offer, torch in fp32 first: what the others are compared with. No processor has fp16."""
    for backend in sorted(backends, key=lambda backend: backend != FIRST.backend):
        for precision in PRECISIONS[backend]:
            if precision == "fp16" and not gpu:
                continue
            yield Runtime(backend, precision)  # type: ignore[arg-type]  # both are of the table
            if backend == "openvino":
                # The one engine that gains by knowing the shape.
                yield Runtime(backend, precision, "fixed")  # type: ignore[arg-type]  # as above


def variant(recipe: Recipe, runtime: Runtime, shape: str = "square", **changes: Any) -> Recipe:
    """The recipe with another engine and shape. Without golden answers: those are of the engine that it names."""
    preprocess = Preprocess(recipe.preprocess.size, shape)  # type: ignore[arg-type]  # one of two literals
    golden = [entry.model_copy(update={"detections": None}) for entry in recipe.golden]
    return recipe.model_copy(update={"runtime": runtime, "preprocess": preprocess, "golden": golden, **changes})


def build_variant(
    recipe: Recipe, output: Path, weights: Path | None, calibration: Path | None, even_beyond: bool = False
) -> Built:
    """calibration: counts for int8 alone. even_beyond: see `build_archive`. Raises MarinaError with one line where this
    recipe cannot be built."""
    pictures = calibration if recipe.runtime.precision == "int8" else None
    try:
        return build_archive(recipe, output, weights, calibration=pictures, even_beyond=even_beyond)
    except ModuleNotFoundError as error:
        raise ToolError(f"{error.name} is not installed") from error


def bench_engines(
    path: Path,
    weights: Path | None,
    backends: Sequence[str],
    calibration: Path | None,
    image: Path | None,
    runs: int,
    threads: int,
) -> EnginesReport:
    """Build an archive for every engine, load each in a fresh process, and time them by turns on the same cores.

    calibration: pictures that int8 is fitted to. image: the first golden picture without one. Raises MarinaError with
    one line for what concerns all engines; one that cannot be had is a row that says why.
    """
    import torch

    recipe = load_recipe(path)
    tried = list(runtimes(backends, torch.cuda.is_available()))
    names = [name_of(runtime) for runtime in tried]
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    if len(cores) < threads:
        raise ToolError(f"--threads is {threads}, but only {len(cores)} cores may be used")
    missing: dict[str, str] = {}
    beyond: dict[str, str | None] = {}
    engines: dict[str, Engine] = {}
    body = given_pictures([image])[0] if image else None
    with tempfile.TemporaryDirectory(prefix="marina-") as folder, ExitStack() as stack:
        with Progress("engines", len(names), unit="engines") as progress:
            for name, runtime in zip(names, tried, strict=True):
                try:
                    archive = Path(folder) / f"{name}.mar"
                    built = build_variant(variant(recipe, runtime), archive, weights, calibration, even_beyond=True)
                    body = body or _golden(built.path)
                    engines[name] = stack.enter_context(Engine(built.path, [body], 1, cores))
                    beyond[name] = built.beyond
                except MarinaError as error:
                    missing[name] = str(error)
                progress.advance()
        if body is None or not engines:
            raise ToolError(f"no engine can run {path}; the first, {names[0]}: {missing[names[0]]}")
        figures = _measure(engines, runs)
    rows = [_row(name, figures, missing.get(name), beyond.get(name)) for name in names]
    return EnginesReport(recipe.name, described(body), recipe.preprocess.size, runs, threads, rows)


def _golden(archive: Path) -> bytes:
    with open_archive(archive) as opened:
        return golden_picture(opened)


def _measure(engines: dict[str, Engine], runs: int) -> dict[str, Figures]:
    """`runs` of each engine, in rounds by turns, so that a busy machine hits all alike."""
    network: dict[str, list[float]] = {name: [] for name in engines}
    request: dict[str, list[float]] = {name: [] for name in engines}
    each = -(-runs // ROUNDS)
    with Progress("engines", ROUNDS * len(engines), unit="turns") as progress:
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                engine.ask("requests", runs=max(1, each // 10))  # wakes caches and clocks
                network[name] += engine.ask("network", runs=each)
                request[name] += engine.ask("requests", runs=each)
                progress.advance()
    return {
        name: Figures(
            *_summary(network[name]), *_summary(request[name]), *engine.memory(), round(engine.first_answer_s, 2)
        )
        for name, engine in engines.items()
    }


def _summary(samples: list[float]) -> tuple[float, float]:
    ordered = sorted(samples)
    return round(statistics.median(ordered), 3), round(ordered[len(ordered) * 9 // 10], 3)


def _row(name: str, figures: dict[str, Figures], missing: str | None, beyond: str | None) -> EngineRow:
    if missing:
        return EngineRow(name, None, missing=missing)
    own, base = figures[name], figures.get(name_of(FIRST))
    if base is None:
        return EngineRow(name, own, beyond=beyond)
    network, request = base.network_median / own.network_median, base.request_median / own.request_median
    return EngineRow(name, own, round(network, 3), round(request, 3), beyond=beyond)
