"""Ray: the shards of a run over the workers of this machine or of a cluster."""

import atexit
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from handlers.errors import MarinaError
from tools.bulk.job import Done, Job, Ledger
from tools.bulk.plan import Shard
from tools.errors import ToolError

# Ray reports what it is used for, writes to the terminal, and has each of its many processes gather figures, unless it
# is told before it is imported.
QUIET = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Ray's least is 75 MiB; beside the archive only names and numbers go through it.
STORE_BYTES = 128 << 20
CONNECT_S = 10
# Of a worker: one is worked on, the next is there already. More would leave a worker with several when all others are
# done.
SHARDS_IN_FLIGHT = 2
# The paths of its sockets have this length beyond its folder, and 107 bytes in all.
LONGEST_FOLDER = 40
LOOPBACK = "127.0.0.1"


def import_ray(address: str | None) -> ModuleType:
    """address: of a cluster, None for this machine. Raises ModuleNotFoundError where the extra is not installed."""
    os.environ.update(QUIET)
    if address is None:
        # Its ports are open to other machines, and whoever may speak to them may run code here.
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    import ray

    return ray


@contextmanager
def session(ray: ModuleType, address: str | None, cores: int, archive_bytes: int) -> Iterator[None]:
    """Ray started on `cores` of this machine, or connected to the cluster at HOST:PORT. Raises ToolError."""
    with ExitStack() as stack:
        if address is None:
            options = _local(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="marina-"))), cores)
            options["object_store_memory"] = STORE_BYTES + 2 * archive_bytes
        else:
            _check_reachable(address)
            options = {"address": address, "runtime_env": {"py_modules": _packages()}}
        stack.enter_context(_terminal_for_us_alone())
        stack.callback(ray.shutdown)
        try:
            ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **options)
        except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            if address is None:
                raise ToolError(f"Ray does not start on this machine ({error})") from error
            raise ToolError(
                f"the cluster at {address} does not take us ({error}); is it of this version of Ray, and if it wants a"
                " token, are RAY_AUTH_MODE=token and RAY_AUTH_TOKEN set as on its head?"
            ) from error
        yield


@dataclass(frozen=True)
class Crew:
    """threads: of each worker, and GPUs, where there are any."""

    workers: int
    threads: int
    gpus: float


def share(resources: Mapping[str, float], workers: int | None, device: str) -> Crew:
    """What there is among so many workers. device: of the archive's settings. Raises ToolError for too many of them."""
    cores = int(resources.get("CPU", 0))
    gpus = 0.0 if device == "cpu" else resources.get("GPU", 0.0)
    count = workers or int(gpus) or cores
    if not 1 <= count <= cores:
        raise ToolError(f"{count} workers need a core each, and the cluster has {cores}; give fewer with --workers")
    return Crew(count, cores // count, min(1.0, gpus / count))


def go_through(ray: ModuleType, shards: Sequence[Shard], job: Job, archive: bytes, crew: Crew) -> Iterator[Done]:
    """Each shard as soon as it is done. Raises ToolError with one line when the run cannot go on."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    DataContext.get_current().enable_progress_bars = False
    ledger = ray.remote(num_cpus=0)(Ledger).remote()
    content = ray.put(archive)
    rows = [asdict(shard) for shard in shards]
    done = from_items(rows, override_num_blocks=len(rows)).map_batches(
        Actor,
        batch_size=1,
        fn_constructor_args=(job, [content], crew.threads, ledger),
        compute=ActorPoolStrategy(
            size=min(crew.workers, len(rows)),
            max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
        ),
        num_cpus=crew.threads,
        num_gpus=crew.gpus or None,
    )
    try:
        for row in done.iter_rows():
            if row["problem"]:
                raise ToolError(row["problem"])
            yield Done(row["pictures"], row["failed"], row["began"], row["ended"])
    except ray.exceptions.RayError as error:
        why = str(error.__cause__ or error).strip().rpartition("\n")[2]
        raise ToolError(f"the run broke off ({why}); the same command goes on with it") from error


class Actor:
    """A `Worker` as Ray Data calls it: a shard a call, with problems as a row, since Ray makes pages of exceptions."""

    def __init__(self, job: Job, archive: list[Any], threads: int, ledger: Any):
        """archive: in a list, so that Ray leaves it to us to fetch."""
        import ray

        from tools.bulk.worker import Worker

        # What Ray's C++ does at the end of a process waits for itself now and then, and the process stays for ever.
        atexit.register(os._exit, 0)
        self.problem = ""
        try:
            self.worker = Worker(job, ray.get(archive[0]), threads, Remote(ledger))
        except (MarinaError, OSError) as error:
            self.problem = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shard = Shard(**{name: values.tolist()[0] for name, values in batch.items()})
        done = Done(0, 0, 0.0, 0.0)
        problem = self.problem
        if not problem:
            try:
                done = self.worker.do(shard)
            except MarinaError as error:
                problem = str(error)
        return {name: [value] for name, value in {**asdict(done), "problem": problem}.items()}


class Remote:
    """A `Ledger` that is an actor itself."""

    def __init__(self, actor: Any):
        self._actor = actor

    def begin(self, shard: int) -> tuple[bool, set[int]]:
        return self._ask("begin", shard)

    def at(self, shard: int, picture: int) -> None:
        self._ask("at", shard, picture)

    def passed(self, shard: int) -> None:
        self._ask("passed", shard)

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments))


@contextmanager
def _terminal_for_us_alone() -> Iterator[None]:
    """What Ray writes to stdout, and its C++ to file descriptor 2, which nothing else silences, goes nowhere."""
    with ExitStack() as stack:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
        ours = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace"))
        stack.enter_context(redirect_stderr(ours))
        nothing = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nothing))
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
        yield


def _local(folder: Path, cores: int) -> dict[str, Any]:
    if len(str(folder)) > LONGEST_FOLDER:
        raise ToolError(f"the path of temporary files, {folder.parent}, is too long for Ray; set TMPDIR=/tmp")
    return {
        "address": "local",
        "num_cpus": cores,
        "include_dashboard": False,
        "_temp_dir": str(folder),
        "_node_ip_address": LOOPBACK,
    }


def _check_reachable(address: str) -> None:
    host, colon, port = address.rpartition(":")
    try:
        if not colon:
            raise ValueError("no port in it")
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ToolError(
            f"no Ray cluster at {address} ({error}); give HOST:PORT as `ray start --head` prints it, on a machine of"
            " the cluster"
        ) from error


def _packages() -> list[str]:
    """Our code, for machines that do not have it."""
    root = Path(__file__).resolve().parents[2]
    return [str(root / name) for name in ("handlers", "model_defs", "tools")]
