"""The entry point of the serving image, as far as it runs without a container: relay, checks, exit codes."""

import asyncio
import http.client
import json
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import BadArchive
from tools.archive.reader import MANIFEST, PROVENANCE
from tools.archive.verify import check_entries
from tools.archive.writer import write_archive
from tools.serve.process import bindable_port

DOCKER = Path(__file__).resolve().parent.parent / "docker"
# The files of the image find each other beside them, as there.
sys.path.insert(0, str(DOCKER))

import checksums  # noqa: E402
import relay  # noqa: E402
import serve  # noqa: E402

LOOPBACK = "127.0.0.1"
LONG = 60.0


# The end of an answer.

BODIES = st.binary(max_size=40)


def with_length(body: bytes) -> tuple[bytes, bool]:
    return b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body), False


def in_chunks(body: bytes) -> tuple[bytes, bool]:
    parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n", False


def after_continue(body: bytes) -> tuple[bytes, bool]:
    return b"HTTP/1.1 100 Continue\r\n\r\n" + with_length(body)[0], False


def without_body(body: bytes) -> tuple[bytes, bool]:
    return b"HTTP/1.1 204 No Content\r\n\r\n", False


def to_head(body: bytes) -> tuple[bytes, bool]:
    return b"HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n", True


@given(st.data())
def test_answers_end_where_they_end(data: st.DataObject) -> None:
    kinds = st.sampled_from([with_length, in_chunks, after_continue, without_body, to_head])
    framing = relay.Framing()
    for _ in range(data.draw(st.integers(1, 4))):
        answer, bodyless = data.draw(kinds)(data.draw(BODIES.filter(lambda body: b"\r\n0\r\n\r\n" not in body)))
        assert framing.between
        cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=6)))
        pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert [framing.ends(piece, bodyless) for piece in pieces] == [False] * len(cuts) + [True]


# The relay.


