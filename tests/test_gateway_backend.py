"""The way to TorchServes, with servers of the same answers that can be late, dead or of another token at will."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from tools.gateway import backend as module
from tools.gateway.backend import Backend
from tools.gateway.errors import GatewayError
from tools.gateway.settings import Server

LABELS = ["cat", "Straße", "dog"]


class Peer:
    """Speaks as TorchServe does for one model. late: descriptions do not come. token: what it wants. died: the status
    of its word for a worker that ended under the request."""

    def __init__(self) -> None:
        self.late = False
        self.token: str | None = None
        self.died: int | None = None
        self.headers: dict[str, str] = {}
        self.answered = 0
        self.port = 0

    async def __aenter__(self) -> "Peer":
        app = web.Application()
        app.router.add_post("/predictions/{path:.*}", self.answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.runner.cleanup()

    async def answer(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"code": 400, "type": "InvalidKeyException", "message": ""}, status=400)
        if request.match_info["path"] not in ("m", "m/1.0"):
            return web.json_response({"code": 404, "type": "ModelVersionNotFoundException"}, status=404)
        if request.headers.get("describe"):
            while self.late:
                await asyncio.sleep(0.01)
            return web.json_response({"name": "m", "version": "1.0", "labels": LABELS, "device": "cpu"})
        if self.died:
            content = {"code": self.died, "type": "InternalServerException", "message": "Worker died."}
            return web.json_response(content, status=self.died)
        self.headers = dict(request.headers)
        self.answered += 1
        return web.Response(body=await request.read(), content_type="image/jpeg")

    def server(self, token_file: Path | None = None) -> Server:
        return Server(url=f"http://127.0.0.1:{self.port}", token_file=token_file, models=["m"])


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)


async def ask(backend: Backend, version: str | None = None, **headers: str) -> module.BackendAnswer:
    sent = {f"Marina-{name.title()}": value for name, value in headers.items()}
    return await backend.predict("m", version, b"\0picture", "image/jpeg", sent)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_body_version_and_options_go_through_and_the_answer_comes_as_it_is() -> None:
    async def scene() -> None:
        async with Peer() as peer:
            backend = Backend([peer.server()])
            await backend.start()
            assert await ask(backend) == (200, "image/jpeg", b"\0picture")
            await ask(backend, "1.0", classes="dog, Straße")
            assert peer.headers["Marina-Classes"] == "2,1"
            for version in ("2.0", "", "..", "1.0/x", "x" * 1000):
                with pytest.raises(GatewayError) as caught:
                    await ask(backend, version)
                assert caught.value.status == 404
            assert (await backend.model("m", "1.0")).labels == LABELS
            with pytest.raises(GatewayError, match="no version '2'"):
                await backend.model("m", "2")
            await backend.close()

    play(scene)


def test_a_model_that_is_only_busy_stays_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with Peer() as peer:
            backend = Backend([peer.server()])
            await backend.start()
            monkeypatch.setattr(module, "DESCRIBE_TIMEOUT_S", 0.05)
            peer.late = True
            assert [model.healthy for model in await backend.models()] == [False]
            assert (await ask(backend)).status == 200
            monkeypatch.setattr(module, "DESCRIBE_TIMEOUT_S", 30)
            peer.late = False
            assert [model.healthy for model in await backend.models()] == [True]
            await backend.close()

    play(scene)


@pytest.mark.parametrize("status", [500, 507])
def test_of_a_worker_that_dies_callers_hear_that_they_may_ask_again(status: int) -> None:
    async def scene() -> None:
        async with Peer() as peer:
            backend = Backend([peer.server()])
            await backend.start()
            peer.died = status
            with pytest.raises(GatewayError, match="worker of model 'm' died") as caught:
                await ask(backend)
            assert (caught.value.status, caught.value.type) == (503, "WorkerDied")
            assert caught.value.retry_after
            assert backend.up() == {"m": True}
            await backend.close()

    play(scene)


def test_of_two_servers_the_one_that_lives_goes_on() -> None:
    async def scene() -> None:
        async with Peer() as first, Peer() as second:
            backend = Backend([first.server(), second.server()])
            await backend.start()
            assert len(await backend.models()) == 1
            await first.runner.cleanup()
            answers = await asyncio.gather(*(ask(backend) for _ in range(2)), return_exceptions=True)
            assert sorted(answer.status for answer in answers) == [200, 503]
            for _ in range(5):
                await ask(backend)
            assert second.answered == 6
            assert await backend.probe(b"\0") == {"m": False} and backend.up() == {"m": True}
            await backend.close()

    play(scene)


def test_a_server_that_comes_back_with_another_token_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        token_file = tmp_path / "token"
        token_file.write_text("one\n")
        async with Peer() as peer:
            peer.token = "one"
            backend = Backend([peer.server(token_file)])
            await backend.start()
            assert (await ask(backend)).status == 200
            peer.token = "two"
            with pytest.raises(GatewayError) as caught:
                await ask(backend)
            assert caught.value.type == "BackendDown" and backend.up() == {"m": False}
            assert "token is not accepted" in caught.value.message
            token_file.unlink()
            await until(lambda: "cannot be read" in caplog.text)
            with pytest.raises(GatewayError, match="token is not accepted") as caught:
                await ask(backend)
            assert str(tmp_path) not in caught.value.message and caught.value.retry_after
            token_file.write_text("two\nand more")
            await until(lambda: "more than a token" in caplog.text)
            token_file.write_text("two\n")
            await until(lambda: backend.up()["m"])
            assert (await ask(backend)).status == 200
            await backend.close()

    play(scene)


def test_a_server_that_is_not_there_at_the_start_is_found_later(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        peer = Peer()
        async with peer:
            pass
        backend = Backend([peer.server()])
        await backend.start()
        assert [(model.name, model.healthy) for model in await backend.models()] == [("m", False)]
        assert "is down" in caplog.text
        with pytest.raises(GatewayError, match="does not answer"):
            await ask(backend)
        async with peer:
            await until(lambda: backend.up()["m"])
            assert (await ask(backend)).status == 200
            await backend.close()

    play(scene)
