"""One TorchServe, owned: its JVM is our child, everything that it writes lies in one private folder.

    with TorchServe(Path("model-store"), ["shapes"], port=0) as server:
        httpx.post(server.prediction_url("shapes"), headers=server.headers, content=picture)

start:  check -> write the private folder -> JVM -> every model answers its picture
stop:   no answer under way any more (drain) -> kill the JVM and its workers -> remove the folder

TorchServe's launcher is not used: it leaves the JVM behind when it is killed, and exits with 0 when
nothing could be served.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tools.errors import ToolError
from tools.serve import config, process
from tools.serve.java import find_java
from tools.serve.log import busy_workers
from tools.serve.output import SETTLE_S, Output
from tools.serve.store import Served, find_archives

GRACE_S = 20.0
# How long TorchServe lets a worker import; the archive's own startup timeout begins after it.
WORKER_IMPORT_S = 120
PROGRESS_S = 15
# A thread dump takes milliseconds on an idle machine.
DUMP_TIMEOUT_S = 5
ALL_ADDRESSES = "0.0.0.0"  # noqa: S104  # only compared with
LOOPBACK = "127.0.0.1"
# What parts the names in TorchServe's list of archives.
LISTED = ",="


class Interrupted(ToolError):
    """The server was told to stop while it was starting."""


class TorchServe:
    """A TorchServe that serves archives of one model store, started once.

    models: names, None for all. port: 0 picks a free one. auth: requests need the token. token_file: where it is
    written, replacing that of an earlier start, None for the private folder. grpc_port: None for no gRPC beyond what
    TorchServe cannot leave off, 0 picks a free one. management_port: where `tools.serve.rollout` may bring other
    archives into `store`, on loopback, None for nowhere, 0 picks a free one. metrics_port: where Prometheus may ask, on
    loopback and without a token, None for nowhere, 0 picks a free one. grace: how long `drain` waits at most, seconds.
    report: called with one line for each step and event, from several threads. verbose: report all that TorchServe and
    its workers print.

    Start it in a thread that lives as long as the server: Linux ends the JVM with the thread that
    started it. Raises ToolError and BadArchive as `tools.serve.store.find_archives` does.
    """

    def __init__(
        self,
        store: Path,
        models: Sequence[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        auth: bool = True,
        token_file: Path | None = None,
        grpc_port: int | None = None,
        management_port: int | None = None,
        metrics_port: int | None = None,
        grace: float = GRACE_S,
        report: Callable[[str], None] = lambda line: None,
        verbose: bool = False,
    ):
        self.archives = find_archives(store, models)
        self.host = host
        self.port = port
        self.auth = auth
        self._token_file = token_file and token_file.absolute()
        self.grpc_port = grpc_port
        self.management_port = management_port
        self.metrics_port = metrics_port
        self.store = store.absolute()
        self.grace = grace
        self._report = report
        self._verbose = verbose
        self._stop_requests = 0
        self._closed = threading.Event()
        self._folder: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._output: Output | None = None
        self._management_address = ""
        # By the name of the file that TorchServe loads.
        self._files: dict[str, Served] = {}

    @property
    def folder(self) -> Path:
        """The private folder (mode 0700) of this run; `close` removes it."""
        if self._folder is None:
            raise ToolError("the server is not running")
        return self._folder

    @property
    def pid(self) -> int:
        """The process id of the JVM, which names its process group too."""
        if self._process is None:
            raise ToolError("the server is not running")
        return self._process.pid

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host == ALL_ADDRESSES else self.host
        return f"http://{host}:{self.port}"

    def prediction_url(self, name: str, version: str | None = None) -> str:
        """Where pictures go; without `version` to the newest one."""
        parts = [name] if version is None else [name, version]
        return "/".join([self.url, "predictions", *(urllib.parse.quote(part, safe="") for part in parts)])

    @property
    def token_file(self) -> Path | None:
        """The file (mode 0600) that holds the token for predictions and nothing else; None without `auth`."""
        return (self._token_file or self.folder / "token") if self.auth else None

    @property
    def token(self) -> str | None:
        return self.token_file.read_text() if self.token_file else None

    @property
    def key_file(self) -> Path:
        """TorchServe's own (mode 0600), with the tokens for predictions and for management."""
        return self.folder / "key_file.json"

    @property
    def headers(self) -> dict[str, str]:
        """What every request must carry."""
        return {"Authorization": f"Bearer {self.token}"} if self.auth else {}

    @property
    def log_file(self) -> Path:
        """All that TorchServe and its workers print."""
        return self.folder / "torchserve.log"

    def image_file(self, served: Served) -> Path:
        """The picture that `served` has answered."""
        return self.folder / "images" / served.key / served.image_name

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request_stop(self) -> None:
        """Ask `start`, `wait` or `drain` to end, whatever thread they run in. Safe in a signal handler."""
        self._stop_requests += 1

    def start(self, answered: Callable[[Served], None] = lambda served: None) -> None:
        """Start, and return when every model has answered its picture with 200. answered: called with each that has.

        Raises ToolError with the cause in one line: a port in use, no Java, a model that does not come
        up, a JVM that died. Nothing is left behind then. Raises Interrupted after `request_stop`.
        """
        try:
            self._start(answered)
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Return after `request_stop`; report workers that die. Raises ToolError when the JVM dies."""
        while True:
            self._check_jvm()
            if self._stop_requests:
                return
            for pid, worker in self._running_output().dead_workers():
                removed = "" if self.management_port is None else ", unless that version was removed"
                self._report(f"worker {pid} of {worker} died; TorchServe starts another{removed}")
            time.sleep(0.2)

    def drain(self) -> bool:
        """Wait until no request is under way; False when that took too long, or after another `request_stop`.

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

    def close(self) -> None:
        """End the JVM and its workers at once and remove the private folder. Does nothing the second time."""
        self._closed.set()
        if self._process is not None:
            process.kill_group(self._process)
        if self._output is not None:
            self._output.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._output = self._folder = None

    def _start(self, answered: Callable[[Served], None]) -> None:
        process.check_cuda_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
        java = find_java()
        self.port = process.bindable_port(self.host, self.port)
        if self.grpc_port is not None:
            self.grpc_port = process.bindable_port(self.host, self.grpc_port)
        if self.management_port is not None:
            self.management_port = process.bindable_port(LOOPBACK, self.management_port)
        if self.metrics_port is not None:
            self.metrics_port = process.bindable_port(LOOPBACK, self.metrics_port)
        self._folder = process.private_folder()
        answer_bytes = self._write_folder()
        self._report(f"starting TorchServe on {java} with {', '.join(map(str, self.archives))}")
        self._process = process.start(process.command_line(java, self._folder), self._folder, answer_bytes)
        assert self._process.stdout is not None
        self._output = Output(self._process.stdout, self.log_file, self._report, self._verbose)
        self._await_token()
        self._await_models(answered)
        self._output.reporting = True

    def _write_folder(self) -> int:
        """Returns the limit on answers, in bytes."""
        folder = self.folder
        for name in ("tmp", "logs", "store", "images"):
            (folder / name).mkdir()
        self._files = self._model_store()
        for served in self.archives:
            self.image_file(served).parent.mkdir()
            self.image_file(served).write_bytes(served.image)
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
        return int(properties["max_response_size"])

    def _model_store(self) -> dict[str, Served]:
        """What TorchServe loads, by its file name there. Raises ToolError for a name that cannot be told to it."""
        if self.management_port is not None:
            # What is deployed has to lie where a restart finds it.
            for served in self.archives:
                if set(served.path.name) & set(LISTED):
                    raise ToolError(f"{served.path}: with a management port no file name may hold {LISTED}; rename it")
            return {served.path.name: served for served in self.archives}
        # A store of our own holds nothing but what is served, under names that need no quoting.
        files = {f"{index}.mar": served for index, served in enumerate(self.archives)}
        for file_name, served in files.items():
            (self.folder / "store" / file_name).symlink_to(served.path)
        return files

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

    def _await_models(self, answered: Callable[[Served], None]) -> None:
        began = told = time.monotonic()
        waiting = [_Probe(self, served, self._closed) for served in self.archives]
        while waiting:
            self._check_start()
            for probe in [probe for probe in waiting if not probe.is_alive()]:
                if probe.failure:
                    time.sleep(SETTLE_S)
                    # If the worker died of the picture, that tells more.
                    self._check_start()
                    said = self._running_output().worker_error(probe.served.key)
                    raise ToolError(f"{probe.served}: {probe.failure}" + (f"; its worker says: {said}" if said else ""))
                picture = "its golden image" if probe.served.is_golden else "a picture"
                self._report(f"{probe.served}: answers {picture}, {time.monotonic() - began:.1f} s after the start")
                waiting.remove(probe)
                answered(probe.served)
            if waiting and time.monotonic() > told + PROGRESS_S:
                told = time.monotonic()
                self._report(f"waiting for {', '.join(str(probe.served) for probe in waiting)}, {told - began:.0f} s")
            time.sleep(0.05)

    def _check_start(self) -> None:
        if self._stop_requests:
            raise Interrupted("stopped before every model was up")
        failure = self._running_output().failure(self._files)
        if failure:
            raise ToolError(failure)
        self._check_jvm()

    def _check_jvm(self) -> None:
        status = self._process.poll() if self._process else None
        if status is not None:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
            raise ToolError(f"TorchServe's JVM {how}: {self._running_output().last_error()}")

    def _running_output(self) -> Output:
        if self._output is None:
            raise ToolError("the server is not running")
        return self._output

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


