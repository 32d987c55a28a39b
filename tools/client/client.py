"""Asks a served model about pictures, several at a time, and gives the answers in order.

    shots -> one task each, `concurrency` at a time -> answers in the order of the shots
             read, ask, ask again where it is safe

However many shots there are, only twice `concurrency` of them are in memory.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from concurrent.futures import wait
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

from tools.client.answer import Answer
from tools.client.errors import ServerRefused, ServerUnavailable
from tools.client.retry import attempt
from tools.client.sources import Given, Shot, Shots, Unreadable, find_sources, one_shot
from tools.client.transports import WRONG_KEY, Transport, read_authority, read_token
from tools.errors import ToolError

Protocol = Literal["rest", "grpc", "kserve"]
Result = TypeVar("Result")

TIMEOUT_S = 30.0
RETRIES = 3
CONCURRENCY = 8
ENDING_S = 2.0  # for what is under way when the client is closed


class Asked(NamedTuple):
    """A shot, its encoded picture as it was sent (empty where it could not be read), and the answer."""

    shot: Shot
    body: bytes
    answer: Answer


class _Flow:
    """Of one iteration. free: places for requests under way. room: places for shots in memory; answered ones wait
    there for a slow one before them."""

    def __init__(self, concurrency: int):
        self.free = asyncio.Semaphore(concurrency)
        self.room = asyncio.Semaphore(2 * concurrency)
        self.answers: asyncio.Queue[asyncio.Task[Asked] | None] = asyncio.Queue()
        self.under_way: set[asyncio.Task[Any]] = set()


class AsyncClient:
    """A model of a server. Made, used and closed in one running event loop.

    url: http(s)://HOST:PORT for rest and for kserve, grpc(s)://HOST:PORT for grpc and for kserve over gRPC. timeout:
    seconds for an answer, all attempts included. retries: further attempts at a server that is busy or cannot be
    reached. token: or the file that holds it, which is read anew when the server refuses it: a TorchServe that was
    started again has another one. concurrency: requests under way at most. options: those of every request, such as
    {"score_threshold": 0.4, "classes": "dog,cat"}. ca: the file of a private authority that signed the server's
    certificate.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        version: str | None = None,
        protocol: Protocol = "rest",
        token: str | Path | None = None,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        concurrency: int = CONCURRENCY,
        options: Mapping[str, Any] | None = None,
        ca: Path | None = None,
    ):
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ToolError(
                f"concurrency {concurrency}, retries {retries}, timeout {timeout}: at least 1, 0 and more than 0"
            )
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._options = {name: _text(value) for name, value in (options or {}).items()}
        if "format" in self._options:
            raise ToolError("option format cannot be given: the client reads one format alone, and writes others")
        if ca is not None and not url.startswith(("https://", "grpcs://")):
            raise ToolError(f"--ca goes with https:// or grpcs://, but the server is {url}")
        authority = read_authority(ca) if ca is not None else None
        self._token_file = token if isinstance(token, Path) else None
        known = read_token(token) if isinstance(token, Path) else token
        self._transport = _transport(protocol, url, model, version, known, authority, concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def predict(self, source: str | Path | bytes) -> Answer:
        """The answer for one picture: encoded bytes, a path or a URL.

        Raises ServerRefused for a picture that the server does not take, ServerUnavailable, ServerFailed, and
        ToolError for one that cannot be read.
        """
        shot = one_shot(source)
        return await self._ask(shot, await asyncio.to_thread(shot.load))

    async def predict_many(self, sources: Given) -> AsyncGenerator[Answer, None]:
        """An answer for each picture or frame of `sources`, in order; see `tools.client.sources`.

        One that cannot be read, or that the server refuses, has its `error` set, and the others go on. Raises
        ToolError for a single source that is none, ServerUnavailable, ServerFailed, or ServerRefused for what would
        meet every picture.
        """
        async with aclosing(self.ask(Shots(find_sources(sources)))) as stream:
            async for asked in stream:
                yield asked.answer

    async def ask(self, shots: Shots) -> AsyncGenerator[Asked, None]:
        """As `predict_many`, with the pictures. Closes `shots`."""
        flow = _Flow(self._concurrency)
        feeder = asyncio.create_task(self._feed(shots, flow))
        feeder.add_done_callback(lambda done: flow.answers.put_nowait(None))
        try:
            while (answer := await flow.answers.get()) is not None:
                yield await answer
                flow.under_way.discard(answer)
                flow.room.release()
            await feeder
        finally:
            flow.under_way.add(feeder)
            for task in flow.under_way:
                task.cancel()
            await asyncio.to_thread(shots.close)
            # Looked at, all of them: after the first failure nobody asks for those of the others.
            await asyncio.gather(*flow.under_way, return_exceptions=True)

    async def _feed(self, shots: Shots, flow: _Flow) -> None:
        """A request for each shot, in order."""
        while True:
            # Before the shot is taken: a frame of a live source must not grow old while it waits.
            await flow.room.acquire()
            await flow.free.acquire()
            shot = await asyncio.to_thread(next, shots, None)
            if shot is None:
                return
            request = asyncio.create_task(self._settle(shot))
            request.add_done_callback(lambda done: flow.free.release())
            flow.under_way.add(request)
            flow.answers.put_nowait(request)

    async def _settle(self, shot: Shot) -> Asked:
        try:
            body = await asyncio.to_thread(shot.load)
        except Unreadable as error:
            return Asked(shot, b"", shot.failed(str(error)))
        try:
            return Asked(shot, body, await self._ask(shot, body))
        except ServerRefused as error:
            if not error.of_picture:
                raise
            return Asked(shot, body, shot.failed(str(error)))

    async def _ask(self, shot: Shot, body: bytes) -> Answer:
        return shot.told(await attempt(lambda: self._predict(body), self._retries, self._timeout))

    async def _predict(self, body: bytes) -> Answer:
        try:
            return await self._transport.predict(body, self._options)
        except ServerRefused as error:
            if self._token_file is None or error.kind != WRONG_KEY:
                raise
            self._transport.use_token(read_token(self._token_file))
            raise ServerUnavailable(str(error)) from error


class Client:
    """AsyncClient for programs without an event loop, and for notebooks, which have one of their own.

    The same arguments; `predict_many` gives an ordinary iterator. Requests go on while an answer is worked on.
    """

    def __init__(self, url: str, model: str, **settings: Any):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="marina-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(_opened(url, model, settings))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing the second time."""
        if self._loop.is_closed():
            return
        self._run(self._client.aclose())
        self._stop()

    def predict(self, source: str | Path | bytes) -> Answer:
        """See `AsyncClient.predict`."""
        return self._run(self._client.predict(source))

    def predict_many(self, sources: Given) -> Iterator[Answer]:
        """See `AsyncClient.predict_many`."""
        for asked in self.ask(Shots(find_sources(sources))):
            yield asked.answer

    def ask(self, shots: Shots) -> Iterator[Asked]:
        """See `AsyncClient.ask`."""
        stream = self._client.ask(shots)
        # After an interrupt the step that it cancelled may still be at its end when the stream is closed.
        turn = asyncio.Lock()

        async def step() -> Asked | None:
            async with turn:
                return await anext(stream, None)

        async def close() -> None:
            async with turn:
                await stream.aclose()

        try:
            while (asked := self._run(step())) is not None:
                yield asked
        finally:
            self._run(close())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _stop(self) -> None:
        # A second interrupt comes while what the first one cancelled is at its end.
        wait([asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)], ENDING_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    """Every task of this loop but this one."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _opened(url: str, model: str, settings: Mapping[str, Any]) -> AsyncClient:
    return AsyncClient(url, model, **settings)


def _transport(
    protocol: Protocol,
    url: str,
    model: str,
    version: str | None,
    token: str | None,
    authority: str | None,
    connections: int,
) -> Transport:
    # gRPC is not needed to ask by REST, nor is it always installed.
    if protocol == "rest":
        from tools.client.transports.rest import RestTransport

        return RestTransport(url, model, version, token, authority, connections)
    if protocol == "grpc":
        from tools.client.transports.torchserve_grpc import TorchServeGrpcTransport

        return TorchServeGrpcTransport(url, model, version, token, authority)
    from tools.client.transports.kserve import kserve_transport

    return kserve_transport(url, model, version, token, authority, connections)


def _text(value: Any) -> str:
    """An option as a header says it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
