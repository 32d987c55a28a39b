"""One TorchServe, owned: see `tools.serve.base`.

TorchServe's launcher is not used: it leaves the JVM behind when it is killed, and exits with 0 when
nothing could be served.
"""

import json
import os
import shutil
import signal
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import httpx

from tools.errors import ToolError
from tools.serve import config, process
from tools.serve.base import LOOPBACK, ModelServer, write_private
from tools.serve.java import find_java
from tools.serve.log import busy_workers
from tools.serve.output import Output
from tools.serve.store import Served, find_archives

# A thread dump takes milliseconds on an idle machine.
DUMP_TIMEOUT_S = 5
# What parts the names in TorchServe's list of archives.
LISTED = ",="


class TorchServe(ModelServer[Output]):
    """A TorchServe.

    grpc_port: None for no gRPC beyond what TorchServe cannot leave off, 0 picks a free one. management_port: where
    `tools.serve.rollout` may bring other archives into `store`, on loopback, None for nowhere, 0 picks a free one.
    Other arguments: see `ModelServer`. A start after the first makes new tokens: TorchServe takes none of ours.
    """

    process_name = "TorchServe's JVM"
    log_name = "torchserve.log"

    def __init__(
        self,
        store: Path,
        models: Sequence[str] | None = None,
        *,
        grpc_port: int | None = None,
        management_port: int | None = None,
        **settings: Any,
    ):
        super().__init__(store, models, **settings)
        self.grpc_port = grpc_port
        self.management_port = management_port
        self._management_address = ""
        # By the name of the file that TorchServe loads.
        self._files: dict[str, Served] = {}

    @property
    def key_file(self) -> Path:
        """TorchServe's own (mode 0600), with the tokens for predictions and for management."""
        return self.folder / "key_file.json"

    def drain(self) -> bool:
        """See `ModelServer.drain`.

        TorchServe drops what is under way when it is told to stop, and nothing in it counts requests:
        what waits is seen in the management API, what workers do in thread dumps of the JVM. Requests
        that arrive meanwhile are still taken.
        """
        limit = min(self.grace, max(served.response_timeout for served in self.archives))
        # A worker that collects a batch looks idle, so two looks must lie further apart than that takes.
        pause = max(0.2, 1.5 * max(served.batch_delay for served in self.archives))
        deadline = time.monotonic() + limit
        stop_requests = self._stop_requests
        idle_looks, reported = 0, False
        with self._management_client() as management:
            while True:
                idle_looks = idle_looks + 1 if self._is_idle(management) else 0
                if idle_looks == 2:
                    return True
                if not idle_looks and not reported:
                    self._report(f"waiting for answers under way, {limit:.0f} s at most")
                    reported = True
                wake = time.monotonic() + pause
                while time.monotonic() < wake:
                    if self._stop_requests != stop_requests or time.monotonic() > deadline:
                        return False
                    time.sleep(0.05)

    def _prepare(self) -> str:
        process.check_cuda_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._java = find_java()
        if self.grpc_port is not None:
            self.grpc_port = process.bindable_port(self.host, self.grpc_port)
        if self.management_port is not None:
            self.management_port = process.bindable_port(LOOPBACK, self.management_port)
        return f"starting TorchServe on {self._java} with {', '.join(map(str, self.archives))}"

    def _command(self) -> tuple[list[str], int]:
        folder = self.folder
        # A start after the first must not take the tokens of the one before for its own.
        self.key_file.unlink(missing_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        self._files = self._model_store()
        unix = process.has_unix_sockets(folder)
        if unix:
            self._management_address, metrics = f"unix:{folder}/management.sock", f"unix:{folder}/metrics.sock"
        else:
            self._management_address, metrics = (
                f"http://127.0.0.1:{process.bindable_port('127.0.0.1', 0)}" for _ in range(2)
            )
        if self.management_port is not None:
            self._management_address = f"http://{LOOPBACK}:{self.management_port}"
        if self.metrics_port is not None:
            metrics = f"http://{LOOPBACK}:{self.metrics_port}"
        properties = config.server_properties(
            host=self.host,
            port=self.port,
            management_address=self._management_address,
            metrics_address=metrics,
            metrics_config=str(folder / "metrics.yaml"),
            grpc_port=self.grpc_port,
            auth=self.auth,
            takes_models=self.management_port is not None,
            store=str(folder / "store" if self.management_port is None else self.store),
            archives=self._files,
            # With unix sockets it is but a part of their names.
            worker_port=9000 if unix else process.bindable_port("127.0.0.1", 0),
        )
        (folder / "config.properties").write_text(config.properties_text(properties), encoding="ascii")
        (folder / "metrics.yaml").write_text(config.metrics_yaml(process.torchserve_metrics()), encoding="utf-8")
        (folder / "log4j2.xml").write_text(config.LOG4J, encoding="utf-8")
        return process.command_line(self._java, folder), int(properties["max_response_size"])

    def _model_store(self) -> dict[str, Served]:
        """What TorchServe loads, by its file name there. Raises ToolError for a name that cannot be told to it."""
        if self.management_port is not None:
            # What is deployed has to lie where a restart finds it; what a rollout has brought since the start does.
            self.archives = find_archives(self.store, self._models)
            if self._vet is not None:
                self._vet([served.path for served in self.archives])
            for served in self.archives:
                if set(served.path.name) & set(LISTED):
                    raise ToolError(f"{served.path}: with a management port no file name may hold {LISTED}; rename it")
            return {served.path.name: served for served in self.archives}
        # A store of our own holds nothing but what is served, under names that need no quoting.
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        (self.folder / "store").mkdir()
        files = {f"{index}.mar": served for index, served in enumerate(self.archives)}
        for file_name, served in files.items():
            (self.folder / "store" / file_name).symlink_to(served.path)
        return files

    def _vet_archives(self, vet: Callable[[Sequence[Path]], None]) -> None:
        # With a management port the files of the store itself are loaded: looked at before each launch, see above.
        if self.management_port is None:
            super()._vet_archives(vet)

    def _read_output(self, stream: IO[str]) -> Output:
        return Output(stream, self.log_file, self._report, self._verbose)

    def _failure(self) -> str | None:
        return self._running_output().failure(self._files)

    def _watch(self) -> None:
        for pid, worker in self._running_output().dead_workers():
            removed = "" if self.management_port is None else ", unless that version was removed"
            self._report(f"worker {pid} of {worker} died; TorchServe starts another{removed}")

    def _await_token(self) -> None:
        if self.token_file is None:
            return
        while not (keys := self._keys()):
            self._check_start()
            time.sleep(0.05)
        write_private(self.token_file, keys["inference"]["key"])

    def _keys(self) -> dict[str, dict[str, str]]:
        """What TorchServe wrote into its key file; empty while it has not."""
        try:
            keys: dict[str, dict[str, str]] = json.loads(self.key_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return keys

    def _management_client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._keys()['management']['key']}"} if self.auth else {}
        if self._management_address.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=self._management_address.removeprefix("unix:"))
            return httpx.Client(base_url="http://management", transport=transport, headers=headers)
        return httpx.Client(base_url=self._management_address, headers=headers, trust_env=False)

    def _is_idle(self, management: httpx.Client) -> bool:
        if self._process is None or self._process.poll() is not None:
            return True
        dump = self._running_output().thread_dump(lambda: os.kill(self.pid, signal.SIGQUIT), DUMP_TIMEOUT_S)
        return dump is not None and busy_workers(dump) == 0 and self._queued(management) == 0

    def _queued(self, management: httpx.Client) -> int:
        """Requests that wait for a worker."""
        queued = 0
        for name in {served.name for served in self.archives}:
            try:
                versions = management.get(f"/models/{urllib.parse.quote(name, safe='')}/all").json()
            except httpx.TransportError:
                continue
            queued += sum(version["jobQueueStatus"]["pendingRequests"] for version in versions)
        return queued
