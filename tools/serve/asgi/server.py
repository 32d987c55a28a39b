"""The ASGI engine, owned: see `tools.serve.base`."""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from handlers.errors import BadArchive
from tools.archive.reader import Archive, open_archive
from tools.errors import ToolError
from tools.serve.asgi.model import Settings
from tools.serve.base import WORKER_IMPORT_S, ModelServer, write_private
from tools.serve.config import size_limit
from tools.serve.lines import ServerOutput
from tools.serve.log import python_error
from tools.serve.store import Served

NEEDED = ("uvicorn", "uvloop", "httptools", "python_multipart")
# What a worker imports of its archive.
CORE = "handlers/worker.py"
# TorchServe's, for archives that do not say.
QUEUE_SIZE = 100
# How lines begin that tell of a worker's fate: of no use to tell that of the front.
EVENT = re.compile(r"worker \d+ of ")
KEPT_LINES = 200


class AsgiOutput(ServerOutput):
    """The lines of the front and its workers. All of them are reported."""

    def __init__(self, stream: IO[str], log_file: Path, report: Callable[[str], None], verbose: bool):
        # By the worker's name; other lines by ''. Written by the reading thread, read by others.
        self._kept: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT_LINES))
        super().__init__(stream, log_file, report, verbose)

    def worker_error(self, worker: str) -> str | None:
        lines = list(self._kept[worker])
        return python_error(lines) or (lines[-1] if lines else None)

    def last_error(self) -> str:
        # The front has ended, and so has its stream where no worker is left.
        self._thread.join(timeout=1)
        lines = list(self._kept[""])
        return python_error(lines) or (lines[-1] if lines else "it gives no reason")

    def _take(self, line: str) -> str:
        worker, colon, text = line.partition(": ")
        if colon and " " not in worker and "_" in worker:
            self._kept[worker].append(text)
        elif not EVENT.match(line):
            self._kept[""].append(line)
        return line


class AsgiServer(ModelServer[AsgiOutput]):
    """The archives behind a plain ASGI server, without Java and TorchServe. Arguments: see `ModelServer`.

    The token is the same after `supervise` has started it again.
    """

    process_name = "the server"
    log_name = "asgi.log"

    def _prepare(self) -> str:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ToolError(f"the engine asgi needs {', '.join(missing)}; pip install 'marina[gateway]'")
        for served in self.archives:
            with open_archive(served.path) as archive:
                _check(archive)
        self._secret = secrets.token_urlsafe(24)
        return f"starting ASGI workers with {', '.join(map(str, self.archives))}"

    def _command(self) -> tuple[list[str], int]:
        limit = size_limit(served.max_bytes for served in self.archives)
        models = self.folder / "models"
        shutil.rmtree(models, ignore_errors=True)
        gpus = _Gpus()
        settings = {
            "host": self.host,
            "port": self.port,
            "metrics_port": self.metrics_port,
            "token": self._secret if self.auth else None,
            "most_bytes": limit,
            "grace": self.grace,
            "models": [_extracted(served, models / served.key, gpus)._asdict() for served in self.archives],
        }
        write_private(self.folder / "front.json", json.dumps(settings))
        return [sys.executable, "-m", "tools.serve.asgi.front", "front.json"], limit

    def _read_output(self, stream: IO[str]) -> AsgiOutput:
        return AsgiOutput(stream, self.log_file, self._report, self._verbose)

    def _await_token(self) -> None:
        if self.token_file is not None:
            write_private(self.token_file, self._secret)

    def _failure(self) -> str | None:
        """The front ends when a model does not come up, with the line that says why."""
        status = self._process.poll() if self._process else None
        return self._running_output().last_error() if status == 1 else None

    def drain(self) -> bool:
        """See `ModelServer.drain`. No connection is taken any more, and the front ends."""
        limit = min(self.grace, max(served.response_timeout for served in self.archives))
        began, told, stop_requests = time.monotonic(), False, self._stop_requests
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        while self._process.poll() is None:
            waited = time.monotonic() - began
            if self._stop_requests != stop_requests or waited > limit:
                return False
            if waited > 1 and not told:
                self._report(f"waiting for answers under way, {limit:.0f} s at most")
                told = True
            time.sleep(0.05)
        return True


def _check(archive: Archive) -> None:
    """Raises BadArchive for one that cannot be served without TorchServe."""
    if CORE not in archive.names() or not archive.model.get("configFile"):
        raise BadArchive(
            f"{archive.path}: has no {CORE}, so that it is of an older Marina or not of Marina at all; build it again,"
            " or serve it with --engine torchserve"
        )


def _extracted(served: Served, folder: Path, gpus: "_Gpus") -> Settings:
    with open_archive(served.path) as archive:
        archive.extract(folder)
        config, file = archive.config, archive.model["configFile"]
    return Settings(
        name=served.name,
        version=served.version,
        folder=str(folder),
        config=file,
        gpus=[gpus.next() for _ in range(_workers(config))],
        batch_size=_whole(config, "batchSize", 1),
        batch_delay=served.batch_delay,
        queue_size=_whole(config, "jobQueueSize", QUEUE_SIZE),
        start_s=WORKER_IMPORT_S + served.startup_timeout,
        answer_s=served.response_timeout,
    )


def _workers(config: dict[str, Any]) -> int:
    """As many as TorchServe starts: the fewest, where both bounds are given."""
    fewest, most = (_whole(config, key, 0) for key in ("minWorkers", "maxWorkers"))
    return fewest if 1 <= fewest <= most else 1


def _whole(config: dict[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    # TorchServe ignores what is no whole number, and takes its default.
    return value if type(value) is int and value > 0 else default


class _Gpus:
    """Deals out the GPUs, one a worker, in turn, by the numbers that torch gives those that are visible."""

    def __init__(self) -> None:
        self._count = _gpu_count()
        self._dealt = 0

    def next(self) -> int | None:
        self._dealt += 1
        return (self._dealt - 1) % self._count if self._count else None


def _gpu_count() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(1 for entry in visible.split(",") if entry.strip() not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in listed.stdout.splitlines() if line.startswith("GPU "))
