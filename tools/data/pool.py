"""Work on many pictures in several processes, answered in order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from tools.errors import ToolError

CHUNK = 8  # jobs handed to a process at a time

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """What `work` gives for each job, in the order of the jobs, whatever the number of processes.

    With one worker no process is started. Raises ToolError when a process is killed.
    """
    if workers == 1:
        yield from map(work, jobs)
        return
    try:
        # Started anew: what the caller has running, torch's threads above all, may not survive a fork.
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start) as pool:
            yield from pool.map(work, jobs, chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise ToolError("a process was killed, likely for memory; try --workers 1") from error


def _start() -> None:
    """Ends with the process that started it, however that ends; leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
