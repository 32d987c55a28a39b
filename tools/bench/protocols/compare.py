"""All ways in to one model, with the same pictures, in rounds by turns."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import httpx
import numpy as np
import torch

from handlers.errors import MarinaError
from handlers.options import default_options
from handlers.settings import Settings, parse_settings
from tools.archive.reader import open_archive
from tools.bench.pictures import given_pictures
from tools.bench.protocols.doors import ANSWER_S, HOST, Send
from tools.bench.protocols.gateway import gateway_before
from tools.bench.protocols.ways import Address, Found, Model, Way, all_ways
from tools.bench.table import table
from tools.errors import ToolError
from tools.progress import Progress
from tools.serve.server import TorchServe

# What a way is given to warm up, in which most send every picture. One that does not takes seconds for each, of which
# a cold server is no part that is seen.
WARM_UP_S = 10
# How far a score, or a side of a box in pixels, may lie from the server's where the client works it out.
TOLERANCE = 1e-3

COLUMNS = ("bytes out", "bytes back", "encode ms", "p50 ms", "p99 ms", "of fastest", "read ms", "pictures/s")


@dataclass(frozen=True)
class Picture:
    """name: what people call it. body: encoded."""

    name: str
    body: bytes


@dataclass(frozen=True)
class Call:
    """One picture there and back. Seconds to make the message, until the answer was there, and to read it."""

    encode_s: float
    trip_s: float
    read_s: float
    sent: int
    received: int
    found: Found


@dataclass(frozen=True)
class Turn:
    """One way with all pictures, once. seconds: from the first to the last."""

    calls: list[Call]
    seconds: float


@dataclass(frozen=True)
class Row:
    """One way over one number of connections.

    bytes_*: of the body in HTTP and of the message in gRPC, means; the heads around them, some hundred bytes, do not
    count. encode_ms, read_ms: medians of the client's own work; for tensors letterbox and suppression are in it.
    p50_ms, p99_ms: of the round trip between them. pictures_per_s: of all three, the median of the rounds.
    difference: from what the first way finds, on the first picture that has one.
    """

    way: str
    connections: int
    calls: int
    bytes_out: int
    bytes_back: int
    encode_ms: float
    p50_ms: float
    p99_ms: float
    read_ms: float
    pictures_per_s: float
    difference: str | None = None


@dataclass(frozen=True)
class ProtocolsReport:
    archive: str
    pictures: list[str]
    rounds: int
    rows: list[Row]

    @property
    def failures(self) -> list[str]:
        return [f"{row.way} differs from {self.rows[0].way}: {row.difference}" for row in self.rows if row.difference]

    def as_table(self) -> str:
        lines = [f"{self.archive}, {len(self.pictures)} pictures, {self.rounds} rounds"]
        for connections in dict.fromkeys(row.connections for row in self.rows):
            rows = [row for row in self.rows if row.connections == connections]
            fastest = min(row.p50_ms for row in rows)
            lines += ["", *table([f"{connections} at a time", *COLUMNS], [_cells(row, fastest) for row in rows])]
        return "\n".join(lines)

    @property
    def chart_title(self) -> str:
        return f"{self.archive}: pictures/s, the client's work included"

    def as_bars(self) -> dict[str, float]:
        """For a chart: names and pictures a second."""
        return {f"{row.way} ×{row.connections}": row.pictures_per_s for row in self.rows if not row.difference}


def _cells(row: Row, fastest: float) -> list[str]:
    if row.difference:
        return [row.way, f"DIFFERS: {row.difference}"]
    return [
        row.way,
        f"{row.bytes_out:,}",
        f"{row.bytes_back:,}",
        *(f"{value:.2f}" for value in (row.encode_ms, row.p50_ms, row.p99_ms, row.p50_ms / fastest)),
        *(f"{value:.2f}" for value in (row.read_ms, row.pictures_per_s)),
    ]


def bench_protocols(path: Path, images: Sequence[Path], concurrency: Sequence[int], rounds: int) -> ProtocolsReport:
    """Serve an archive behind a gateway and ask about every picture by every way.

    Raises MarinaError with one line: also when any way answers with an error, for its figures would mean nothing.
    """
    bodies = given_pictures(images)
    pictures = [Picture(image.name, body) for image, body in zip(images, bodies, strict=True)]
    with open_archive(path) as archive:
        name, version = archive.name, archive.version
        settings = parse_settings(archive.config.get("handler"))
    if settings.model.definition != "yolov5":
        raise ToolError(f"{path} holds a {settings.model.definition}, which takes no tensors; give a yolov5")
    with tempfile.TemporaryDirectory(prefix="marina-") as store:
        (Path(store) / "served.mar").symlink_to(path.absolute())
        with TorchServe(Path(store), port=0, grpc_port=0) as server, gateway_before(server, name) as gateway:
            ways = all_ways(torchserve_address(server), gateway, described_model(gateway, settings))
            rows = measure(ways, pictures, concurrency, rounds)
    return ProtocolsReport(f"{name} {version}", [picture.name for picture in pictures], rounds, rows)


def torchserve_address(server: TorchServe) -> Address:
    """Of one with gRPC and a token."""
    assert server.grpc_port is not None and server.token is not None
    return Address(server.port, server.grpc_port, server.token)


def described_model(gateway: Address, settings: Settings) -> Model:
    """As a client would learn of it, but for the thresholds, which are the archive's `settings`."""
    headers = {"Authorization": f"Bearer {gateway.token}"}
    answer = httpx.get(f"http://{HOST}:{gateway.http}/models", headers=headers, timeout=ANSWER_S, trust_env=False)
    (told,) = answer.json()["models"]
    options = default_options(settings)
    return Model(settings.name, told["labels"], options, settings.preprocess, told["input"]["stride"])


