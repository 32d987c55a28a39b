"""What is lost when a worker, or all of TorchServe, is killed under load, and how long until the next good answer.

    PYTHONPATH=tests python -m survive.chaos --minutes 3

Half of the clients are tools.client with retries: they must not lose one picture. The others ask once, over plain
HTTP: each request must get an answer or a clean 5xx; while the server itself is away, no connection is as good.
"""

import argparse
import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from survive.asks import MODEL, ask
from survive.pictures import drawn_picture
from survive.served import exchange, serving, workers, write_store

from tools.client import Client
from tools.client.errors import ServerError
from tools.client.transports import ERROR_FIELDS, WRONG_KEY, read_token

CLIENTS = 8
EVERY_S = 20
BACK_S = 10.0
# With another worker beside the one that is killed.
AT_ONCE_S = 2.0
# For the retrying clients: more than a start of the server on a busy machine takes.
PATIENCE_S = 120
RETRIES = 60
# Of those that ask once, where there was no connection.
PAUSE_S = 0.05
START_S = 180
PARTS = ("one-worker", "two-workers", "server")
SHOWN = 10


@dataclass(frozen=True)
class Reply:
    """began, ended: seconds of the monotonic clock. status: 0 where the connection broke or was refused."""

    began: float
    ended: float
    status: int
    told: str = ""


@dataclass
class Load:
    """What `CLIENTS` clients, half of them with retries, have met. lost: of those with retries."""

    replies: list[Reply] = field(default_factory=list)
    retried: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def load(url: str, token: str | Path | None) -> Iterator[Load]:
    """Until the block ends. Every client waits for its answer before it asks again. token: or the file that holds it,
    of a server that is started again meanwhile."""
    found, over, lock = Load(), threading.Event(), threading.Lock()
    picture = drawn_picture()
    good = ask("good", picture, "image/jpeg")

    def once() -> None:
        while not over.is_set():
            known = read_token(token) if isinstance(token, Path) else token
            began = time.monotonic()
            try:
                status, body = exchange(url, good.wire(known))
                told = "" if status == 200 else body.decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                status, told = 0, repr(error)
                time.sleep(PAUSE_S)
            with lock:
                found.replies.append(Reply(began, time.monotonic(), status, told))

    def patiently() -> None:
        with Client(url, MODEL, token=token, retries=RETRIES, timeout=PATIENCE_S) as client:
            while not over.is_set():
                try:
                    client.predict(picture)
                except ServerError as error:
                    with lock:
                        found.lost.append(str(error))
                with lock:
                    found.retried += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(once if number % 2 else patiently) for number in range(CLIENTS)]
        try:
            yield found
        finally:
            over.set()
    for client in running:
        client.result()


def unclean(replies: Sequence[Reply], away: bool) -> list[Reply]:
    """Those that were neither answered nor refused with a 5xx in our form. away: the server itself is killed, so that
    no connection is clean too, and a token refused, which for a moment is the one before."""
    return [reply for reply in replies if not _is_clean(reply, away)]


def _is_clean(reply: Reply, away: bool) -> bool:
    if reply.status == 0:
        return away
    if reply.status == 200:
        return True
    try:
        content = json.loads(reply.told)
    except ValueError:
        return False
    right = content.keys() == ERROR_FIELDS
    return right and (500 <= reply.status < 600 or (away and content["type"] == WRONG_KEY))


def back_after(replies: Sequence[Reply], killed: float) -> float | None:
    """Seconds from a kill to the first good answer of a request that was sent after it."""
    return min(
        (reply.ended - killed for reply in replies if reply.status == 200 and reply.began > killed), default=None
    )


def kill_again_and_again(kill: Callable[[], None], kills: int) -> list[float]:
    """When they were, `EVERY_S` apart, and as much time after the last one."""
    times = []
    for _ in range(kills):
        times.append(time.monotonic())
        kill()
        time.sleep(EVERY_S)
    return times


def kill_a_worker(pid: int) -> None:
    """The oldest one of the JVM `pid`, if there is one just now."""
    found = sorted(workers(pid), key=psutil.Process.create_time)
    if found:
        found[0].kill()


@dataclass(frozen=True)
class Supervised:
    """`marina serve --supervise` in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    token_file: Path

    def kill_the_server(self) -> None:
        """The JVM alone, as the system would when it runs out of memory."""
        for child in psutil.Process(self.process.pid).children():
            child.kill()


@contextmanager
def supervised(folder: Path) -> Iterator[Supervised]:
    store, token = write_store(folder), folder / "token"
    command = [sys.executable, "-m", "tools.cli", "serve", "--supervise", "--port", "0"]
    command += ["--store", str(store), "--token-file", str(token)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"(http://[\d.:]+)/predictions/", line):
                # Read on, so that it never waits for us.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield Supervised(process, found[1], token)
                return
        raise RuntimeError(f"it does not start: {(folder / 'log').read_text()}")
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(START_S)
        process.kill()


def chaos_of_workers(folder: Path, count: int, kills: int) -> bool:
    with serving(folder, workers=count) as server, load(server.url, server.token) as found:
        times = kill_again_and_again(lambda: kill_a_worker(server.pid), kills)
    return report(
        f"{count} worker{'s' if count > 1 else ''}, one killed", found, times, AT_ONCE_S if count > 1 else BACK_S
    )


def chaos_of_the_server(folder: Path, kills: int) -> bool:
    with supervised(folder) as served, load(served.url, served.token_file) as found:
        times = kill_again_and_again(served.kill_the_server, kills)
    return report("TorchServe killed under --supervise", found, times, BACK_S, away=True)


def report(what: str, found: Load, times: Sequence[float], within: float, away: bool = False) -> bool:
    """Prints it; whether all that must hold does."""
    bad, backs = unclean(found.replies, away), [back_after(found.replies, killed) for killed in times]
    statuses = Counter(str(reply.status or "no connection") for reply in found.replies)
    in_time = all(back is not None and back <= within for back in backs)
    print(f"{what} {len(times)} times, every {EVERY_S} s, {CLIENTS} clients")
    print(f"  asked once: {', '.join(f'{count} x {status}' for status, count in sorted(statuses.items()))}")
    print(f"  with retries: {found.retried} pictures, {len(found.lost)} lost")
    shown = ", ".join("never" if back is None else f"{back:.2f}" for back in backs)
    print(f"  seconds from each kill to the first good answer: {shown}")
    for line in [*found.lost, *(f"{reply.status} {reply.told}" for reply in bad)][:SHOWN]:
        print(f"WRONG  {line}")
    print(f"{'ok    ' if not bad else 'FAILED'} every request got an answer or a clean 5xx")
    print(f"{'ok    ' if not found.lost else 'FAILED'} clients with retries lost none")
    print(
        f"{'ok    ' if in_time else 'FAILED'} the first good answer came within {within:.0f} s of each kill", flush=True
    )
    return not bad and not found.lost and in_time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="of each of the three parts (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    args = parser.parse_args()
    kills = max(1, round(args.minutes * 60 / EVERY_S))
    good = []
    for part in args.part:
        with tempfile.TemporaryDirectory(prefix="marina-") as folder:
            if part == "server":
                good.append(chaos_of_the_server(Path(folder), kills))
            else:
                good.append(chaos_of_workers(Path(folder), PARTS.index(part) + 1, kills))
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
