"""A server under load: more and more connections, each row beside what the engine alone can do at that moment."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.archive.reader import open_archive
from tools.bench.engine import Engine, bare_loop
from tools.bench.load import Load, LoadFailure, run_load
from tools.bench.pictures import described, given_pictures, golden_picture
from tools.bench.table import table
from tools.bench.usage import COLUMNS, Usage, columns, metered
from tools.progress import Progress
from tools.serve import ENGINES
from tools.serve.asgi.server import AsgiServer
from tools.serve.server import TorchServe

SERVERS = dict(zip(ENGINES, (TorchServe, AsgiServer), strict=True))


@dataclass(frozen=True)
class Target:
    """What answers pictures. url: of a model's predictions. pid: of the server's first process, None for a server of
    others."""

    url: str
    token: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class Measured:
    """usage: of the server's processes during the load; empty for a server of others."""

    load: Load
    usage: list[Usage]


@dataclass(frozen=True)
class Row:
    """One number of connections. bare: pictures a second of the engine in a plain loop, taken just before, for the ways
    to run it. failure: why there is nothing else."""

    connections: int
    measured: Measured | None
    bare: dict[str, float]
    failure: str | None = None


@dataclass(frozen=True)
class ServeReport:
    server: str
    pictures: list[str]
    seconds: int
    rows: list[Row]

    @property
    def failures(self) -> list[str]:
        return [row.failure for row in self.rows if row.failure]

    def as_table(self) -> str:
        ways = list(self.rows[0].bare)
        header = ["connections", "images/s", *(f"of {way}" for way in ways), "p50 ms", "p90", "p99", *COLUMNS]
        rows = [self._cells(row) for row in self.rows]
        lines = [f"{self.server}, {self.seconds} s a row", *(f"picture: {picture}" for picture in self.pictures), ""]
        return "\n".join(lines + table(header, rows))

    def _cells(self, row: Row) -> list[str]:
        if row.measured is None:
            return [str(row.connections), f"FAILED: {row.failure}"]
        load = row.measured.load
        return [
            str(row.connections),
            f"{load.images_per_s:.2f}",
            *(f"{load.images_per_s / loop:.3f}" for loop in row.bare.values()),
            *(f"{value:.1f}" for value in (load.p50_ms, load.p90_ms, load.p99_ms)),
            *columns(row.measured.usage, load.seconds, load.requests),
        ]

    @property
    def chart_title(self) -> str:
        return f"{self.server}: images/s"

    def as_bars(self) -> dict[str, float]:
        """For a chart: names and pictures a second."""
        bars: dict[str, float] = {}
        for row in self.rows:
            bars |= {f"{way}, before {row.connections}": loop for way, loop in row.bare.items()}
            bars[f"{row.connections} connections"] = row.measured.load.images_per_s if row.measured else 0.0
        return bars


@contextmanager
def served(archive: Path, engine: str = ENGINES[0]) -> Iterator[Target]:
    """`marina serve --engine` of one archive, on ports of its own. Raises ToolError or BadArchive when it does not come
    up."""
    with open_archive(archive) as opened:
        name = opened.name
    with tempfile.TemporaryDirectory(prefix="marina-") as store:
        (Path(store) / "served.mar").symlink_to(archive.absolute())
        with SERVERS[engine](Path(store), port=0) as server:
            yield Target(server.prediction_url(name), server.token, server.pid)


def load_target(target: Target, bodies: Sequence[bytes], connections: int, seconds: int, warmup: int) -> Measured:
    """A server under load, measured after a warm-up; both in seconds. Raises LoadFailure when an answer is not 200."""
    # What fails for more than the start fails again in the measurement.
    with suppress(LoadFailure):
        run_load(target.url, bodies, connections, warmup, target.token)
    with metered(target.pid) as usage:
        load = run_load(target.url, bodies, connections, seconds, target.token)
    return Measured(load, usage)


def serve_and_load(archive: Path, bodies: Sequence[bytes], connections: int, seconds: int, warmup: int) -> Measured:
    """An archive, served as its own settings say, under load. Raises ToolError or BadArchive with one line."""
    with served(archive) as target:
        return load_target(target, bodies, connections, seconds, warmup)


def bench_archive(
    path: Path, images: Sequence[Path], concurrency: Sequence[int], seconds: int, warmup: int, engine: str
) -> ServeReport:
    """Serve an archive by one of `SERVERS` and load it, each time beside its engine in plain loops.

    The loops: one process with all cores, and as many processes as the archive has workers, with as many threads.
    images: the pictures to send in turn; the first golden one without any. Raises ToolError or BadArchive.
    """
    with open_archive(path) as archive:
        bodies = given_pictures(images) or [golden_picture(archive)]
        title = f"{archive.name} {archive.version}"
        workers = archive.config.get("maxWorkers", len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        loops = {}
        for count in sorted({1, workers}):
            engines = [stack.enter_context(Engine(path, bodies, count)) for _ in range(count)]
            loops[f"{count} bare loop{'s' if count > 1 else ''}"] = engines
        target = stack.enter_context(served(path, engine))
        rows = _rows(target, bodies, concurrency, seconds, warmup, loops)
    return ServeReport(f"{title}, {engine}, {workers} worker(s)", [described(body) for body in bodies], seconds, rows)


def bench_url(
    target: Target, images: Sequence[Path], concurrency: Sequence[int], seconds: int, warmup: int
) -> ServeReport:
    """Load a server that runs already. Raises ToolError with one line."""
    bodies = given_pictures(images)
    rows = _rows(target, bodies, concurrency, seconds, warmup, {})
    return ServeReport(target.url, [described(body) for body in bodies], seconds, rows)


def _rows(
    target: Target,
    bodies: Sequence[bytes],
    concurrency: Sequence[int],
    seconds: int,
    warmup: int,
    loops: dict[str, list[Engine]],
) -> list[Row]:
    rows = []
    with Progress("bench serve", len(concurrency), unit="rows") as progress:
        for connections in concurrency:
            bare = {way: round(bare_loop(engines, seconds), 2) for way, engines in loops.items()}
            try:
                rows.append(Row(connections, load_target(target, bodies, connections, seconds, warmup), bare))
            except LoadFailure as error:
                rows.append(Row(connections, None, bare, str(error)))
            progress.advance()
    return rows
