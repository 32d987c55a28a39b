"""tools.serve.asgi in parts: bodies, frames, batches, figures, routes; and when a server is started again."""

import asyncio
import contextlib
import io
import json
import threading
import time
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.errors import ToolError
from tools.serve.asgi import app as app_module
from tools.serve.asgi.app import App
from tools.serve.asgi.counters import Counters
from tools.serve.asgi.model import Asked, Model, Settings, Worker
from tools.serve.asgi.reply import Refusal, Reply
from tools.serve.asgi.rows import MOST_FIELDS, BadForm, read_row
from tools.serve.asgi.server import AsgiServer, _Gpus, _workers
from tools.serve.asgi.wire import Frames, pack, read_frame
from tools.serve.asgi.worker import Batches
from tools.serve.supervise import LONGEST_PAUSE_S, MOST_STARTS, UP_S, Restarts

BOUNDARY = "xxBOUNDxx"


def row(content_type: str | None, body: bytes, query: str = "") -> dict[str, Any]:
    return read_row({} if content_type is None else {"content-type": content_type}, query, body)


def form(*parts: tuple[str, bytes]) -> bytes:
    """parts: what follows `form-data; `, further headers included, and the content."""
    whole = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return whole + f"--{BOUNDARY}--\r\n".encode()


FORM = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        (None, b"\xff\xd8", b"\xff\xd8"),
        ("image/jpeg", b"\xff\xd8", b"\xff\xd8"),
        ("application/json", b'{"a": [1]}', {"a": [1]}),
        ("Application/JSON; charset=utf-8", b'{"a": 1}', {"a": 1}),
        ("application/json", b'{"a": ', b'{"a": '),
        ("application/json", b"[" * 100_000, b"[" * 100_000),
        ("text/plain", "ä".encode(), "ä"),
        ("text/plain", b"\xff", b"\xff"),
    ],
)
def test_a_body_is_what_its_type_says_as_long_as_it_is(content_type: str | None, body: bytes, expected: object) -> None:
    assert row(content_type, body) == {"body": expected}


def test_fields_of_a_form() -> None:
    body = form(
        ('name="data"; filename="a.jpg"\r\nContent-Type: image/jpeg', b"\xff\xd8\r\n--x"),
        ('name="classes"', b"one"),
        ('name="classes"', b"two"),
        ('name="said"\r\nContent-Type: application/json', b"{}"),
        ('name="text"; filename="b.txt"\r\nContent-Type: text/plain', b"b64"),
    )
    expected = {"data": b"\xff\xd8\r\n--x", "classes": b"two", "said": b"{}", "text": "b64"}
    assert row(FORM, body) == expected
    assert row(FORM, body, "classes=zero&format=coco") == expected | {"format": b"coco"}


def test_fields_of_an_encoded_form_and_of_a_query() -> None:
    assert row("application/x-www-form-urlencoded", urlencode({"data": "aä+"}).encode()) == {"data": "aä+".encode()}
    assert row("image/png", b"x", "max_detections=1&body=2") == {"body": b"x", "max_detections": b"1"}
    too_many = "&".join(f"a{i}=1" for i in range(MOST_FIELDS + 1))
    assert row("application/x-www-form-urlencoded", too_many.encode()) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no boundary",
        form(('name="a"', b"1"))[:-8],
        form(*((f'name="a{i}"', b"") for i in range(MOST_FIELDS + 1))),
        form(('name="a"\r\nX: ' + "x" * 30_000, b"")),
    ],
)
def test_a_form_that_is_none_is_told(body: bytes) -> None:
    with pytest.raises(BadForm):
        row(FORM, body)


@given(
    st.binary(max_size=300), st.sampled_from([FORM, "multipart/form-data", "application/x-www-form-urlencoded", ";"])
)
def test_any_bytes_become_fields_or_a_refusal(body: bytes, content_type: str) -> None:
    with contextlib.suppress(BadForm):
        assert isinstance(row(content_type, body), dict)


