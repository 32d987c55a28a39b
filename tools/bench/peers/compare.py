"""Ours beside the peers: same weights, same pictures, same cores, in rounds by turns."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from handlers.errors import MarinaError
from handlers.labels import load_labels
from handlers.settings import Response, Runtime
from tools.archive.recipe import Recipe, Serving, load_recipe
from tools.bench.engines import build_variant, name_of, variant
from tools.bench.peers.network import write_network
from tools.bench.peers.start import OTHERS, STOCK, STOCK_THREADS, detections, peer, stock
from tools.bench.pictures import described, given_pictures
from tools.bench.serve import SERVERS, Measured, Target, load_target, served
from tools.bench.table import table
from tools.bench.usage import COLUMNS, columns
from tools.errors import ToolError
from tools.progress import Progress


@dataclass(frozen=True)
class Ours:
    """One of our archives. shape: of what its network sees. engines: what serves it, of `marina serve`."""

    runtime: Runtime
    shape: str
    engines: tuple[str, ...] = ("torchserve",)

    @property
    def names(self) -> dict[str, str]:
        """What it is called under each engine."""
        name = f"marina, {name_of(self.runtime)} {self.shape}"
        return {engine: name if engine == "torchserve" else f"{name}, {engine}" for engine in self.engines}


ONNX = Runtime("onnx")
OURS = (
    Ours(ONNX, "square", tuple(SERVERS)),
    Ours(Runtime("openvino", "fp32", "fixed"), "square"),
    Ours(Runtime("openvino", "bf16", "fixed"), "square"),
    Ours(Runtime("openvino", "int8", "fixed"), "square"),
    Ours(ONNX, "rect", tuple(SERVERS)),
    Ours(Runtime("openvino", "fp32"), "rect"),
    Ours(Runtime("openvino", "bf16"), "rect"),
    Ours(Runtime("openvino", "int8"), "rect"),
)
# Between resizers, scores and places differ a little: clear detections must be found by all of one shape, at nearly the
# same place. Int8 is judged by its mAP, at build; here it must find the same things.
CLEAR_SCORE = 0.35


@dataclass(frozen=True)
class Tolerance:
    score: float
    iou: float


FLOAT = Tolerance(0.06, 0.9)
INT8 = Tolerance(0.25, 0.8)


@dataclass(frozen=True)
class Contender:
    """Something to start and load. shape: of what its network sees; those of one shape must answer alike."""

    name: str
    start: Callable[[], AbstractContextManager[Target]]
    shape: str = "square"
    tolerance: Tolerance = FLOAT


@dataclass(frozen=True)
class PeerRow:
    """One contender and what it did in every round. missing: why it cannot take part here. failure: why it
    was put out."""

    name: str
    rounds: list[Measured]
    first_answer_s: float | None = None
    missing: str | None = None
    failure: str | None = None

    @property
    def images_per_s(self) -> float:
        """The median of the rounds; 0 for one that was put out."""
        if self.failure or not self.rounds:
            return 0.0
        return statistics.median(each.load.images_per_s for each in self.rounds)


@dataclass(frozen=True)
class PeersReport:
    recipe: str
    pictures: list[str]
    connections: int
    seconds: int
    rounds: int
    rows: list[PeerRow]

    @property
    def failures(self) -> list[str]:
        return [f"{row.name}: {row.failure}" for row in self.rows if row.failure]

    def as_table(self) -> str:
        header = [
            "server",
            "images/s",
            "by best stock",
            "by best peer",
            "p50 ms",
            "p90",
            "p99",
            *COLUMNS,
            "first answer s",
        ]
        lines = [
            f"{self.recipe}, {self.connections} connections, medians of {self.rounds} rounds of {self.seconds} s",
            *(f"picture: {picture}" for picture in self.pictures),
            "",
        ]
        stock = self._rate(lambda name: name in (STOCK, STOCK_THREADS))
        best = self._rate(lambda name: name in OTHERS)
        return "\n".join(lines + table(header, [_cells(row, (stock, best)) for row in self.rows]))

    def _rate(self, wanted: Callable[[str], bool]) -> float:
        return max((row.images_per_s for row in self.rows if wanted(row.name)), default=0.0)

    @property
    def chart_title(self) -> str:
        return f"{self.recipe}: images/s over {self.connections} connections"

    def as_bars(self) -> dict[str, float]:
        """For a chart: names and pictures a second."""
        return {row.name: row.images_per_s for row in self.rows if row.images_per_s}


def _cells(row: PeerRow, bases: Sequence[float]) -> list[str]:
    if row.failure:
        return [row.name, f"FAILED: {row.failure}"]
    if not row.rounds:
        return [row.name, f"left out: {row.missing}"]
    middle = sorted(row.rounds, key=lambda each: each.load.images_per_s)[len(row.rounds) // 2]
    latencies = ((each.load.p50_ms, each.load.p90_ms, each.load.p99_ms) for each in row.rounds)
    return [
        row.name,
        f"{row.images_per_s:.2f}",
        *(f"{row.images_per_s / base:.2f}" if base else "–" for base in bases),
        *(f"{statistics.median(values):.0f}" for values in zip(*latencies, strict=True)),
        *columns(middle.usage, middle.load.seconds, middle.load.requests),
        f"{row.first_answer_s:.1f}",
    ]


def bench_peers(
    path: Path,
    weights: Path | None,
    calibration: Path | None,
    images: Sequence[Path],
    connections: int,
    seconds: int,
    warmup: int,
    rounds: int,
) -> PeersReport:
    """Start every contender, see that all give equal answers, then load one after the other, round by round.

    Raises MarinaError with one line for what concerns all; who is not installed or differs is a row that says why.
    """
    recipe = load_recipe(path)
    if recipe.model.definition != "yolov5":
        raise ToolError(f"{path} is a {recipe.model.definition}; the peers are written for yolov5, take such a recipe")
    bodies = given_pictures(images)
    missing: dict[str, str] = {}
    failures: dict[str, str] = {}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="marina-") as folder, ExitStack() as stack:
        contenders = _contenders(recipe, weights, calibration, bodies[0], Path(folder), missing)
        targets = _start(contenders, bodies, stack, first, failures)
        measured = _load_by_turns(targets, bodies, connections, seconds, warmup, rounds, failures)
    rows = [
        PeerRow(name, measured.get(name, []), first.get(name), missing.get(name), failures.get(name))
        for name in [STOCK, STOCK_THREADS, *OTHERS, *(name for ours in OURS for name in ours.names.values())]
    ]
    return PeersReport(recipe.name, [described(body) for body in bodies], connections, seconds, rounds, rows)


def _start(
    contenders: Sequence[Contender],
    bodies: Sequence[bytes],
    stack: ExitStack,
    first: dict[str, float],
    failures: dict[str, str],
) -> dict[str, Target]:
    """All that come up and answer as the first of their shape. first: takes the seconds to each one's first answer."""
    targets: dict[str, Target] = {}
    expected: dict[str, list[list[dict[str, Any]]]] = {}
    with Progress("starting", len(contenders), unit="servers") as progress:
        progress.show()
        for contender in contenders:
            began = time.monotonic()
            try:
                target = stack.enter_context(contender.start())
                answers = [detections(target, body) for body in bodies]
                first[contender.name] = round(time.monotonic() - began, 2)
                check_equal(expected.setdefault(contender.shape, answers), answers, contender.tolerance)
                targets[contender.name] = target
            except MarinaError as error:
                failures[contender.name] = str(error)
            progress.advance()
    return targets