class Backend(BaseHTTPRequestHandler):
    """Answers with what it was sent, once it may."""

    protocol_version = "HTTP/1.1"
    may_answer = threading.Event()
    asked = threading.Semaphore(0)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.release()
        assert self.may_answer.wait(LONG)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[tuple[str, int]]:
    Backend.may_answer.set()
    server = ThreadingHTTPServer((LOOPBACK, 0), Backend)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield LOOPBACK, server.server_port
    Backend.may_answer.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Running:
    """A relay in a thread of its own."""

    def __init__(self, backend: tuple[str, int]):
        self.port = bindable_port(LOOPBACK, 0)
        self._relay = relay.Relay(self.port, backend)
        self._drained = False
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._up.wait(LONG)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        await self._relay.start()
        self._up.set()
        await self._end.wait()
        # Its listener would stay open, and be complained of in whatever test runs when it is found.
        if not self._drained:
            await self._relay.drain(0)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(LOOPBACK, self.port, timeout=LONG)

    def drain(self, grace: float = LONG) -> "Future[int]":
        """How many requests were left without an answer, in the end."""
        self._drained = True
        return asyncio.run_coroutine_threadsafe(self._relay.drain(grace), self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


@pytest.fixture
def running(backend: tuple[str, int]) -> Iterator[Running]:
    running = Running(backend)
    yield running
    running.close()


def ask(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", "/", body)
    return connection.getresponse()


@pytest.mark.parametrize("size", [0, 1, 100_000, 5_000_000])
def test_bytes_pass_as_they_are(running: Running, size: int) -> None:
    body = os.urandom(size)
    connection = running.connect()
    for _ in range(3):
        answer = ask(connection, body)
        assert answer.read() == body
        assert answer.getheader("connection") is None
    connection.close()


def begin(running: Running, body: bytes) -> socket.socket:
    """A request that the server has and does not answer yet, of a client that does not hang up by itself."""
    Backend.may_answer.clear()
    client = socket.create_connection((LOOPBACK, running.port), LONG)
    client.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert Backend.asked.acquire(timeout=LONG)
    return client


def read_all(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def wait_until_refused(running: Running) -> None:
    while True:
        try:
            socket.create_connection((LOOPBACK, running.port), LONG).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)


def test_drain_lets_the_answer_under_way_out_and_takes_nothing_new(running: Running) -> None:
    while Backend.asked.acquire(blocking=False):
        pass
    idle = running.connect()
    Backend.may_answer.set()
    assert ask(idle, b"before").read() == b"before"
    assert Backend.asked.acquire(timeout=LONG)
    busy = begin(running, b"a" * 300_000)
    drained = running.drain()
    wait_until_refused(running)
    # The idle one is closed, and tells so before the other has its answer.
    assert idle.sock.recv(1) == b""
    assert not drained.done()
    Backend.may_answer.set()
    head, _, body = read_all(busy).partition(b"\r\n\r\n")
    assert body == b"a" * 300_000
    assert b"connection: close" in head.splitlines()
    assert drained.result(LONG) == 0


def test_drain_counts_what_it_gave_up(running: Running) -> None:
    busy = begin(running, b"a")
    assert running.drain(0.1).result(LONG) == 1
    busy.close()


def test_who_got_through_to_the_listener_is_answered(backend: tuple[str, int]) -> None:
    async def scenario() -> bytes:
        port = bindable_port(LOOPBACK, 0)
        under_test = relay.Relay(port, backend)
        await under_test.start()
        # Nothing is awaited here: the relay has not accepted it when the end begins.
        client = socket.create_connection((LOOPBACK, port))
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi")
        assert await under_test.drain(LONG) == 0
        return read_all(client)

    assert asyncio.run(scenario()).endswith(b"\r\n\r\nhi")


def test_a_client_that_leaves_takes_its_connection_along() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        server.settimeout(LONG)
        running = Running(server.getsockname())
        server.accept()[0].close()  # that of the relay itself, which has looked for the server
        socket.create_connection((LOOPBACK, running.port)).close()
        with server.accept()[0] as connection:
            connection.settimeout(LONG)
            assert connection.recv(1) == b""
        running.close()


def test_a_client_that_leaves_is_not_waited_for(running: Running) -> None:
    begin(running, b"a").close()
    assert running.drain().result(LONG) == 0


# Archives.


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Of a few entries, written as the builder writes them."""
    path = tmp_path / "a.mar"
    digests: dict[str, dict[str, int | str]] = {}
    with write_archive(path, digests) as writer:
        writer.add("handler.py", b"print()")
        writer.add("weights/a.bin", bytes(range(256)) * 9000)
        writer.add(MANIFEST, json.dumps({"model": {"modelName": "a", "handler": "handler.py"}}).encode())
        writer.add(PROVENANCE, json.dumps({"entries": digests}).encode())
    return path


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """With other entries; those that stay keep their order."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)


def refusal(path: Path) -> str:
    with pytest.raises(checksums.Refused) as refused:
        checksums.check_archive(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


def test_an_archive_as_built_is_served(archive: Path) -> None:
    check_entries(archive)
    assert checksums.check_store(archive.parent) == ["a.mar: 3 entries are those that were built"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entries: entries.update({"handler.py": b"input()"}), "'handler.py' is not the one that was built"),
        (lambda entries: entries.update({"types.py": b""}), "'types.py' is not listed in"),
        (lambda entries: entries.pop("handler.py"), "'handler.py' is missing from"),
        (lambda entries: entries.update({PROVENANCE: b"{}"}), "lists no entries"),
        (lambda entries: entries.update({PROVENANCE: b"[]"}), "lists no entries"),
    ],
)
def test_what_was_not_built_so_is_refused(archive: Path, change: Callable[[dict[str, bytes]], None], said: str) -> None:
    rewrite(archive, change)
    assert said in refusal(archive)
    with pytest.raises(BadArchive):
        check_entries(archive)


@pytest.mark.parametrize("name", ["/a.py", "../a.py", "b/../../a.py", "b\\a.py", "C:a.py", "a.py\0.txt"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.mar"
    stand_in = "x" * len(name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(stand_in, b"")
    # zipfile itself would write another name.
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))
    assert "would not stay in the archive's folder" in refusal(path)


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mar"
    info = zipfile.ZipInfo("a.py")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, b"/etc/passwd")
    assert "would not stay" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", b"1")
        archive.writestr("a.py", b"2")
    assert "stands in the archive twice" in refusal(path)


@pytest.mark.parametrize("end", [0, 10, 2_000_000, -1])
def test_an_archive_cut_off_is_refused(archive: Path, end: int) -> None:
    archive.write_bytes(archive.read_bytes()[:end])
    assert "damaged" in refusal(archive)


def test_another_builders_archive_must_be_undamaged(tmp_path: Path) -> None:
    path = tmp_path / "a.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", b"print(1)")
    assert checksums.check_archive(path).startswith("undamaged; another builder's")
    path.write_bytes(path.read_bytes().replace(b"print(1)", b"print(2)"))
    assert "damaged (Bad CRC-32" in refusal(path)


