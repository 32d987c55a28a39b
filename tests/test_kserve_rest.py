"""KServe v2 over REST, over plain ASGI: what runs beside the event loop."""

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from tools.gateway.auth import caller
from tools.gateway.kserve import rest
from tools.gateway.kserve.calls import Calls
from tools.gateway.kserve.codec import InferAnswer, Tensor


@pytest.mark.parametrize("numbers", [10, rest.LARGE // 4 + 1])
def test_large_bodies_are_read_and_written_in_a_thread(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}

    def recorded(name: str) -> None:
        work = getattr(rest, name)

        def run(*given: object) -> object:
            threads[name] = threading.get_ident()
            return work(*given)

        monkeypatch.setattr(rest, name, run)

    async def infer(self: Calls, name: str, version: str | None, request: object) -> InferAnswer:
        return InferAnswer(name, "1", "", [Tensor("x", "FP32", (numbers,), np.ones(numbers, "<f4").tobytes())])

    recorded("read_rest")
    recorded("write_rest")
    monkeypatch.setattr(Calls, "infer", infer)
    app = FastAPI()
    app.include_router(rest.router(SimpleNamespace(backend=None)))
    app.dependency_overrides[caller] = lambda: None
    given = {"name": "x", "datatype": "FP32", "shape": [numbers], "data": [0.25] * numbers}

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return await client.post("/v2/models/m/infer", json={"inputs": [given]})

    answer = asyncio.run(ask())
    assert answer.json()["outputs"][0]["data"] == [1.0] * numbers
    beside = {name for name, thread in threads.items() if thread != threading.get_ident()}
    assert threads.keys() == {"read_rest", "write_rest"}
    assert beside == (threads.keys() if numbers > 10 else set())
    assert (len(json.dumps(given)) > rest.LARGE) == (numbers > 10)