@given(
    st.lists(st.tuples(st.dictionaries(st.text(), st.integers()), st.binary())),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_frames_come_whole_however_they_are_cut(frames: list[tuple[dict[str, int], bytes]], cuts: list[int]) -> None:
    stream = b"".join(pack(head, len(body)) + body for head, body in frames)
    reader, found, position, turn = Frames(), [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        found += reader.feed(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert found == frames
    source = io.BytesIO(stream[:-1])
    for frame in frames[:-1]:
        assert read_frame(source) == frame
    assert read_frame(source) is None


def test_a_lone_client_never_waits_for_a_batch() -> None:
    batches = Batches(8, 1000.0)
    for number in range(3):
        batches.put(number, "job")
        batch = batches.next()
        assert [number for number, _ in batch] == [number]
        batches.done(batch)


def test_a_batch_waits_for_those_who_were_there_last_time() -> None:
    batches = Batches(8, 1000.0)
    for number in range(3):
        batches.put(number, "job")
    batch = batches.next()
    assert [number for number, _ in batch] == [0, 1, 2]
    batches.done(batch)
    batches.put(3, "job")
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(batches.next()))
    waiting.start()
    for number in (4, 5):
        assert waiting.is_alive()
        batches.put(number, "job")
    waiting.join(timeout=60)
    assert [number for number, _ in found[0]] == [3, 4, 5]


def test_a_batch_is_never_larger_than_said_nor_waits_for_ever() -> None:
    batches = Batches(2, 0.01)
    for number in range(3):
        batches.put(number, "job")
    first = batches.next()
    assert len(first) == 2
    batches.done(first)
    assert len(batches.next()) == 1


def test_figures_as_prometheus_reads_them() -> None:
    counters = Counters()
    counters.add("a", 1, {"label": 'say "hi"\n\\'})
    counters.add("a", 0.5, {"label": 'say "hi"\n\\'})
    counters.add("b", 2, {})
    expected = ["# TYPE a counter", r'a{label="say \"hi\"\n\\"} 1.5', "# TYPE b counter", "b{} 2", ""]
    assert counters.text() == "\n".join(expected)


def settings(name: str = "m", version: str = "1.0", **changes: Any) -> Settings:
    values: dict[str, Any] = {"folder": "", "config": "", "gpus": [None], "batch_size": 1, "batch_delay": 0.0}
    values |= {"queue_size": 1, "start_s": 60.0, "answer_s": 60.0}
    return Settings(name=name, version=version, **(values | changes))


class Scripted(Model):
    """A model that answers with what it was asked."""

    async def ask(self, head: dict[str, Any], body: bytes) -> Reply:
        told = {"version": self.settings.version, "query": head["query"], "explain": head["headers"]["explain"]}
        return Reply(200, "application/json", json.dumps(told | {"size": len(body)}).encode())


def ask(
    app: App, path: str, body: bytes = b"", port: int = 8080, query: str = "", chunk: int = 1000, **headers: str
) -> tuple[int, dict[bytes, bytes], Any]:
    """One request, as a server gives it to an application."""
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = {"content_length": str(len(body))} | headers
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": pairs, "server": ("", port)}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    start, content = sent
    text = content["body"]
    return start["status"], dict(start["headers"]), json.loads(text) if text.startswith(b"{") else text.decode()


def make_app(**changes: Any) -> App:
    counters = Counters()
    models = [Scripted(settings(*key), counters, pytest.fail) for key in (("m", "2.0"), ("m", "1.0"), ("n", "1.0"))]
    values: dict[str, Any] = {"token": "secret", "most_bytes": 5000, "metrics_port": 8082}
    return App(models, counters, **(values | changes))


TOKEN = {"authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("path", "query", "expected"),
    [
        ("/predictions/m", "a=1", {"version": "2.0", "query": "", "explain": "False"}),
        ("/predictions/m/1.0", "", {"version": "1.0"}),
        ("/explanations/m", "", {"version": "2.0", "explain": "True"}),
        ("/v1/models/m:predict", "a=1", {"version": "2.0", "query": ""}),
        ("/models/m/1.0/invoke", "a=1", {"version": "1.0", "query": "a=1"}),
        ("/invocations", "model_name=n&a=1", {"version": "1.0", "query": "model_name=n&a=1"}),
    ],
)
def test_routes(path: str, query: str, expected: dict[str, str]) -> None:
    status, _, told = ask(make_app(), path, b"x", query=query, **TOKEN)
    assert status == 200
    assert told.items() >= expected.items()


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/predictions/x", 404, "ModelNotFoundException"),
        ("/predictions/m/3.0", 404, "ModelVersionNotFoundException"),
        ("/predictions/m/1.0/x", 404, "ResourceNotFoundException"),
        ("/invocations", 404, "ModelNotFoundException"),
        ("/", 404, "ResourceNotFoundException"),
        ("/metrics", 404, "ResourceNotFoundException"),
    ],
)
def test_what_is_not_there(path: str, status: int, kind: str) -> None:
    found, _, told = ask(make_app(), path, **TOKEN)
    assert (found, told["code"], told["type"]) == (status, status, kind)


