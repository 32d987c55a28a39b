"""Several processes for one training: torchrun's, started by hand on every node or from here on this one."""

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tools.train.config import TrainSettings


class Place(NamedTuple):
    """Which of how many processes this is, over all nodes; local_world: how many there are on this node."""

    rank: int = 0
    world: int = 1
    local_world: int = 1


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def place() -> Place:
    if not launched():
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def processes_wanted(settings: TrainSettings) -> int:
    return max(settings.processes, len(settings.gpus))


def launch(run: Path, processes: int) -> int:
    """Start the training of a run folder in `processes` processes. Returns the exit code: the first failure's."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What went wrong has been said by the process that it went wrong in.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        with _signals_kept():
            elastic_launch(config, sys.executable)("-m", "tools.cli", "train", "--resume", str(run))
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    return 0


@contextmanager
def _signals_kept() -> Iterator[None]:
    """torchrun's launcher takes these signals over, and would keep them after its end."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