def write_private(path: Path, text: str) -> None:
    """A file (mode 0600) that nobody sees half written. Raises ToolError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ToolError(f"token file {path} cannot be written ({error.strerror}); name another one") from error


class _Probe(threading.Thread):
    """Sends a model its picture until it answers. `failure` is None then, else one line."""

    def __init__(self, server: TorchServe, served: Served, closed: threading.Event):
        super().__init__(name=f"probe-{served.key}", daemon=True)
        self.served = served
        self.failure: str | None = None
        self._url = server.prediction_url(served.name, served.version)
        self._headers = server.headers | {"Content-Type": served.content_type}
        self._closed = closed
        self.start()

    def run(self) -> None:
        # Never through a proxy: it is this machine that is asked.
        with httpx.Client(headers=self._headers, trust_env=False) as client:
            self.failure = self._ask(client)

    def _ask(self, client: httpx.Client) -> str | None:
        limit = WORKER_IMPORT_S + self.served.startup_timeout + self.served.response_timeout
        deadline = time.monotonic() + limit
        while not self._closed.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                return f"did not answer its picture within {limit:.0f} s"
            try:
                answer = client.post(self._url, content=self.served.image, timeout=left)
            except httpx.ConnectError:
                # TorchServe listens once its models are registered.
                self._closed.wait(0.1)
                continue
            except httpx.HTTPError as error:
                return f"did not answer its picture: {error!r}"
            if answer.status_code == 200:
                return None
            return f"answered its picture with {answer.status_code} {' '.join(answer.text.split())[:300]}"
        return "was not asked: the server is closed"