def test_without_the_token_nothing_is_told() -> None:
    for path in ("/ping", "/predictions/m", "/predictions/x", "/"):
        for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            status, _, told = ask(make_app(), path, **headers)
            assert (status, told["type"]) == (400, "InvalidKeyException")
    assert ask(make_app(token=None), "/predictions/m")[0] == 200


def test_ping_tells_of_models_without_a_worker() -> None:
    app = make_app()
    for name, version in (("m", "1.0"), ("n", "1.0")):
        ready_worker(app._models[name][version], 0)
    status, headers, told = ask(app, "/ping", **TOKEN)
    assert (status, told) == (500, {"status": "Unhealthy", "down": ["m_2.0"]})
    assert b"connection" not in headers
    ready_worker(app._models["m"]["2.0"], 0)
    assert ask(app, "/ping", **TOKEN)[::2] == (200, {"status": "Healthy"})


def test_a_request_is_never_larger_than_said() -> None:
    assert ask(make_app(), "/predictions/m", bytes(5000), **TOKEN)[2]["size"] == 5000
    for announced in ({}, {"content_length": "0", "transfer_encoding": "chunked"}):
        status, headers, told = ask(make_app(), "/predictions/m", bytes(5001), **TOKEN, **announced)
        assert (status, told["type"], headers[b"connection"]) == (413, "RequestTooLarge", b"close")


def test_a_body_that_stops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_S", 0.01)
    statuses = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(600)
        return {}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    headers = [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "path": "/predictions/m", "query_string": b"", "headers": headers, "server": ("", 8080)}
    asyncio.run(make_app(token=None)(scope, receive, send))  # type: ignore[arg-type]
    assert statuses[0] == 408


def test_the_metrics_port_shows_figures_and_nothing_else() -> None:
    app = make_app()
    ask(app, "/predictions/m", **TOKEN)
    status, _, text = ask(app, "/metrics", port=8082)
    assert status == 200
    assert 'Requests2XX{Level="Host",Hostname=' in text
    assert ask(app, "/predictions/m", port=8082, **TOKEN)[0] == 404


def test_a_full_model_refuses_before_it_reads() -> None:
    app = make_app()
    model = app._models["n"]["1.0"]
    with model.place(), model.place(), model.place():
        status, headers, told = ask(app, "/predictions/n", b"x", **TOKEN)
        assert (status, told["type"], headers[b"retry-after"]) == (503, "ServiceUnavailableException", b"1")
        assert ask(app, "/predictions/m", **TOKEN)[0] == 200
    assert ask(app, "/predictions/n", **TOKEN)[0] == 200


