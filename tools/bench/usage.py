"""CPU and memory of a server: of the process that was started, and of those that it started."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from tools.errors import ToolError

MB = 1_000_000


@dataclass(frozen=True)
class Usage:
    """name: `front` for the first process, `worker` for each that it started. cpu_seconds: user and system, during the
    load. rss, uss: bytes in memory after it, with and without what is shared with other processes."""

    name: str
    cpu_seconds: float
    rss: int
    uss: int


@contextmanager
def metered(pid: int | None) -> Iterator[list[Usage]]:
    """Fills the list at the end, the first process in front; leaves it empty for a server of others (None).

    A process that ends meanwhile is left out: a worker's end is seen in the answers, and others come and go.
    """
    usages: list[Usage] = []
    family = _family(pid)
    before = {process: _cpu_seconds(process) for process in family}
    yield usages
    for process, start in before.items():
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_full_info()
            used = round(_cpu_seconds(process) - start, 2)
            usages.append(Usage("front" if process.pid == pid else "worker", used, memory.rss, memory.uss))


def _family(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    try:
        front = psutil.Process(pid)
        return [front, *front.children(recursive=True)]
    except psutil.NoSuchProcess as error:
        raise ToolError(f"the server's process {error.pid} has ended; see what it has printed") from error


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def columns(usages: list[Usage], seconds: float, requests: int) -> list[str]:
    """For a table: cores that the front and the workers kept busy, CPU milliseconds a picture of all of them, MB of the
    front and of the largest worker, RSS and USS."""
    if not usages:
        return ["–"] * len(COLUMNS)
    front, workers = usages[0], usages[1:]
    largest = max(workers or [front], key=lambda usage: usage.uss)
    return [
        f"{front.cpu_seconds / seconds:.2f}",
        f"{sum(usage.cpu_seconds for usage in workers) / seconds:.2f}",
        f"{1000 * sum(usage.cpu_seconds for usage in usages) / requests:.1f}",
        *(f"{usage.rss / MB:.0f}/{usage.uss / MB:.0f}" for usage in (front, largest)),
    ]


COLUMNS = ("front cores", "worker cores", "CPU ms/image", "front MB", "worker MB")
