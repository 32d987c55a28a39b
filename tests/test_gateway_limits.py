"""What is refused at the gateway's door, over plain ASGI."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request

from tools.gateway import limits
from tools.gateway.errors import GatewayError, handle_errors
from tools.gateway.limits import Door, Rates
from tools.gateway.settings import Limits

LIMITS = Limits(max_bytes=1000, concurrency=2, body_timeout_s=0.05)


def door(app: FastAPI) -> Door:
    handle_errors(app)
    return Door(app, LIMITS, {"/videos": 5000})


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()

    @app.post("/{path:path}")
    async def size(request: Request) -> int:
        return len(await request.body())

    return app


def post(app: Door, path: str, content: object, headers: dict[str, str] | None = None) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(ask())


async def chunks(number: int, size: int, taken: list[int] | None = None) -> AsyncIterator[bytes]:
    for index in range(number):
        if taken is not None:
            taken.append(index)
        yield b"x" * size


def test_a_body_of_the_largest_size_passes(app: FastAPI) -> None:
    assert post(door(app), "/detect", b"x" * 1000).json() == 1000
    assert post(door(app), "/detect", chunks(10, 100)).json() == 1000


def test_an_announced_size_is_refused_before_the_body(app: FastAPI) -> None:
    taken: list[int] = []
    answer = post(door(app), "/detect", chunks(11, 91, taken), {"Content-Length": "1001"})
    assert answer.status_code == 413 and not taken and answer.json()["type"] == "BodyTooLarge"
    assert answer.headers["connection"] == "close"


def test_a_stream_is_refused_before_all_of_it_is_read() -> None:
    taken = []

    async def receive() -> dict:
        taken.append(1)
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def read_all() -> None:
        body = limits._Body(receive, 1000, 5)
        while True:
            await body.receive()

    with pytest.raises(GatewayError) as caught:
        asyncio.run(read_all())
    assert caught.value.status == 413 and len(taken) == 11


def test_a_refusal_in_the_middle_of_a_stream_is_an_answer(app: FastAPI) -> None:
    assert post(door(app), "/detect", chunks(100, 100)).status_code == 413


def test_videos_may_be_larger(app: FastAPI) -> None:
    assert post(door(app), "/videos", b"x" * 5000).json() == 5000
    assert post(door(app), "/videos/x", b"x" * 5001).status_code == 413


def test_clients_of_kserve_v2_are_refused_in_its_form(app: FastAPI) -> None:
    for answer in (
        post(door(app), "/v2/models/x/infer", b"x" * 1001),
        post(door(app), "/v2/models/x/infer", chunks(100, 100)),
        post(door(FastAPI()), "/v2/nothing", b""),
    ):
        assert list(answer.json()) == ["error", "type"] and isinstance(answer.json()["error"], str)
    assert post(door(app), "/v2/models/x/infer", b"x" * 1001).json()["type"] == "BodyTooLarge"


def test_a_body_that_stops_is_cut_with_408(app: FastAPI) -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(3600)

    async def ask() -> httpx.Response:
        sent: list[dict] = []
        body = stalls()

        async def receive() -> dict:
            return {"type": "http.request", "body": await anext(body), "more_body": True}

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/detect", "raw_path": b"/detect", "headers": []}
        await door(app)(scope | {"query_string": b"", "root_path": ""}, receive, send)
        return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=sent[1]["body"])

    answer = asyncio.run(asyncio.wait_for(ask(), 30))
    assert answer.status_code == 408 and answer.json()["type"] == "BodyTooSlow"
    assert answer.headers["connection"] == "close"


def test_a_long_body_that_flows_has_more_time() -> None:
    async def ask() -> int:
        size = 0

        async def receive() -> dict:
            # 64 kB buy a second beyond the 0.05 that the settings give.
            await asyncio.sleep(0.1 if size else 0)
            return {"type": "http.request", "body": b"x" * limits.LEAST_FLOW * 60, "more_body": size == 0}

        body = limits._Body(receive, 10**9, 0.05)
        size += len((await body.receive())["body"])
        return size + len((await body.receive())["body"])

    assert asyncio.run(ask()) == 2 * 60 * limits.LEAST_FLOW


def test_requests_beyond_the_concurrency_are_refused_except_probes() -> None:
    app = FastAPI()
    entered = asyncio.Event()
    leave = asyncio.Event()

    @app.get("/{path:path}")
    async def waits(path: str) -> str:
        if path == "slow":
            entered.set()
            await leave.wait()
        return path

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door(app)), base_url="http://gateway") as client:
            slow = [asyncio.create_task(client.get("/slow")) for _ in range(2)]
            await entered.wait()
            await asyncio.sleep(0)
            refused = await client.get("/fast")
            assert refused.headers["retry-after"] == "1"
            found = [refused.status_code, (await client.get("/healthz")).status_code]
            leave.set()
            await asyncio.gather(*slow)
            return [*found, (await client.get("/fast")).status_code]

    assert asyncio.run(ask()) == [503, 200, 200]


def test_rates_let_a_burst_pass_and_then_say_when(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock[0])
    rates = Rates(0.5)
    rates.count("a")
    with pytest.raises(GatewayError) as caught:
        rates.count("a")
    assert caught.value.status == 429 and caught.value.headers == {"Retry-After": "2"}
    rates.count("b")
    clock[0] += 2
    rates.count("a")


def test_refused_requests_do_not_put_off_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock[0])
    rates = Rates(1)
    passed = 0
    for step in range(101):
        clock[0] = step / 10
        try:
            rates.count("a")
            passed += 1
        except GatewayError:
            pass
    assert 11 <= passed <= 12  # the burst of two, and one in each of ten seconds


def test_callers_that_went_away_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_CALLERS", 10)
    rates = Rates(1)
    for index in range(1000):
        rates.count(str(index))
    assert len(rates._buckets) == 10
