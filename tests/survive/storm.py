"""Broken requests by the thousand at a real server, eight at a time, with a good one in between.

    PYTHONPATH=tests python -m survive.storm --requests 20000

Each must be answered with 2xx or 4xx and JSON, as must those after it; the worker must be the same at the end.
"""

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from survive.asks import PREDICTIONS, Ask, ask, broken_ask
from survive.pictures import drawn_picture, drawn_seeds, photographs
from survive.served import ENGINES, KINDS, MB, SHARED, Held, exchange, growth, held, memory_of, serving

from tools.client.transports import ERROR_FIELDS
from tools.serve.base import ModelServer

CONCURRENCY = 8
# Every so many requests, a good one.
GOOD_EVERY = 10
# Of what is left after the warm-up.
MOST_GROWTH = 0.02
SETTLE_S = 3.0
# In which the requests after the warm-up come; memory is looked at after each.
PARTS = 10
# TorchServe's frontend reads forms before any code of ours is asked, and calls what it cannot read its own fault. The
# engine asgi has no such exception.
FRONTENDS_FORMS = ("ErrorDataDecoderException", "StringIndexOutOfBoundsException", "IllegalArgumentException")
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
SHOWN = 20


@dataclass
class Tally:
    """answers: by status and name. frontend: those that TorchServe's frontend gave with 500, by name. wrong: what must
    not be, one line each, with the request's number."""

    answers: Counter[str] = field(default_factory=Counter)
    frontend: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Storm:
    """The requests `first` to `first + count` of a seed. keep: where those go that are answered wrongly, None for
    nowhere."""

    def __init__(self, server: ModelServer, seed: int, seeds: Sequence[bytes], keep: Path | None = None):
        self._url, self._token = server.url, server.token
        self._seed, self._seeds, self._keep = seed, seeds, keep
        self._good = ask("good", drawn_picture(), "image/jpeg", PREDICTIONS, ("Marina-Format", "detections"))
        self._expected = _without_timing(exchange(self._url, self._good.wire(self._token))[1])
        self._lock = threading.Lock()
        self.tally = Tally()

    def run(self, first: int, count: int) -> None:
        numbers = iter(range(first, first + count))
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for done in [pool.submit(self._client, numbers) for _ in range(CONCURRENCY)]:
                done.result()

    def _client(self, numbers: Iterator[int]) -> None:
        while True:
            with self._lock:
                number = next(numbers, None)
            if number is None:
                return
            if number % GOOD_EVERY == 0:
                self._ask_good(number)
            else:
                self._ask_broken(number, broken_ask(Random(f"{self._seed} {number}"), self._seeds))

    def _ask_good(self, number: int) -> None:
        try:
            status, body = exchange(self._url, self._good.wire(self._token))
            problem = None if status == 200 and _without_timing(body) == self._expected else f"{status} {body[:300]!r}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = repr(error)
        with self._lock:
            self.tally.answers["200 good"] += 1
            if problem:
                self.tally.wrong.append(f"{number} good: {problem}")

    def _ask_broken(self, number: int, broken: Ask) -> None:
        wire = broken.wire(self._token)
        try:
            status, body = exchange(self._url, wire)
            name, problem = judge(broken, status, body)
        except (OSError, http.client.HTTPException) as error:
            status, name, problem = 0, type(error).__name__, repr(error)
        with self._lock:
            if problem is None and status == 500:
                self.tally.frontend[name] += 1
            self.tally.answers[f"{status} {name}"] += 1
            if problem:
                self.tally.wrong.append(f"{number} {broken.kind}: {problem}")
        if problem and self._keep:
            (self._keep / f"{number}.request").write_bytes(broken.start + broken.rest)


def judge(broken: Ask, status: int, body: bytes) -> tuple[str, str | None]:
    """What the answer is called, and what is wrong with it, if anything."""
    if 200 <= status < 300:
        return broken.kind, None
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.keys() != ERROR_FIELDS or content["code"] != status:
        return "?", f"{status} without our JSON: {body[:300]!r}"
    name = str(content["type"])
    if status == 500 and name in FRONTENDS_FORMS and broken.content_type.startswith(FORMS):
        return name, None
    if not 400 <= status < 500:
        return name, f"{status} {name}: {content['message'][:300]!r}"
    return name, None


def _without_timing(body: bytes) -> dict[str, object]:
    content = json.loads(body)
    del content["timing_ms"]
    return dict(content)


def all_seeds() -> list[bytes]:
    """Of photographs the smaller ones, which leave time for more."""
    return [*drawn_seeds(), *(photo for photo in photographs(SHARED) if len(photo) < 100_000)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="after the warm-up (default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=int, default=4_000, help="requests before memory counts (default: %(default)s)"
    )
    parser.add_argument("--engine", choices=ENGINES, default="torchserve", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the requests that are answered wrongly")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="marina-") as folder, serving(Path(folder), engine=args.engine) as server:
        start = held(server.pid)
        storm = Storm(server, args.seed, all_seeds(), args.keep)
        began = time.monotonic()
        states = [settled(storm, server, 0, args.warm_up)]
        part = args.requests // PARTS
        states += [settled(storm, server, args.warm_up + part * number, part) for number in range(PARTS)]
        seconds = time.monotonic() - began
    print(f"{part * PARTS} requests after {args.warm_up} of warm-up, seed {args.seed}, {seconds:.0f} s")
    return report(storm.tally, start, states)


def settled(storm: Storm, server: ModelServer, first: int, count: int) -> list[Held]:
    """What the processes hold some time after those requests."""
    storm.run(first, count)
    time.sleep(SETTLE_S)
    return held(server.pid)


def report(tally: Tally, start: list[Held], states: list[list[Held]]) -> int:
    """Prints it; 1 where a line of "must hold" does not. states: after the warm-up, and after each part of the rest."""
    for name, count in sorted(tally.answers.items()):
        print(f"  {count:6}  {name}")
    if tally.frontend:
        print(f"TorchServe's own frontend refused with 500: {tally.frontend.total()} forms that it could not read")
    for line in tally.wrong[:SHOWN]:
        print(f"WRONG  {line}")
    same = {one.pid for one in start} == {one.pid for one in states[-1]}
    print(
        f"{'ok    ' if not tally.wrong else 'FAILED'} {len(tally.wrong)} requests were answered wrongly, or not at all"
    )
    print(f"{'ok    ' if same else 'FAILED'} the processes are {'the same' if same else 'others'}")
    grown = max(growth(states, name) for name in KINDS)
    for name in KINDS:
        course = " ".join(f"{memory_of(state, name) / MB:.0f}" for state in (start, *states))
        print(f"       {name}: MB at the start, warm, and after each part: {course} ({growth(states, name):+.2%})")
    print(f"{'ok    ' if grown <= MOST_GROWTH else 'FAILED'} memory grew by {grown:.2%} after the warm-up")
    return int(bool(tally.wrong) or not same or grown > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