def _load_by_turns(
    targets: dict[str, Target],
    bodies: Sequence[bytes],
    connections: int,
    seconds: int,
    warmup: int,
    rounds: int,
    failures: dict[str, str],
) -> dict[str, list[Measured]]:
    """A B C A B C …, so that a busy machine hits all alike."""
    measured: dict[str, list[Measured]] = {name: [] for name in targets}
    with Progress("load", rounds * len(targets), unit="turns") as progress:
        progress.show()
        for _ in range(rounds):
            for name, target in targets.items():
                if name not in failures:
                    try:
                        measured[name].append(load_target(target, bodies, connections, seconds, warmup))
                    except ToolError as error:
                        failures[name] = str(error)
                progress.advance()
    return measured


def _contenders(
    recipe: Recipe,
    weights: Path | None,
    calibration: Path | None,
    body: bytes,
    folder: Path,
    missing: dict[str, str],
) -> list[Contender]:
    """All that can be started. Every one has as many workers as there are cores, with a thread each."""
    cores = len(os.sched_getaffinity(0))
    serving = Serving(min_workers=cores, max_workers=cores, batch_size=1, max_batch_delay_ms=1, device="cpu")
    changes: dict[str, Any] = {"serving": serving, "response": Response("detections")}
    plain = build_variant(variant(recipe, Runtime(), **changes), folder / "plain.mar", weights, None).path
    settings = {
        "size": recipe.preprocess.size,
        "labels": load_labels(recipe.beside(recipe.labels)),
        "score_threshold": recipe.postprocess.score_threshold,
        "iou_threshold": recipe.postprocess.iou_threshold,
        "args": recipe.model.args,
        "workers": cores,
        "threads": 1,
    }
    contenders = [
        Contender(STOCK, partial(stock, plain, settings | {"threads": None}, body)),
        Contender(STOCK_THREADS, partial(stock, plain, settings, body)),
    ]
    ours = []
    with Progress("building", len(OURS), unit="archives") as progress:
        progress.show()
        for number, each in enumerate(OURS):
            tried = variant(recipe, each.runtime, each.shape, **changes)
            try:
                built = build_variant(tried, folder / f"{number}.mar", weights, calibration).path
                tolerance = INT8 if each.runtime.precision == "int8" else FLOAT
                ours += [
                    Contender(name, partial(served, built, engine), each.shape, tolerance)
                    for engine, name in each.names.items()
                ]
            except MarinaError as error:
                missing |= dict.fromkeys(each.names.values(), str(error))
            progress.advance()
    network = folder / "network.onnx"
    write_network(plain, network)
    for name in OTHERS:
        if find_spec(name) is None:
            missing[name] = f"{name} is not installed; pip install '.[bench]'"
        else:
            contenders.append(Contender(name, partial(peer, name, network, settings, body)))
    return contenders + ours


def check_equal(
    expected: Sequence[Sequence[dict[str, Any]]],
    found: Sequence[Sequence[dict[str, Any]]],
    tolerance: Tolerance = FLOAT,
) -> None:
    """Raises ToolError when a clear detection of one is not among those of the other."""
    for number, (ones, others) in enumerate(zip(expected, found, strict=True), start=1):
        for what, some, among in (("missing", ones, others), ("unexpected", others, ones)):
            for each in some:
                if each["score"] >= CLEAR_SCORE and not any(_same(each, other, tolerance) for other in among):
                    box = [round(value) for value in each["box"]]
                    raise ToolError(
                        f"picture {number} gets another answer than from the first server: {what}"
                        f" {each['label']} {each['score']:.2f} {box}"
                    )


def _same(one: dict[str, Any], other: dict[str, Any], tolerance: Tolerance) -> bool:
    (x1, y1, x2, y2), (u1, v1, u2, v2) = one["box"], other["box"]
    shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
    iou = shared / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared)
    near = abs(one["score"] - other["score"]) <= tolerance.score and iou >= tolerance.iou
    return near and one["label"] == other["label"]
