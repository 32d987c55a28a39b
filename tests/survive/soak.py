"""A server at full load for minutes on end: does it grow, does it get slow?

    PYTHONPATH=tests python -m survive.soak --minutes 20

Needs wrk. A minute of warm-up does not count, since allocators and the JVM's compiler then still grow.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from survive.pictures import drawn_picture, photographs
from survive.served import KINDS, MB, SHARED, Held, growth, held, serving

from tools.bench.load import run_load
from tools.serve.base import ModelServer

CONNECTIONS = 8
MINUTE_S = 60
MOST_GROWTH = 0.02
MOST_SLOWER = 0.20


@dataclass(frozen=True)
class Minute:
    images_per_s: float
    p50_ms: float
    p99_ms: float
    held: list[Held]


def one_minute(server: ModelServer, bodies: list[bytes]) -> Minute:
    load = run_load(server.prediction_url(server.archives[0].name), bodies, CONNECTIONS, MINUTE_S, server.token)
    return Minute(load.images_per_s, load.p50_ms, load.p99_ms, held(server.pid))


def line(name: str, minute: Minute) -> str:
    figures = f"{minute.images_per_s:7.1f}/s  p50 {minute.p50_ms:6.1f} ms  p99 {minute.p99_ms:6.1f} ms"
    processes = [f"{one.name} {one.memory / MB:.1f} MB {one.descriptors} descriptors" for one in minute.held]
    return "  ".join((f"{name:>7}", figures, *processes))


def verdicts(minutes: list[Minute]) -> list[tuple[bool, str]]:
    first, last = minutes[0], minutes[-1]
    lines = [
        (grown <= MOST_GROWTH, f"memory of the {name} grew by {grown:.2%}")
        for name in KINDS
        for grown in [growth([minute.held for minute in minutes], name)]
    ]
    before, after = (sum(one.descriptors for one in minute.held) for minute in (first, last))
    lines.append((after <= before, f"descriptors: {before} after the first minute, {after} after the last"))
    same = {one.pid for one in first.held} == {one.pid for one in last.held}
    lines.append((same, f"the processes are {'the same' if same else 'others'}"))
    slower = last.p99_ms / first.p99_ms - 1
    lines.append((slower <= MOST_SLOWER, f"p99 of the last minute is {slower:+.1%} of the first's"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=20, help="after the one of warm-up (default: %(default)s)")
    args = parser.parse_args()
    if args.minutes < 2:
        parser.error(f"--minutes {args.minutes}: there are none to compare; give 2 or more")
    bodies = [drawn_picture(), *photographs(SHARED)]
    with tempfile.TemporaryDirectory(prefix="marina-") as folder, serving(Path(folder)) as server:
        print(line("warm-up", one_minute(server, bodies)), flush=True)
        minutes = []
        for number in range(1, args.minutes + 1):
            minutes.append(one_minute(server, bodies))
            print(line(str(number), minutes[-1]), flush=True)
    found = verdicts(minutes)
    for good, text in found:
        print(f"{'ok    ' if good else 'FAILED'} {text}")
    return int(not all(good for good, _ in found))


if __name__ == "__main__":
    sys.exit(main())