class Pipe:
    """Takes what goes to a worker."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def writelines(self, parts: list[bytes]) -> None:
        self.sent.append(parts[-1])


class Process:
    pid = 7

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        pass


def ready_worker(model: Model, slot: int) -> Worker:
    worker = Worker(model, slot, Process(), 0.0)  # type: ignore[arg-type]
    worker._transport = Pipe()  # type: ignore[assignment]
    model._workers.append(worker)
    model.take(worker, {"ready": True}, b"")
    return worker


def test_requests_go_to_whoever_has_least_to_do_and_to_the_next_one_where_it_dies() -> None:
    async def work() -> None:
        model = Model(settings(gpus=[None, None]), Counters(), pytest.fail)
        first, second = ready_worker(model, 0), ready_worker(model, 1)
        replies = [asyncio.ensure_future(model.ask({}, body)) for body in (b"a", b"b", b"c", b"d", b"e")]
        await asyncio.sleep(0)
        # One at work, one behind it, each; the last one waits.
        assert [[a.body for a in w.outstanding.values()] for w in (first, second)] == [
            [b"a", b"c"],
            [b"b", b"d"],
        ]
        model._run = lambda work: work.close()  # type: ignore[method-assign]
        model.lost(first)
        model.take(second, {"id": next(iter(second.outstanding)), "status": 200, "type": "t"}, b"B")
        assert (await replies[1]).body == b"B"
        assert [asked.body for asked in second.outstanding.values()] == [b"d", b"a"]
        model.lost(second)
        # The one that had two workers die is told so; the others go on.
        assert (await replies[0]).status == 500
        third = ready_worker(model, 0)
        assert [asked.body for asked in third.outstanding.values()] == [b"d", b"c"]

    asyncio.run(work())


def test_a_worker_that_hangs_is_ended_and_only_who_waited_long_is_refused() -> None:
    async def work() -> None:
        model = Model(settings(answer_s=5.0), Counters(), pytest.fail)
        worker = ready_worker(model, 0)
        replies = [asyncio.ensure_future(model.ask({}, body)) for body in (b"old", b"new")]
        await asyncio.sleep(0)
        old, new = worker.outstanding.values()
        assert isinstance(old, Asked)
        now = time.monotonic()
        old.sent, new.sent = now - 6, now - 1
        assert worker.stuck_since() == old.sent
        model._end_stuck(worker, now)
        assert json.loads((await replies[0]).body)["type"] == "WorkerTimeout"
        assert list(worker.outstanding.values()) == [new]

    asyncio.run(work())


def test_where_no_worker_comes_up_nobody_waits() -> None:
    async def work() -> None:
        model = Model(settings(queue_size=9), Counters(), pytest.fail)
        worker = ready_worker(model, 0)
        # An answer to a request that was given up is nobody's.
        model.take(worker, {"id": 99, "status": 200, "type": "t"}, b"")
        replies = [asyncio.ensure_future(model.ask({}, b"a")) for _ in range(3)]
        await asyncio.sleep(0)
        model._workers.remove(worker)
        worker.ready = False
        replacing = asyncio.ensure_future(model._replace(worker))
        assert json.loads((await replies[2]).body)["code"] == 503
        with pytest.raises(Refusal), model.place():
            pass
        replacing.cancel()
        ready_worker(model, 0)
        with model.place():
            pass

    asyncio.run(work())


def test_a_server_that_stays_up_is_started_at_once_and_for_ever() -> None:
    restarts = Restarts()
    assert [restarts.pause(UP_S) for _ in range(100)] == [0] * 100


def test_a_server_that_does_not_stay_up_is_started_after_growing_pauses_and_then_no_more() -> None:
    restarts = Restarts()
    pauses = [restarts.pause(0) for _ in range(MOST_STARTS)]
    assert pauses[:5] == [0, 1, 2, 4, 8]
    assert pauses[5:] == [LONGEST_PAUSE_S] * (MOST_STARTS - 5)
    assert restarts.pause(0) is None
    assert restarts.pause(UP_S) == 0


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        ({}, 1),
        ({"minWorkers": 2}, 1),
        ({"minWorkers": 2, "maxWorkers": 3}, 2),
        ({"minWorkers": 2, "maxWorkers": 1}, 1),
        ({"minWorkers": "2", "maxWorkers": 3}, 1),
    ],
)
def test_as_many_workers_as_torchserve_starts(config: dict[str, Any], workers: int) -> None:
    assert _workers(config) == workers


def test_gpus_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f, 3")
    gpus = _Gpus()
    assert [gpus.next() for _ in range(3)] == [0, 1, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert _Gpus().next() is None


def test_an_archive_of_others_is_refused_in_one_line(tmp_path: Any) -> None:
    from tiny_archive import write_archive

    write_archive(tmp_path / "a.mar", "a")
    with pytest.raises(Exception, match=r"a\.mar: has no handlers/worker\.py.*--engine torchserve"):
        AsgiServer(tmp_path, port=0).start()


def test_what_the_engine_does_not_have_is_refused(tmp_path: Any) -> None:
    from tools.cli import main

    assert main(["serve", "--store", str(tmp_path), "--engine", "asgi", "--grpc"]) == 1


def test_an_engine_whose_packages_are_missing_says_which(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_core import write_archive

    write_archive(tmp_path / "a.mar", "a")
    monkeypatch.setattr("tools.serve.asgi.server.NEEDED", ("uvicorn", "no_such_package"))
    with pytest.raises(ToolError, match=r"needs no_such_package; pip install"):
        AsgiServer(tmp_path, port=0).start()
