"""The TorchServes behind the gateway: what they serve, and pictures through them.

replica    a model on one TorchServe; up when it describes itself, down after no answer
predict    the replica that is up and has least to do
watch      asks a replica that is down again and again, so that nothing needs to be restarted
"""

import asyncio
import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel
from yarl import URL

from tools.client.transports import reason
from tools.gateway.errors import GatewayError
from tools.gateway.settings import Server

logger = logging.getLogger(__name__)

RETRY_S = 1.0
RETRY_AFTER_S = 2.0
DESCRIBE_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 2.0
JSON = "application/json"
# TorchServe's word for a worker that ended under a request, with 500 or 507.
WORKER_DIED = b"Worker died."

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class Model(BaseModel):
    """A served model as it describes itself; one that was never up since the gateway started has a name alone.

    checksum: SHA-256 of its provenance, and so of all that it holds. since: when its worker loaded it, ISO 8601.
    postprocess: the thresholds that hold for requests without their own. input: what the network takes. healthy:
    whether it answers now.
    """

    name: str
    version: str = ""
    labels: list[str] = []
    postprocess: dict[str, Any] = {}
    checksum: str = ""
    since: str = ""
    definition: str = ""
    input: dict[str, Any] = {}
    healthy: bool = False


class BackendAnswer(NamedTuple):
    """As TorchServe gave it, a refusal (status 400 to 500) included."""

    status: int
    content_type: str
    body: bytes


class Down(Exception):
    """A replica gives no answer; the text says why, for the log. told: what callers may know of it."""

    told = "does not answer"


class NoToken(Down):
    """It cannot be asked: the gateway has no token, or one that is not taken."""

    told = "cannot be asked: the gateway's token is not accepted"


class Late(Down):
    """Or not in time: it may only be busy."""


class Replica:
    """A model on one TorchServe."""

    def __init__(self, server: Server, name: str, client: aiohttp.ClientSession):
        self.name = name
        self.up = False
        self.under_way = 0
        self.model = Model(name=name)
        self.failed = asyncio.Event()
        self.timeout_s = server.timeout_s
        self._server = server
        self._client = client
        self._url = f"{server.url}/predictions/{quote(name, safe='')}"
        self.told = Down.told
        self._authorization = ""
        self._reason = ""

    def __str__(self) -> str:
        return f"{self.name} on {self._server.url}"

    def read_token(self) -> None:
        """Anew each time: a TorchServe that was started again has another token. Raises NoToken."""
        if self._server.token_file is None:
            return
        try:
            token = self._server.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise NoToken(f"token file {self._server.token_file} cannot be read ({error})") from error
        if not token.isprintable():
            raise NoToken(f"token file {self._server.token_file} holds more than a token")
        self._authorization = f"Bearer {token}"

    async def ask(self, version: str | None, body: bytes, headers: Mapping[str, str], timeout: float) -> BackendAnswer:
        """Raises Down when there is no answer, NoToken when the token is refused."""
        sent = {"Authorization": self._authorization, **headers} if self._authorization else headers
        url = URL(self._url if version is None else f"{self._url}/{version}", encoded=True)
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT_S)
        self.under_way += 1
        try:
            async with self._client.post(url, data=body, headers=sent, timeout=limit) as answer:
                content = await answer.read()
        except aiohttp.ClientError as error:
            raise Down(f"{type(error).__name__} {error}") from error
        except TimeoutError as error:
            raise Late(f"no answer within {timeout:g} s") from error
        finally:
            self.under_way -= 1
        # TorchServe has no 401.
        if answer.status == 400 and b"InvalidKeyException" in content:
            raise NoToken("it refuses the token")
        return BackendAnswer(answer.status, answer.headers.get("Content-Type", JSON), content)

    async def describe(self, version: str | None = None) -> Model:
        """Raises Down, also for a server that answers without a model behind it, and GatewayError 404 UnknownModel."""
        answer = await self.ask(version, b"", {"describe": "True"}, DESCRIBE_TIMEOUT_S)
        if answer.status == 404 and version is not None:
            raise unknown_version(self.name, version)
        if answer.status != 200:
            raise Down(f"it answers {answer.status}: {reason(answer.body)}")
        try:
            return Model.model_validate(json.loads(answer.body) | {"healthy": True})
        except (ValueError, TypeError) as error:
            raise Down("it is no model of Marina: it does not describe itself") from error

    async def refresh(self) -> None:
        """Ask what the model is, and so whether it is up."""
        try:
            self.read_token()
            self.model = await self.describe()
            if not self.up:
                logger.info("%s is up, version %s", self, self.model.version)
            self.up, self._reason = True, ""
        except Down as error:
            self.doubt(error)

    async def answers(self, picture: bytes) -> bool:
        """Whether the model answers `picture` with 200."""
        if not self.up:
            return False
        try:
            answer = await self.ask(None, picture, {"Content-Type": "image/jpeg"}, PROBE_TIMEOUT_S)
        except Down as error:
            self.doubt(error)
            return False
        return answer.status == 200

    def doubt(self, error: Down) -> None:
        """Of a question beside the predictions: one that is only late stays in use."""
        if self.up and isinstance(error, Late):
            self.model = self.model.model_copy(update={"healthy": False})
        else:
            self.fail(error)

    def fail(self, error: Down) -> None:
        if str(error) != self._reason:
            logger.warning("%s is down: %s", self, error)
            self._reason = str(error)
        self.up, self.told = False, error.told
        self.model = self.model.model_copy(update={"healthy": False})
        self.failed.set()

    async def watch(self) -> None:
        """Keep `up` true to the facts, until cancelled."""
        while True:
            self.failed.clear()
            await self.refresh()
            if self.up:
                await self.failed.wait()
            await asyncio.sleep(RETRY_S)


