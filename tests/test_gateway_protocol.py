"""Clients that trickle, stop or close one side, over real connections to a server with the gateway's protocol."""

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from certificates import write_certificates

from tools.gateway import protocol
from tools.gateway.protocol import GuardedProtocol

GET = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
# Until a test fails; what it waits for comes far sooner.
LONG_S = 30
# Of uvicorn's own timer, which must not do the work of ours.
NEVER_S = 3600
Connect = Callable[[], socket.socket]


async def answer(scope: dict, receive: Any, send: Any) -> None:
    """401 to /early before the body is read; to others 200, a while after the whole body."""
    status = 401
    if scope["path"] != "/early":
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(1.5 if scope["path"] == "/late" else 0.2)
        status = 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[..., Connect]:
    def start(**settings: Any) -> Connect:
        listener = socket.create_server(("127.0.0.1", 0))
        settings |= {"http": GuardedProtocol, "ws": "none", "lifespan": "off", "log_config": None}
        server = uvicorn.Server(uvicorn.Config(answer, timeout_keep_alive=NEVER_S, **settings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def stop() -> None:
            server.should_exit = server.force_exit = True
            thread.join()

        request.addfinalizer(stop)
        return lambda: socket.create_connection(listener.getsockname(), LONG_S)

    return start


@pytest.fixture
def connection(serve: Callable[..., Connect]) -> Iterator[socket.socket]:
    with serve()() as connection:
        yield connection


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PATIENCE_S", NEVER_S)


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PATIENCE_S", 1)


def read_answer(connection: socket.socket) -> bytes:
    read = b""
    while not read.endswith(b"done"):
        chunk = connection.recv(1000)
        assert chunk, read
        read += chunk
    return read.split(b"\r\n")[0]


def trickle_until_closed(connection: socket.socket, piece: bytes) -> None:
    deadline = time.monotonic() + LONG_S
    try:
        while time.monotonic() < deadline:
            connection.sendall(piece)
            time.sleep(0.01)
    except OSError:
        return
    pytest.fail("the connection is still open")


def test_the_rest_of_an_answered_body_may_not_trickle_for_ever(impatient: None, connection: socket.socket) -> None:
    connection.sendall(POST + b"x")
    assert read_answer(connection) == b"HTTP/1.1 401 Unauthorized"
    connection.sendall(b"y")
    trickle_until_closed(connection, b"z")


@pytest.mark.parametrize(("begin", "piece"), [(b"GET /", b"x"), (b"", b"\r\n")], ids=["a head", "empty lines"])
def test_the_next_request_may_not_trickle_for_ever(
    impatient: None, connection: socket.socket, begin: bytes, piece: bytes
) -> None:
    connection.sendall(GET)
    assert read_answer(connection) == b"HTTP/1.1 200 OK"
    connection.sendall(begin)
    trickle_until_closed(connection, piece)


def test_the_first_request_may_not_trickle_for_ever(impatient: None, connection: socket.socket) -> None:
    connection.sendall(b"GET /")
    trickle_until_closed(connection, b"x")


def test_an_answer_may_take_longer_than_a_client(impatient: None, connection: socket.socket) -> None:
    connection.sendall(GET.replace(b"slow", b"late"))
    assert read_answer(connection) == b"HTTP/1.1 200 OK"


def test_a_client_that_sends_its_whole_body_first_still_reads_the_answer_and_asks_on(connection: socket.socket) -> None:
    for _ in range(2):
        connection.sendall(POST)
        for _ in range(10):
            connection.sendall(b"x" * 100)
            time.sleep(0.01)
        assert read_answer(connection) == b"HTTP/1.1 401 Unauthorized"
    connection.sendall(GET)
    assert read_answer(connection) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("requests", [1, 2])
def test_a_client_that_closes_its_side_behind_whole_requests_is_answered(
    connection: socket.socket, requests: int
) -> None:
    connection.sendall(requests * GET)
    connection.shutdown(socket.SHUT_WR)
    read = b""
    while chunk := connection.recv(1000):
        read += chunk
    assert read.count(b"HTTP/1.1 200 OK") == read.count(b"done") == requests


def test_a_client_that_closes_its_side_behind_an_answer_is_let_go(connection: socket.socket) -> None:
    connection.sendall(GET)
    read_answer(connection)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""


@pytest.mark.parametrize("sent", [b"", GET[:9], POST.replace(b"early", b"slow") + b"x"], ids=["none", "head", "body"])
def test_a_client_that_closes_its_side_before_is_let_go(connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""


def test_over_tls_a_client_that_goes_is_nothing_to_log(
    serve: Callable[..., Connect], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_certificates(tmp_path)
    connect = serve(ssl_certfile=files.certificate, ssl_keyfile=files.key)
    context = ssl.create_default_context(cafile=files.authority)
    with caplog.at_level(logging.WARNING), context.wrap_socket(connect(), server_hostname="127.0.0.1") as connection:
        connection.sendall(GET)
        connection.unwrap().close()
    with context.wrap_socket(connect(), server_hostname="127.0.0.1") as connection:
        connection.sendall(GET)
        assert read_answer(connection) == b"HTTP/1.1 200 OK"
    assert not caplog.records
