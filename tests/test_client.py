"""The client against a REST server of our own: what is tried again, the order of answers, what stays in memory."""

import asyncio
import gc
import json
import os
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools.client import retry
from tools.client.answer import Answer, Detection
from tools.client.client import AsyncClient, Client
from tools.client.errors import ServerFailed, ServerRefused, ServerUnavailable
from tools.client.retry import attempt
from tools.client.sources import Shots, Source
from tools.client.transports import retry_after
from tools.errors import ToolError

TOKEN = "s3cret_-"
DETECTION = {"label": "dog", "index": 3, "score": 0.912345, "box": [1.5, 2.0, 30.125, 40.0]}


def answer(body: bytes) -> tuple[int, dict[str, str], Any]:
    """What a server says to `body`: as if the picture were one pixel wide for each of its bytes."""
    content = {"model": "dogs", "version": "1.0", "width": len(body), "height": 9, "detections": [DETECTION]}
    return 200, {}, content | {"timing_ms": {"inference": 1.5}}


def refusal(status: int, kind: str, message: str = "no") -> tuple[int, dict[str, str], Any]:
    return status, {}, {"code": status, "type": kind, "message": message}


class Server:
    """says: from the path, headers and body of a request to status, headers and content; None drops the connection.
    seen: the requests."""

    def __init__(self, says: Callable[[str, Any, bytes], tuple[int, dict[str, str], Any] | None]):
        self.seen: list[tuple[str, Any, bytes]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.seen.append((self.path, self.headers, body))
                said = says(self.path, self.headers, body)
                if said is None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                status, headers, content = said
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def finish(self) -> None:
                if not self.connection._closed:
                    super().finish()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(says: Callable[..., Any] = lambda path, headers, body: answer(body)) -> Server:
        servers.append(Server(says))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def closed_url() -> str:
    """Of a port where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)


class SkippingLoop(asyncio.SelectorEventLoop):
    """Its clock goes forward by as much as it would wait, and it does not wait."""

    def __init__(self) -> None:
        loop = self
        self.now = 0.0

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> Any:
                loop.now += timeout or 0.0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def without_waiting(work: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
    """The result and the seconds that it would have taken."""
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        result = runner.run(work)
        return result, runner.get_loop().time()


def test_an_answer_is_read_whole_and_written_as_it_was(serve):
    server = serve()
    with Client(server.url, "dogs", token=TOKEN, options={"score_threshold": 0.4, "class_agnostic": True}) as client:
        got = client.predict(b"four")
    assert got == Answer(
        "picture", "dogs", "1.0", 4, 9, (Detection("dog", 3, 0.912345, (1.5, 2.0, 30.125, 40.0)),), {"inference": 1.5}
    )
    assert Answer.from_json(json.loads(json.dumps(got.to_json()))) == got
    ((path, headers, body),) = server.seen
    assert (path, body, headers["Authorization"]) == ("/predictions/dogs", b"four", f"Bearer {TOKEN}")
    assert headers["Marina-Format"] == "detections"
    assert (headers["Marina-Score-Threshold"], headers["Marina-Class-Agnostic"]) == ("0.4", "true")


@pytest.mark.parametrize(
    "given",
    [
        Answer("a.mp4", "m", "2", 5, 6, (Detection("x", 0, 0.5, (0.0, 1.0, 2.0, 3.0), track=7),), {}, 12, 0.4),
        Answer("a.jpg", error="broken"),
        Answer("a.mp4", frame=3, seconds=0.1, error="broken"),
    ],
)
def test_answers_survive_json(given):
    assert Answer.from_json(json.loads(json.dumps(given.to_json()))) == given


@pytest.mark.parametrize("wrong", [{"score": float("nan")}, {"box": [1, 2, 3]}, {"box": None}, {"index": "first"}])
def test_a_detection_without_sense_is_refused(wrong):
    with pytest.raises((TypeError, ValueError)):
        Detection.from_json(DETECTION | wrong)


def test_names_are_quoted_and_a_version_goes_into_the_path(serve):
    server = serve()
    with Client(server.url + "/", "a/../b", version="1 0") as client:
        client.predict(b"x")
    assert server.seen[0][0] == "/predictions/a%2F..%2Fb/1%200"


def test_options_beyond_ascii_go_as_fields(serve):
    server = serve()
    with Client(server.url, "dogs", options={"classes": ["Straße", "犬"]}) as client:
        client.predict(b"\xff\xd8pixels")
    ((_, headers, body),) = server.seen
    assert headers["Content-Type"].startswith("multipart/form-data")
    assert "Straße,犬".encode() in body
    assert b"\xff\xd8pixels" in body


def test_a_busy_server_is_asked_again(serve, no_waits):
    left = [429, 503, 503]
    server = serve(lambda path, headers, body: (left.pop(), {}, b"busy") if left else answer(body))
    with Client(server.url, "dogs") as client:
        assert client.predict(b"x").width == 1
    assert len(server.seen) == 4


def test_what_a_server_that_dies_leaves_unanswered_is_asked_again(serve, no_waits):
    """A worker that is killed, by what TorchServe says then; the server itself, by the lost connection."""
    died = [refusal(status, "InternalServerException", "Worker died.") for status in (500, 507)]
    left = [*died, None]
    server = serve(lambda path, headers, body: left.pop() if left else answer(body))
    with Client(server.url, "dogs") as client:
        assert client.predict(b"x").width == 1
    assert len(server.seen) == 4


def test_a_token_file_is_read_again_when_its_token_is_refused(serve, no_waits, tmp_path):
    """As that of a TorchServe that was started again under the client."""
    token = tmp_path / "token"
    token.write_text("old")

    def says(path, headers, body):
        if headers["Authorization"] == "Bearer new":
            return answer(body)
        if len(server.seen) == 2:
            token.write_text("new\n")
        return refusal(400, "InvalidKeyException")

    server = serve(says)
    with Client(server.url, "dogs", token=token) as client:
        assert client.predict(b"x").width == 1
    assert [headers["Authorization"] for _, headers, _ in server.seen] == ["Bearer old", "Bearer old", "Bearer new"]
    with Client(server.url, "dogs", token="old") as client, pytest.raises(ServerRefused, match="InvalidKeyException"):
        client.predict(b"x")


def test_a_server_that_stays_busy_is_given_up(serve, no_waits):
    server = serve(lambda path, headers, body: (503, {}, b"busy"))
    with (
        Client(server.url, "dogs", retries=2) as client,
        pytest.raises(ServerUnavailable, match=r"busy or down \(503\)"),
    ):
        client.predict(b"x")
    assert len(server.seen) == 3


def test_a_server_that_is_not_there_is_asked_again(closed_url, no_waits, monkeypatch):
    asked = []
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: asked.append(high) or 0.0)
    with Client(closed_url, "dogs", retries=2) as client, pytest.raises(ServerUnavailable, match="is the server up"):
        client.predict(b"x")
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (refusal(500, "ModelFailure"), ServerRefused),
        (refusal(400, "InvalidOption"), ServerRefused),
        ((200, {}, b"<html>hello</html>"), ServerFailed),
        ((200, {}, [{"dog": [1, 2, 3, 4], "score": 0.9}]), ServerFailed),
        ((200, {}, {"model": "m", "version": "1", "width": 1, "height": 1, "detections": [{}]}), ServerFailed),
        ((200, {}, {"code": 415, "type": "UnsupportedMedia", "message": "no picture"}), ServerRefused),
    ],
)
def test_what_was_sent_and_failed_is_not_sent_again(serve, said, kind):
    server = serve(lambda path, headers, body: said)
    with Client(server.url, "dogs") as client, pytest.raises(kind):
        client.predict(b"x")
    assert len(server.seen) == 1


def test_the_package_offers_the_clients():
    from tools.client import AsyncClient as AsyncOne
    from tools.client import Client as One

    assert (AsyncOne, One) == (AsyncClient, Client)
    with pytest.raises(ImportError, match="Nothing"):
        from tools.client import Nothing  # noqa: F401


def test_a_gateway_asked_as_a_torchserve_is_told(serve):
    server = serve(lambda path, headers, body: refusal(404, "NotFound", f"POST {path}: Not Found"))
    with Client(server.url, "dogs") as client, pytest.raises(ServerRefused, match="use the protocol kserve"):
        client.predict(b"x")


def test_a_torchserve_asked_as_a_gateway_is_told(serve):
    server = serve(lambda path, headers, body: refusal(415, "UnsupportedMedia", "no picture"))
    with Client(server.url, "dogs", protocol="kserve") as client, pytest.raises(ServerFailed) as caught:
        list(client.predict_many([b"x"]))
    assert "no picture; use the protocol rest" in str(caught.value)


@pytest.mark.parametrize(
    ("told", "kind", "of_picture"),
    [
        ({}, "Refused", True),
        ({"type": "EmptyBody"}, "EmptyBody", True),
        ({"type": "InvalidOption"}, "InvalidOption", False),
    ],
)
def test_kserve_bears_the_name_that_a_gateway_gives(serve, told, kind, of_picture):
    server = serve(lambda path, headers, body: (400, {}, {"error": "no"} | told))
    with Client(server.url, "dogs", protocol="kserve") as client, pytest.raises(ServerRefused) as caught:
        client.predict(b"x")
    assert (caught.value.status, caught.value.kind, caught.value.of_picture) == (400, kind, of_picture)


def test_a_refusal_says_what_the_server_says(serve):
    server = serve(lambda path, headers, body: refusal(400, "InvalidKeyException", "Token Authorization failed"))
    with Client(server.url, "dogs") as client, pytest.raises(ServerRefused) as caught:
        client.predict(b"x")
    assert (caught.value.status, caught.value.kind, caught.value.of_picture) == (400, "InvalidKeyException", False)
    assert "--token-file" in str(caught.value)


async def _until(failures: int, result: str, retry_after: float | None = None) -> Callable[[], Any]:
    left = [None] * failures

    async def ask() -> str:
        if left:
            left.pop()
            raise ServerUnavailable("busy", retry_after)
        return result

    return ask


@pytest.mark.parametrize(("wish", "least", "most"), [(None, 0.125 + 0.25 + 0.5, 0.25 + 0.5 + 1.0), (5.0, 15.0, 15.0)])
def test_waits_double_with_jitter_or_last_as_the_server_wishes(wish, least, most):
    async def work() -> str:
        return await attempt(await _until(3, "done", wish), retries=3, timeout=100)

    result, seconds = without_waiting(work())
    assert result == "done"
    assert least <= seconds <= most + 0.01


def test_waits_differ_from_client_to_client():
    async def work() -> str:
        return await attempt(await _until(3, "done"), retries=3, timeout=100)

    assert len({without_waiting(work())[1] for _ in range(5)}) == 5


def test_no_answer_in_time_is_one_failure_over_all_attempts():
    async def work() -> None:
        async def ask() -> None:
            await asyncio.sleep(1000)

        with pytest.raises(ServerFailed, match="no answer within 7 s"):
            await attempt(ask, retries=3, timeout=7)

    assert without_waiting(work())[1] == pytest.approx(7, abs=0.1)


def test_a_wait_beyond_the_time_limit_is_not_begun():
    async def work() -> None:
        with pytest.raises(ServerUnavailable):
            await attempt(await _until(1, "done", 60.0), retries=3, timeout=30)

    assert without_waiting(work())[1] < 0.1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("7", 7.0), (" 7 ", 7.0), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after_is_a_number_or_a_date(value, seconds):
    assert retry_after(value) == seconds


class SlowFirst(AsyncClient):
    """Answers later pictures first, without a server, and counts what is under way."""

    def __init__(self, concurrency: int):
        super().__init__("http://nowhere", "m", concurrency=concurrency)
        self._transport = self
        self.under_way = self.most = 0

    async def predict(self, body: Any, options: Any = None) -> Answer:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.1 if int(body) % 7 == 0 else 0.0)
        self.under_way -= 1
        return Answer("", "m", "1", int(body), 1)

    async def aclose(self) -> None:
        pass


def test_ten_thousand_pictures_come_in_order_a_few_at_a_time():
    read, held = 0, 0

    def pictures() -> Iterator[bytes]:
        nonlocal read
        for number in range(10_000):
            read += 1
            yield str(number).encode()

    async def work() -> list[int]:
        nonlocal held
        widths = []
        client = SlowFirst(8)
        async for got in client.predict_many(pictures()):
            widths.append(got.width)
            held = max(held, read - len(widths))
        assert client.most <= 8
        return widths

    widths, _ = without_waiting(work())
    assert widths == list(range(10_000))
    assert held <= 2 * 8


def test_as_many_requests_as_allowed_are_under_way():
    class Together(SlowFirst):
        async def predict(self, body: Any, options: Any = None) -> Answer:
            self.under_way += 1
            await self.barrier.wait()
            # Time for one too many to come.
            await asyncio.sleep(0.02)
            self.most = max(self.most, self.under_way)
            self.under_way -= 1
            return Answer("")

    async def work() -> tuple[int, int]:
        client = Together(8)
        client.barrier = asyncio.Barrier(8)
        return len([got async for got in client.predict_many([b"0"] * 80)]), client.most

    assert asyncio.run(work()) == (80, 8)


def test_a_slow_reader_holds_the_sources_back():
    read = []

    async def work() -> None:
        sources = (read.append(number) or str(number).encode() for number in range(1000))
        async with aclosing(SlowFirst(4).predict_many(sources)) as answers:
            await anext(answers)
            for _ in range(50):
                await asyncio.sleep(1)

    without_waiting(work())
    assert len(read) <= 2 * 4


def test_a_bad_picture_is_told_and_the_others_go_on(serve, tmp_path):
    for name, body in {"a.jpg": b"good", "b.jpg": b"bad", "c.jpg": b"good"}.items():
        (tmp_path / name).write_bytes(body)
    server = serve(
        lambda path, headers, body: answer(body) if body == b"good" else refusal(400, "InvalidImage", "torn")
    )
    given = [tmp_path, tmp_path / "a.jpg"]
    with Client(server.url, "dogs") as client:
        got = list(client.predict_many(given))
    assert [(Path(one.source).name, one.error) for one in got] == [
        ("a.jpg", None),
        ("b.jpg", "torn (400 InvalidImage)"),
        ("c.jpg", None),
        ("a.jpg", None),
    ]


def test_a_file_that_cannot_be_read_or_is_huge_is_told_and_the_others_go_on(serve, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"good")
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 1 << 40)
    sources = [Source("picture", tmp_path / name) for name in ("gone.jpg", "huge.jpg", "a.jpg")]
    with Client(serve().url, "dogs") as client:
        gone, huge, good = (asked.answer for asked in client.ask(Shots(sources)))
    assert "cannot be read (No such file" in str(gone.error)
    assert "1,099,511,627,776 bytes" in str(huge.error)
    assert good.error is None


@pytest.mark.parametrize("kind", ["InvalidKeyException", "InvalidOption", "ModelNotFoundException"])
def test_what_would_meet_every_picture_ends_the_run(serve, kind):
    server = serve(lambda path, headers, body: refusal(400, kind))
    with Client(server.url, "dogs", concurrency=2) as client, pytest.raises(ServerRefused, match=kind):
        list(client.predict_many([b"x"] * 500))
    assert len(server.seen) < 20


def test_a_source_that_fails_ends_the_run_after_what_came_before(serve):
    def sources() -> Iterator[bytes]:
        yield b"x"
        raise RuntimeError("the camera fell down")

    got = []
    with Client(serve().url, "dogs") as client, pytest.raises(RuntimeError, match="fell down"):
        got.extend(client.predict_many(sources()))
    with Client(serve().url, "dogs") as client, pytest.raises(ToolError, match="is not there"):
        list(client.predict_many("nowhere.jpg"))


def test_one_may_stop_in_the_middle(serve):
    server = serve()
    with Client(server.url, "dogs", concurrency=2) as client:
        answers = client.predict_many(b"x" * (number + 1) for number in range(1000))
        assert [next(answers).width for _ in range(3)] == [1, 2, 3]
        answers.close()
        assert client.predict(b"xx").width == 2
    assert len(server.seen) < 20


def test_an_interrupt_ends_the_requests_and_the_client_can_be_closed(serve):
    main = threading.get_ident()
    first_taken, interrupted, waited = threading.Event(), threading.Event(), threading.Event()

    def says(path: str, headers: Any, body: bytes) -> Any:
        if body == b"hold":
            first_taken.wait(10)
            time.sleep(0.1)  # until the next one is waited for
            signal.pthread_kill(main, signal.SIGINT)
            if not interrupted.wait(10):
                waited.set()
        return answer(body)

    server = serve(says)
    with Client(server.url, "dogs", concurrency=1) as client:
        answers = client.predict_many([b"x", b"hold", *[b"x"] * 100])
        next(answers)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the interrupt may come no earlier
            first_taken.set()
            next(answers)
        interrupted.set()
        assert not waited.is_set()
        assert client.predict(b"xx").width == 2
    client.close()
    assert len(server.seen) < 20


def test_the_sync_client_works_inside_an_event_loop(serve):
    server = serve()

    async def notebook() -> int:
        with Client(server.url, "dogs") as client:
            return client.predict(b"xyz").width

    assert asyncio.run(notebook()) == 3


def test_the_async_client_asks_for_one_and_many(serve):
    server = serve()

    async def work() -> list[int]:
        async with AsyncClient(server.url, "dogs") as client:
            one = await client.predict(b"x")
            return [one.width, *[got.width async for got in client.predict_many([b"xx", b"xxx"])]]

    assert asyncio.run(work()) == [1, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"retries": -1}, {"timeout": 0}, {"options": {"format": "coco"}}, {"protocol": "grpc"}],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ToolError):
        Client("nowhere", "m", **wrong)


def test_an_address_that_is_none_is_refused():
    with Client("nowhere", "m") as client, pytest.raises(ToolError, match="give one such as"):
        client.predict(b"x")
    with Client("http://nowhere", "m") as client, pytest.raises(ToolError, match="no single picture"):
        client.predict(Path(__file__).parent.parent / "archives" / "shapes" / "golden")


def test_a_client_that_is_closed_leaves_no_task_behind(closed_url, caplog):
    client = Client(closed_url, "dogs")
    left = asyncio.run_coroutine_threadsafe(asyncio.sleep(60), client._loop)
    client.close()
    gc.collect()
    assert left.cancelled()
    assert caplog.text == ""