class Backend:
    """All TorchServes of the settings. Use between `start` and `close`."""

    def __init__(self, servers: list[Server]):
        self._servers = servers
        self._replicas: dict[str, list[Replica]] = defaultdict(list)
        self._clients: list[aiohttp.ClientSession] = []
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return when every replica was asked once; those that are down are asked again in the background."""
        for server in self._servers:
            client = new_client()
            self._clients.append(client)
            for name in server.models:
                self._replicas[name].append(Replica(server, name, client))
        replicas = self._all()
        await asyncio.gather(*(replica.refresh() for replica in replicas))
        self._watches = [asyncio.create_task(replica.watch()) for replica in replicas]

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        for watch in self._watches:
            with suppress(asyncio.CancelledError):
                await watch
        for client in self._clients:
            await client.close()

    def _all(self) -> list[Replica]:
        return [replica for replicas in self._replicas.values() for replica in replicas]

    async def models(self) -> list[Model]:
        """What is served now, asked of the servers; replicas of one model are one as long as they are the same."""
        replicas = self._all()
        await asyncio.gather(*(replica.refresh() for replica in replicas if replica.up))
        found: dict[tuple[str, str, str], Model] = {}
        for replica in sorted(replicas, key=lambda replica: replica.up):
            found[replica.name, replica.model.version, replica.model.checksum] = replica.model
        return sorted(found.values(), key=lambda model: (model.name, model.version))

    async def model(self, name: str, version: str | None = None) -> Model:
        """One model. Raises GatewayError: 404 UnknownModel, 503 BackendDown."""
        replica = self._pick(name, version)
        try:
            return await replica.describe(version)
        except Down as error:
            replica.doubt(error)
            raise backend_down(name, error.told) from error

    async def predict(
        self, model: str, version: str | None, body: bytes, content_type: str, headers: Mapping[str, str]
    ) -> BackendAnswer:
        """One request to `/predictions`, and its answer, whatever its status.

        headers: `Marina-...` options. Raises GatewayError: 404 UnknownModel, 503 BackendDown, WorkerDied or
        Overloaded, 400 InvalidOption for a header that cannot be sent.
        """
        replica = self._pick(model, version)
        sent = {"Content-Type": content_type, **headers}
        check_headers(sent, replica.model.labels)
        try:
            answer = await replica.ask(version, body, sent, replica.timeout_s)
        except Down as error:
            replica.fail(error)
            raise backend_down(model, error.told) from error
        if answer.status == 404:
            raise unknown_version(model, version)
        if answer.status >= 500 and WORKER_DIED in answer.body:
            raise GatewayError(
                503, "WorkerDied", f"the worker of model {model!r} died; another is started by itself", RETRY_AFTER_S
            )
        if answer.status == 503:
            raise GatewayError(503, "Overloaded", f"model {model!r} takes no more requests now", RETRY_AFTER_S)
        return answer

    async def probe(self, picture: bytes) -> dict[str, bool]:
        """Whether every replica of each model answers `picture`, asked just now."""
        found = dict.fromkeys(self._replicas, True)
        replicas = self._all()
        for replica, answers in zip(
            replicas, await asyncio.gather(*(r.answers(picture) for r in replicas)), strict=True
        ):
            found[replica.name] &= answers
        return found

    def up(self) -> dict[str, bool]:
        """Whether anything answers for each model, as far as is known."""
        return {name: any(replica.up for replica in replicas) for name, replicas in self._replicas.items()}

    def name_or_only(self, name: str | None) -> str:
        """`name`, or that of the only model there is. Raises GatewayError 400 where there are several."""
        if name is None and len(self._replicas) > 1:
            raise GatewayError(400, "InvalidOption", f"say which model: {', '.join(sorted(self._replicas))}")
        return next(iter(self._replicas)) if name is None else name

    def _pick(self, name: str, version: str | None) -> Replica:
        replicas = self._replicas.get(name)
        if not replicas:
            raise GatewayError(
                404, "UnknownModel", f"no model {name[:80]!r}; known: {', '.join(sorted(self._replicas))}"
            )
        if version is not None and not _VERSION.fullmatch(version):
            raise unknown_version(name, version)
        up = [replica for replica in replicas if replica.up]
        if not up:
            raise backend_down(name, replicas[0].told)
        return min(up, key=lambda replica: replica.under_way)


def unknown_version(name: str, version: str | None) -> GatewayError:
    return GatewayError(404, "UnknownModel", f"model {name!r} has no version {(version or '')[:80]!r}; leave it out")


def backend_down(name: str, told: str) -> GatewayError:
    return GatewayError(
        503, "BackendDown", f"the server of model {name!r} {told}; it is asked again by itself", RETRY_AFTER_S
    )


def new_client() -> aiohttp.ClientSession:
    # Concurrency is limited at the gateway's own door. aiohttp takes a quarter of httpx's processor time.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
    )


def check_headers(headers: dict[str, str], labels: list[str]) -> None:
    """Make them fit to be sent to a model of these labels. Raises GatewayError 400.

    TorchServe reads headers as Latin-1, so that classes with other letters go by their indices."""
    for name, value in headers.items():
        if name.lower() == "marina-classes" and not value.isascii():
            parts = [part.strip() for part in value.split(",")]
            value = headers[name] = ",".join(str(labels.index(part)) if part in labels else part for part in parts)
        if not (value.isascii() and value.isprintable()):
            raise GatewayError(400, "InvalidOption", f"{name} cannot be {value[:80]!r}")
