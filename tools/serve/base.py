"""A server of a model store, owned: its processes are our children, all that it writes lies in one private folder.

    with TorchServe(Path("model-store"), ["shapes"], port=0) as server:
        httpx.post(server.prediction_url("shapes"), headers=server.headers, content=picture)

start:  check -> write the private folder -> processes -> every model answers its picture
stop:   no answer under way any more (drain) -> kill the processes -> remove the folder
"""

import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Generic, Self, TypeVar

import httpx

from tools.archive.companions import companions
from tools.errors import ToolError
from tools.serve import process
from tools.serve.lines import SETTLE_S, ServerOutput
from tools.serve.store import Served, find_archives
from tools.serve.supervise import Restarts

GRACE_S = 20.0
# How long a worker may import; the archive's own startup timeout begins after it.
WORKER_IMPORT_S = 120
PROGRESS_S = 15
ALL_ADDRESSES = "0.0.0.0"  # noqa: S104  # only compared with
LOOPBACK = "127.0.0.1"


class Interrupted(ToolError):
    """The server was told to stop while it was starting."""


OutputT = TypeVar("OutputT", bound=ServerOutput)


class ModelServer(ABC, Generic[OutputT]):
    """A server that serves archives of one model store, started once.

    models: names, None for all. port: 0 picks a free one. auth: requests need the token. token_file: where it is
    written, replacing that of an earlier start, None for the private folder. metrics_port: where Prometheus may ask, on
    loopback and without a token, None for nowhere, 0 picks a free one. grace: how long `drain` waits at most, seconds.
    supervise: `wait` starts it again when it ends by itself. vet: is given the archives, with what lies beside them,
    before they are served, and raises MarinaError for one that must not be; what is served are copies of our own, which
    nobody can exchange after that. report: called with one line for each step and event, from
    several threads. verbose: report all that its processes print.

    Start it, and call `wait`, in a thread that lives as long as the server: Linux ends the processes with the thread
    that started them. Raises ToolError and BadArchive as `tools.serve.store.find_archives` does.
    """

    # What it is called where it ends; the name of its log.
    process_name: str
    log_name: str

    def __init__(
        self,
        store: Path,
        models: Sequence[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        auth: bool = True,
        token_file: Path | None = None,
        metrics_port: int | None = None,
        grace: float = GRACE_S,
        supervise: bool = False,
        vet: Callable[[Sequence[Path]], None] | None = None,
        report: Callable[[str], None] = lambda line: None,
        verbose: bool = False,
    ):
        self.archives = find_archives(store, models)
        self.store = store.absolute()
        self.host = host
        self.port = port
        self.auth = auth
        self.metrics_port = metrics_port
        self.grace = grace
        self._models = models
        self._token_file = token_file and token_file.absolute()
        self._supervise = supervise
        self._vet = vet
        self._report = report
        self._verbose = verbose
        self._stop_requests = 0
        # Of the processes that run now.
        self._closed = threading.Event()
        self._up_since = 0.0
        self._folder: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._output: OutputT | None = None

    @property
    def folder(self) -> Path:
        """The private folder (mode 0700) of this run; `close` removes it."""
        if self._folder is None:
            raise ToolError("the server is not running")
        return self._folder

    @property
    def pid(self) -> int:
        """The id of the first process, which names the group of all."""
        if self._process is None:
            raise ToolError("the server is not running")
        return self._process.pid

    @property
    def url(self) -> str:
        host = LOOPBACK if self.host == ALL_ADDRESSES else self.host
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
    def headers(self) -> dict[str, str]:
        """What every request must carry."""
        return {"Authorization": f"Bearer {self.token}"} if self.auth else {}

    @property
    def log_file(self) -> Path:
        """All that the processes print."""
        return self.folder / self.log_name

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

        Raises ToolError with the cause in one line: a port in use, a model that does not come up, a process that died.
        Nothing is left behind then. Raises Interrupted after `request_stop`.
        """
        try:
            self.port = process.bindable_port(self.host, self.port)
            if self.metrics_port is not None:
                self.metrics_port = process.bindable_port(LOOPBACK, self.metrics_port)
            line = self._prepare()
            self._folder = process.private_folder()
            if self._vet is not None:
                self._vet_archives(self._vet)
            self._report(line)
            self._launch(answered)
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Return after `request_stop`; report workers that die. Where the server ends by itself: raises ToolError, or
        starts it again, on the same ports, until `Restarts` says that this is of no use."""
        restarts = Restarts()
        while True:
            try:
                self._check_process()
            except ToolError as death:
                if not self._supervise:
                    raise
                self._start_again(death, restarts)
            if self._stop_requests:
                return
            self._watch()
            time.sleep(0.2)

    @abstractmethod
    def drain(self) -> bool:
        """Wait until no request is under way; False when that took too long, or after another `request_stop`."""

    def close(self) -> None:
        """End all processes at once and remove the private folder. Does nothing the second time."""
        self._end_processes()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    @abstractmethod
    def _prepare(self) -> str:
        """What is done once, before there is a folder: checks, choice of other ports. Returns the line that says what
        is being started."""

    @abstractmethod
    def _command(self) -> tuple[list[str], int]:
        """Write what the processes read into the folder. Returns what to run there, and the limit on answers, bytes."""

    @abstractmethod
    def _read_output(self, stream: IO[str]) -> OutputT: ...

    @abstractmethod
    def _await_token(self) -> None:
        """Return when the token file, if there is one, holds the token."""

    @abstractmethod
    def _failure(self) -> str | None:
        """What keeps an archive from loading, as one line."""

    def _vet_archives(self, vet: Callable[[Sequence[Path]], None]) -> None:
        """Once, before the first launch."""
        copies = self.folder / "vetted"
        copies.mkdir()
        for served in self.archives:
            for path in (served.path, *companions(served.path)):
                try:
                    shutil.copyfile(path, copies / path.name)
                except OSError as error:
                    raise ToolError(
                        f"{path} cannot be copied to {copies} ({error.strerror}); make room there"
                    ) from error
        vet([copies / served.path.name for served in self.archives])
        self.archives = find_archives(copies)

    def _watch(self) -> None:
        """Called again and again while the server is up."""

    def _launch(self, answered: Callable[[Served], None]) -> None:
        for name in ("tmp", "images"):
            # What an earlier start has left.
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        for served in self.archives:
            self.image_file(served).parent.mkdir()
            self.image_file(served).write_bytes(served.image)
        command, answer_bytes = self._command()
        self._closed = threading.Event()
        self._process = process.start(command, self.folder, answer_bytes)
        assert self._process.stdout is not None
        self._output = self._read_output(self._process.stdout)
        self._await_token()
        self._await_models(answered)
        self._output.reporting = True
        self._up_since = time.monotonic()

    def _end_processes(self) -> None:
        self._closed.set()
        if self._process is not None:
            process.kill_group(self._process)
        if self._output is not None:
            self._output.close()
        self._process = self._output = None

    def _start_again(self, death: ToolError, restarts: Restarts) -> None:
        """Returns when it is up, or was asked to stop. Raises ToolError when it does not stay up."""
        began = time.monotonic()
        up_s = began - self._up_since
        while True:
            self._end_processes()
            pause = restarts.pause(up_s)
            if pause is None:
                raise ToolError(f"{death}; it was started again and again and did not stay up, so that this ends")
            self._report(f"{death}; starting it again" + (f" in {pause:g} s" if pause else ""))
            wake = time.monotonic() + pause
            while time.monotonic() < wake and not self._stop_requests:
                time.sleep(0.05)
            if self._stop_requests:
                raise Interrupted("stopped while it was being started again")
            try:
                self._launch(lambda served: None)
            except Interrupted:
                raise
            except ToolError as error:
                death, up_s = error, 0
                continue
            self._report(f"every model answers again, {time.monotonic() - began:.1f} s after the end")
            return

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
        failure = self._failure()
        if failure:
            raise ToolError(failure)
        self._check_process()

    def _check_process(self) -> None:
        status = self._process.poll() if self._process else None
        if status is not None:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
            # Nobody tells of that signal: the last line is of something else.
            killed = status == -signal.SIGKILL
            why = "by somebody, or by the system for want of memory" if killed else self._running_output().last_error()
            raise ToolError(f"{self.process_name} {how}: {why}")

    def _running_output(self) -> OutputT:
        if self._output is None:
            raise ToolError("the server is not running")
        return self._output


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

    def __init__(self, server: ModelServer, served: Served, closed: threading.Event):
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
                # A server listens once its models are registered.
                self._closed.wait(0.1)
                continue
            except httpx.HTTPError as error:
                return f"did not answer its picture: {error!r}"
            if answer.status_code == 200:
                return None
            return f"answered its picture with {answer.status_code} {' '.join(answer.text.split())[:300]}"
        return "was not asked: the server is closed"