def measure(ways: Sequence[Way], pictures: Sequence[Picture], concurrency: Sequence[int], rounds: int) -> list[Row]:
    """A B C A B C …, so that a busy machine hits all alike. Raises ToolError, naming way and picture."""
    turns: dict[tuple[int, str], list[Turn]] = defaultdict(list)
    total = len(ways) * (1 + len(concurrency) * rounds)
    with _one_thread(), Progress("bench protocols", total, unit="turns") as progress:
        for way in ways:
            _warm_up(way, pictures)
            progress.advance()
        for connections in concurrency:
            for _ in range(rounds):
                for way in ways:
                    turns[connections, way.name].append(_turn(way, pictures, connections))
                    progress.advance()
    expected = [call.found for call in turns[concurrency[0], ways[0].name][0].calls]
    return [
        _row(way, connections, turns[connections, way.name], pictures, expected)
        for connections in concurrency
        for way in ways
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """For torch in this process: it shares the cores with the server, on which idle threads of its own would spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warm_up(way: Way, pictures: Sequence[Picture]) -> None:
    deadline = time.monotonic() + WARM_UP_S
    with way.door.open(1) as (send,):
        for picture in pictures:
            _ask(way, send, picture)
            if time.monotonic() > deadline:
                return


def _turn(way: Way, pictures: Sequence[Picture], connections: int) -> Turn:
    free: SimpleQueue[Send] = SimpleQueue()

    def ask(picture: Picture) -> Call:
        send = free.get()
        try:
            return _ask(way, send, picture)
        finally:
            free.put(send)

    with way.door.open(connections) as senders, ThreadPoolExecutor(connections) as pool:
        for send in senders:
            # What a connection costs at its first question is paid once in its life.
            _ask(way, send, pictures[0])
            free.put(send)
        began = time.perf_counter()
        calls = list(pool.map(ask, pictures))
        return Turn(calls, time.perf_counter() - began)


def _ask(way: Way, send: Send, picture: Picture) -> Call:
    try:
        began = time.perf_counter()
        message, read = way.ask(picture.body)
        encoded = time.perf_counter()
        answer = send(message)
        answered = time.perf_counter()
        found = read(answer)
        done = time.perf_counter()
    except MarinaError as error:
        raise ToolError(f"{way.name}, {picture.name}: {error}") from error
    return Call(encoded - began, answered - encoded, done - answered, len(message.body), len(answer), found)


def _row(
    way: Way, connections: int, turns: Sequence[Turn], pictures: Sequence[Picture], expected: Sequence[Found]
) -> Row:
    calls = [call for turn in turns for call in turn.calls]
    trips = [1000 * call.trip_s for call in calls]
    return Row(
        way=way.name,
        connections=connections,
        calls=len(calls),
        bytes_out=round(statistics.mean(call.sent for call in calls)),
        bytes_back=round(statistics.mean(call.received for call in calls)),
        encode_ms=round(statistics.median(1000 * call.encode_s for call in calls), 3),
        p50_ms=round(statistics.median(trips), 3),
        p99_ms=round(float(np.percentile(trips, 99)), 3),
        read_ms=round(statistics.median(1000 * call.read_s for call in calls), 3),
        pictures_per_s=round(statistics.median(len(turn.calls) / turn.seconds for turn in turns), 2),
        difference=next(_differences(way, turns, pictures, expected), None),
    )


def _differences(
    way: Way, turns: Sequence[Turn], pictures: Sequence[Picture], expected: Sequence[Found]
) -> Iterator[str]:
    for turn in turns:
        for picture, wanted, call in zip(pictures, expected, turn.calls, strict=True):
            problem = difference(wanted, call.found, TOLERANCE if way.tensor else 0)
            if problem:
                yield f"{picture.name}: {problem}"


def difference(expected: Found, found: Found, tolerance: float) -> str | None:
    """The first detection that is another. tolerance: of a score, and of a side of a box in pixels."""
    if len(expected) != len(found):
        return f"{len(found)} detections in place of {len(expected)}"
    for wanted, seen in zip(expected, found, strict=True):
        pairs = zip((wanted.score, *wanted.box), (seen.score, *seen.box), strict=True)
        near = all(abs(a - b) <= tolerance for a, b in pairs)
        if not near or (wanted.label, wanted.index) != (seen.label, seen.index):
            return f"{seen.to_json()} in place of {wanted.to_json()}"
    return None
