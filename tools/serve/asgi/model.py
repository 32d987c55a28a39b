"""One served archive: its worker processes, and the requests that wait for them.

A request goes to the worker that has least to do, which may hold one batch more than it works at. Where a worker dies,
another is started, and what it was asked goes to the next one, once; what dies twice is answered with 500.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import socketpair
from typing import Any, NamedTuple, cast

from tools.serve.asgi.counters import HOSTNAME, Counters
from tools.serve.asgi.reply import Refusal, Reply
from tools.serve.asgi.wire import Frames, pack
from tools.serve.log import python_error

# Where our own modules lie; a worker looks for others in its archive first.
SOURCE = Path(__file__).resolve().parents[3]
# The network's threads and the one that decodes share the cores: those that wait must sleep, not spin.
WAITING = {"OMP_WAIT_POLICY": "passive"}
LOOK_S = 0.5
LONGEST_PAUSE_S = 30
# For the last lines of a worker that has ended.
SETTLE_S = 2
KEPT_LINES = 200


class Settings(NamedTuple):
    """Of one archive. folder: extracted. config: the name of its model-config.yaml. gpus: the ordinal of each worker.
    start_s, answer_s: how long a worker may take to come up, and to answer. batch_delay, in seconds too."""

    name: str
    version: str
    folder: str
    config: str
    gpus: list[int | None]
    batch_size: int
    batch_delay: float
    queue_size: int
    start_s: float
    answer_s: float


@dataclass(eq=False)
class Asked:
    """A request on its way. sent: when a worker got it. deaths: of workers that had it."""

    head: dict[str, Any]
    body: bytes
    reply: asyncio.Future[Reply]
    began: float
    sent: float = 0.0
    deaths: int = 0

    def refuse(self, refusal: Refusal) -> None:
        self.answer(refusal.reply)

    def answer(self, reply: Reply) -> None:
        # It is done where its client has gone.
        if not self.reply.done():
            self.reply.set_result(reply)


@dataclass(eq=False)
class Worker(asyncio.Protocol):
    """One process, and its side of the socket pair."""

    model: "Model"
    slot: int
    process: subprocess.Popen[bytes]
    began: float
    ready: bool = False
    # When it has answered last.
    progress: float = 0.0
    outstanding: dict[int, Asked] = field(default_factory=dict)
    lines: "Lines" = field(default_factory=lambda: Lines(""))
    _frames: Frames = field(default_factory=Frames)
    _transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is no asyncio.Transport by its class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for head, body in self._frames.feed(data):
            self.model.take(self, head, body)

    def connection_lost(self, error: Exception | None) -> None:
        self.model.lost(self)

    def send(self, number: int, asked: Asked) -> None:
        assert self._transport is not None
        asked.sent = time.monotonic()
        self.outstanding[number] = asked
        self._transport.writelines([pack({"id": number, **asked.head}, len(asked.body)), asked.body])

    def stuck_since(self) -> float | None:
        """Since when its oldest request has been waiting for nothing but this worker."""
        oldest = next(iter(self.outstanding.values()), None)
        return max(oldest.sent, self.progress) if oldest else None


class Lines(asyncio.Protocol):
    """What a worker prints: shown with its name, the last lines kept. closed: set when it prints no more."""

    def __init__(self, name: str):
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        self.closed = asyncio.Event()
        self._name = name
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self.kept.append(line.decode(errors="replace"))
            print(f"{self._name}: {self.kept[-1]}", flush=True)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()

    def error(self) -> str:
        """Why it ended, as far as it said so."""
        return python_error(self.kept) or (f"its last line: {self.kept[-1]}" if self.kept else "no error was printed")


class Model:
    """fail: called with one line when a worker does not come up at the first start."""

    def __init__(self, settings: Settings, counters: Counters, fail: Callable[[str], None]):
        self.settings = settings
        self._counters = counters
        self._fail = fail
        self._workers: list[Worker] = []
        self._waiting: deque[Asked] = deque()
        self._places = settings.queue_size + 2 * settings.batch_size * len(settings.gpus)
        self._number = 0
        # Failed starts in a row, of each worker; -1 before the first has succeeded.
        self._failures = [-1] * len(settings.gpus)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def key(self) -> str:
        return f"{self.settings.name}_{self.settings.version}"

    @property
    def is_up(self) -> bool:
        return any(worker.ready for worker in self._workers)

    async def start(self) -> None:
        for slot in range(len(self.settings.gpus)):
            await self._start_worker(slot)
        self._run(self._look())

    def close(self) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        for worker in self._workers:
            worker.process.kill()

    @contextmanager
    def place(self) -> Iterator[None]:
        """For one request, from before its body is read. Raises Refusal when there is none, or nobody to answer."""
        if not self.is_up and any(failures > 0 for failures in self._failures):
            raise self._down()
        if self._places == 0:
            raise Refusal(
                503,
                "ServiceUnavailableException",
                f"model {self.settings.name!r} has as many requests as it takes, none is taken now; try again",
                retry_after=1,
            )
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    async def ask(self, head: dict[str, Any], body: bytes) -> Reply:
        """head: `headers`, `query` and `request_id`, as tools.serve.asgi.worker takes them. Returns what a worker, or
        its end, made of it."""
        asked = Asked(head, body, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(asked)
        self._dispatch()
        return await asked.reply

    def take(self, worker: Worker, head: dict[str, Any], body: bytes) -> None:
        """A frame from `worker`."""
        if "id" in head:
            worker.progress = time.monotonic()
            # One that was too late for its client is no longer there.
            if asked := worker.outstanding.pop(head["id"], None):
                self._count(asked, worker.progress)
                asked.answer(Reply(head["status"], head["type"], body))
            self._dispatch()
        elif "counter" in head:
            self._counters.add(head["counter"], head["amount"], head["labels"] | {"Hostname": HOSTNAME})
        else:
            worker.ready = True
            self._failures[worker.slot] = 0
            print(f"worker {worker.process.pid} of {self.key} is up", flush=True)
            self._dispatch()

    def lost(self, worker: Worker) -> None:
        """The process of `worker` has ended, or closed its side."""
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        if self._closing:
            return
        if worker.ready:
            print(f"worker {worker.process.pid} of {self.key} died; another is started", flush=True)
        for asked in reversed(worker.outstanding.values()):
            self._ask_again(asked)
        self._run(self._replace(worker))
        self._dispatch()

    def _down(self) -> Refusal:
        name = self.settings.name
        return Refusal(503, "ServiceUnavailableException", f"no worker of model {name!r} comes up now; try again", 5)

    def _ask_again(self, asked: Asked) -> None:
        asked.deaths += 1
        if asked.deaths < 2:
            self._waiting.appendleft(asked)
            return
        asked.refuse(
            Refusal(500, "WorkerDied", "two workers have died while they had this request; the server's log tells more")
        )

    async def _replace(self, worker: Worker) -> None:
        first = self._failures[worker.slot] < 0
        if first:
            with suppress(TimeoutError):
                await asyncio.wait_for(worker.lines.closed.wait(), SETTLE_S)
            name = f"{self.settings.name} {self.settings.version}"
            self._fail(f"{name}: its worker failed to start: {worker.lines.error()}")
            return
        if not worker.ready:
            self._failures[worker.slot] += 1
        failures = self._failures[worker.slot]
        if failures:
            pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_S)
            print(f"{self.key}: a worker failed to start: {worker.lines.error()}; once more in {pause:g} s", flush=True)
            while self._waiting and not self.is_up:
                self._waiting.popleft().refuse(self._down())
            await asyncio.sleep(pause)
        await self._start_worker(worker.slot)

    async def _start_worker(self, slot: int) -> None:
        ours, theirs = socketpair()
        own = self.settings
        given: dict[str, Any] = {"config": own.config, "name": own.name, "gpu": own.gpus[slot]}
        given |= {"batch_size": own.batch_size, "batch_delay": own.batch_delay}
        command = [sys.executable, "-P", "-m", "tools.serve.asgi.worker", str(theirs.fileno()), json.dumps(given)]
        with theirs:
            process = subprocess.Popen(
                command,
                cwd=own.folder,
                env=WAITING | os.environ | {"PYTHONPATH": os.pathsep.join([own.folder, str(SOURCE)])},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        worker = Worker(self, slot, process, time.monotonic(), lines=Lines(self.key))
        self._workers.append(worker)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: worker.lines, process.stdout)
        await loop.create_unix_connection(lambda: worker, sock=ours)

    def _dispatch(self) -> None:
        room = 2 * self.settings.batch_size
        while self._waiting:
            free = [worker for worker in self._workers if worker.ready and len(worker.outstanding) < room]
            if not free:
                return
            self._number += 1
            min(free, key=lambda worker: len(worker.outstanding)).send(self._number, self._waiting.popleft())

    async def _look(self) -> None:
        """End what takes too long."""
        own = self.settings
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for worker in self._workers:
                since = worker.stuck_since()
                if not worker.ready and now - worker.began > own.start_s:
                    print(f"worker {worker.process.pid} of {self.key} was not up within {own.start_s:g} s", flush=True)
                    worker.process.kill()
                elif since is not None and now - since > own.answer_s:
                    self._end_stuck(worker, now)
            while self._waiting and now - self._waiting[0].began > own.start_s + own.answer_s:
                self._waiting.popleft().refuse(
                    Refusal(503, "ServiceUnavailableException", f"no worker of {own.name!r} was free in time", 1)
                )

    def _end_stuck(self, worker: Worker, now: float) -> None:
        late = [n for n, asked in worker.outstanding.items() if now - asked.sent > self.settings.answer_s]
        for number in late:
            worker.outstanding.pop(number).refuse(
                Refusal(500, "WorkerTimeout", f"no answer within {self.settings.answer_s:g} s; the worker was ended")
            )
        worker.process.kill()

    def _count(self, asked: Asked, now: float) -> None:
        labels = {"model_name": self.settings.name, "model_version": self.settings.version, "hostname": HOSTNAME}
        for name, seconds in (("queue", asked.sent - asked.began), ("inference", now - asked.began)):
            self._counters.add(f"ts_{name}_latency_microseconds", round(seconds * 1e6), labels)
        self._counters.add("ts_inference_requests_total", 1, labels)

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