# What process 1 makes of the environment.

CUDA_TORCH = "__version__ = '2.12.1'\ncuda: _Optional[str] = '13.0'\n"
CPU_TORCH = "__version__ = '2.12.1+cpu'\ncuda: _Optional[str] = None\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of that name on PATH; without a call there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(body: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


def test_the_gpu_image_ends_where_there_is_no_gpu(nvidia_smi: Callable[[str], None]) -> None:
    with pytest.raises(checksums.Refused, match="there is no GPU: run with --gpus all, or with -e MARINA_ALLOW_CPU=1"):
        serve.check_device(CUDA_TORCH, None, allow_cpu=False)
    nvidia_smi("echo NVIDIA-SMI has failed; exit 9")
    with pytest.raises(checksums.Refused, match="there is no GPU"):
        serve.check_device(CUDA_TORCH, None, allow_cpu=False)


def test_the_gpu_image_takes_the_cpu_aloud(
    nvidia_smi: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    serve.check_device(CUDA_TORCH, None, allow_cpu=True)
    assert capsys.readouterr().err == "serve: no GPU here, serving on the CPU, as MARINA_ALLOW_CPU=1 allows\n"


def test_the_gpu_image_is_silent_on_a_gpu_and_the_cpu_image_anywhere(
    nvidia_smi: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    serve.check_device(CPU_TORCH, None, allow_cpu=False)
    nvidia_smi("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'")
    serve.check_device(CUDA_TORCH, None, allow_cpu=False)
    serve.check_device(CUDA_TORCH, "0,1", allow_cpu=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_none(nvidia_smi: Callable[[str], None], visible: str) -> None:
    nvidia_smi("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'")
    with pytest.raises(checksums.Refused, match="there is no GPU"):
        serve.check_device(CUDA_TORCH, visible, allow_cpu=False)


def test_a_gpu_by_its_uuid_is_refused() -> None:
    """TorchServe would end, with exit code 0."""
    with pytest.raises(checksums.Refused, match="takes numbers alone"):
        serve.check_device(CUDA_TORCH, "GPU-8f7c", allow_cpu=False)


def test_torch_says_of_itself_what_it_was_built_for() -> None:
    path = serve.package("torch") / "version.py"
    assert bool(serve.CUDA_BUILD.search(path.read_text())) == (runpy.run_path(str(path))["cuda"] is not None)


@pytest.mark.parametrize(("text", "seconds"), [(None, 25), ("0", 0), ("2.5", 2.5)])
def test_grace(text: str | None, seconds: float) -> None:
    assert serve.grace_of(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "soon", "25s", "inf", "nan"])
def test_a_grace_that_is_none(text: str) -> None:
    with pytest.raises(checksums.Refused, match="MARINA_GRACE"):
        serve.grace_of(text)


@pytest.mark.parametrize("address", ["http://0.0.0.0:8083", "http://127.0.0.1:8080", "unix:/tmp/a"])
def test_torchserve_must_not_take_clients_itself(address: str) -> None:
    with pytest.raises(checksums.Refused, match="inference_address"):
        serve.backend_of(f"inference_address={address}\n")


# Process 1 itself, over a process that ends as TorchServe might.

DRIVER = """
import asyncio, sys
sys.path.insert(0, {docker!r})
from relay import Relay
from serve import Server
sys.exit(asyncio.run(Server(Relay({port}, ("127.0.0.1", {backend})), {grace}).run([sys.executable, "-c", {child!r}])))
"""


@contextmanager
def process_one(child: str, backend: int = 1, grace: float = LONG) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = bindable_port(LOOPBACK, 0)
    script = DRIVER.format(docker=str(DOCKER), port=port, backend=backend, grace=grace, child=child)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        yield p, port
        if p.poll() is None:
            p.kill()


@pytest.mark.parametrize(
    ("child", "code", "how"),
    [
        ("", 1, "with exit code 0"),
        ("raise SystemExit(3)", 3, "with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "by signal 9"),
    ],
)
def test_a_server_that_ends_by_itself_is_never_success(child: str, code: int, how: str) -> None:
    with process_one(child) as (process, _):
        assert process.wait(LONG) == code
        assert process.stderr.read() == f"serve: TorchServe ended by itself, {how}\n"


# Takes one connection, and answers it when a line comes in; says so when it is told to end.
ANSWERS_LATER = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: (print("told to end", flush=True), sys.exit(143)))
listener = socket.create_server(("127.0.0.1", {backend}))
listener.accept()[0].close()
client = listener.accept()[0]
client.recv(1 << 16)
print("asked", flush=True)
open({gate!r}).read()
client.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\nhi")
signal.pause()
"""


@pytest.fixture
def answers_later(tmp_path: Path) -> tuple[str, int, Path]:
    """A server's program, its port, and the pipe that lets it answer."""
    gate, port = tmp_path / "gate", bindable_port(LOOPBACK, 0)
    os.mkfifo(gate)
    return ANSWERS_LATER.format(backend=port, gate=str(gate)), port, gate


def ask_until_taken(port: int) -> http.client.HTTPConnection:
    while True:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=LONG)
        try:
            connection.request("POST", "/", b"picture")
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            return connection


def test_sigterm_ends_between_two_requests(answers_later: tuple[str, int, Path]) -> None:
    child, backend, gate = answers_later
    with process_one(child, backend) as (process, port):
        connection = ask_until_taken(port)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert "stopping" in process.stderr.readline()
        gate.write_text("now")
        assert connection.getresponse().read() == b"hi"
        assert process.wait(LONG) == 0
        assert process.stdout.read() == "told to end\n"
        assert process.stderr.read() == ""


def test_the_second_signal_stops_at_once(answers_later: tuple[str, int, Path]) -> None:
    child, backend, _ = answers_later
    with process_one(child, backend) as (process, port):
        connection = ask_until_taken(port)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
        assert process.stderr.read() == "serve: stopped before every answer under way was given\n"
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse()


def test_grace_has_an_end(answers_later: tuple[str, int, Path]) -> None:
    child, backend, _ = answers_later
    with process_one(child, backend, grace=0.1) as (process, port), closing(ask_until_taken(port)):
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
        assert "stopped before every answer" in process.stderr.read()


def test_sigterm_while_torchserve_starts_is_no_failure() -> None:
    with process_one("import signal; print('up', flush=True); signal.pause()") as (process, _):
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0


def test_a_server_that_dies_while_it_drains_is_a_failure(answers_later: tuple[str, int, Path]) -> None:
    child, backend, _ = answers_later
    with (
        process_one(child.replace('print("asked"', 'print(__import__("os").getpid()'), backend) as (
            process,
            port,
        ),
        closing(ask_until_taken(port)),
    ):
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert "stopping" in process.stderr.readline()
        os.kill(pid, signal.SIGKILL)
        assert process.wait(LONG) == 137
        assert "stopped before every answer" in process.stderr.read()
