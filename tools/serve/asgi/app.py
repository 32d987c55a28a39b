"""The ASGI application: which model a request is for, whether it may be asked, and the reply."""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tools.serve.asgi.counters import CONTENT_TYPE, HOSTNAME, Counters
from tools.serve.asgi.model import Model
from tools.serve.asgi.reply import Refusal, Reply, json_reply

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

# How long a body may take, and what it may take beyond that where it flows, in bytes a second.
BODY_S = 30
LEAST_FLOW = 64_000

# TorchServe's: an answer is of its moment.
_NOT_KEPT = (
    (b"pragma", b"no-cache"),
    (b"cache-control", b"no-cache; no-store, must-revalidate, private"),
    (b"expires", b"Thu, 01 Jan 1970 00:00:00 UTC"),
)
_NAME = r"(?P<model>[^/:]+)"
# The kinds of routes, and whether the query becomes options, as TorchServe has it.
_ROUTES = (
    (re.compile(rf"/predictions/{_NAME}(/(?P<version>[^/]+))?/?"), False),
    (re.compile(rf"/(?P<explain>explanations)/{_NAME}(/(?P<version>[^/]+))?"), False),
    (re.compile(rf"/v1/models/{_NAME}:predict"), False),
    (re.compile(rf"/models/{_NAME}(/(?P<version>[^/]+))?/invoke"), True),
    (re.compile(r"/invocations"), True),
)


class App:
    """models: of one name the first is the default. token: None where none is wanted. most_bytes: of a request.
    metrics_port: of the listener that shows figures, and nothing else, to everyone."""

    def __init__(
        self,
        models: Sequence[Model],
        counters: Counters,
        token: str | None,
        most_bytes: int,
        metrics_port: int | None,
    ):
        self._models: dict[str, dict[str, Model]] = {}
        for model in models:
            self._models.setdefault(model.settings.name, {})[model.settings.version] = model
        self._counters = counters
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._most_bytes = most_bytes
        self._metrics_port = metrics_port
        for hundred in (2, 4, 5):
            self._count(hundred * 100, 0)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["server"][1] == self._metrics_port:
            await _give(send, self._metrics(scope["path"]))
            return
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        body = _Body(receive, given, self._most_bytes)
        request_id = str(uuid.uuid4())
        try:
            reply = await self._reply(scope, given, body, request_id)
        except Refusal as refusal:
            reply = refusal.reply
        self._count(reply.status)
        headers = [(b"x-request-id", request_id.encode())]
        # What is left of a body would have to be read for the next request.
        if not body.complete:
            headers.append((b"connection", b"close"))
        await _give(send, reply, headers)

    async def _reply(self, scope: "Scope", headers: dict[str, str], body: "_Body", request_id: str) -> Reply:
        # Before all else, so that nobody learns which models there are.
        self._check_token(headers.get("authorization", ""))
        if scope["path"] == "/ping":
            return self._ping()
        model, query, explain = self._find(scope["path"], scope["query_string"].decode("latin-1"))
        with model.place():
            content = await body.read()
            head = {"headers": headers | {"explain": explain}, "query": query, "request_id": request_id}
            return await model.ask(head, content)

    def _check_token(self, given: str) -> None:
        if self._authorization and not hmac.compare_digest(given.encode("latin-1"), self._authorization):
            raise Refusal(
                400,
                "InvalidKeyException",
                "the token is missing or wrong; send the header `Authorization: Bearer TOKEN`, with the token that is"
                " in the file which the server named when it started",
            )

    def _ping(self) -> Reply:
        down = [model.key for versions in self._models.values() for model in versions.values() if not model.is_up]
        return json_reply({"status": "Unhealthy", "down": down}, 500) if down else json_reply({"status": "Healthy"})

    def _find(self, path: str, query: str) -> tuple[Model, str, str]:
        """The model, the query as far as it is options, and whether explanations are wished for."""
        for pattern, takes_query in _ROUTES:
            if found := pattern.fullmatch(path):
                groups = found.groupdict()
                name = groups.get("model") or self._invoked(query)
                return self._model(name, groups.get("version")), query * takes_query, str("explain" in groups)
        raise Refusal(404, "ResourceNotFoundException", f"no such path: {path[:200]!r}; use /predictions/MODEL")

    def _invoked(self, query: str) -> str:
        """Of /invocations, which names its model in the query, or means the only one."""
        named = parse_qs(query, max_num_fields=100).get("model_name")
        return named[-1] if named else "" if len(self._models) > 1 else next(iter(self._models))

    def _model(self, name: str, version: str | None) -> Model:
        versions = self._models.get(name)
        if versions is None:
            known = ", ".join(self._models)
            raise Refusal(404, "ModelNotFoundException", f"Model not found: {name[:200]}; served here: {known}")
        if version is None:
            return next(iter(versions.values()))
        if version not in versions:
            raise Refusal(
                404,
                "ModelVersionNotFoundException",
                f"Model version: {version[:200]} does not exist for model: {name}; served here: {', '.join(versions)}",
            )
        return versions[version]

    def _metrics(self, path: str) -> Reply:
        if path != "/metrics":
            return Refusal(404, "ResourceNotFoundException", "nothing here but /metrics").reply
        return Reply(200, CONTENT_TYPE, self._counters.text().encode())

    def _count(self, status: int, amount: int = 1) -> None:
        self._counters.add(f"Requests{status // 100}XX", amount, {"Level": "Host", "Hostname": HOSTNAME})


class _Body:
    """One request's. complete: whether all of it was read."""

    def __init__(self, receive: "Receive", headers: Mapping[str, str], most: int):
        # The server has checked that it is a number.
        self._announced = int(headers.get("content-length", 0))
        self.complete = not self._announced and "transfer-encoding" not in headers
        self._receive = receive
        self._most = most

    async def read(self) -> bytes:
        """Raises Refusal 413, 408, or 400 where the client is gone."""
        if self._announced > self._most:
            raise self._too_large()
        began, size = time.monotonic(), 0
        chunks = []
        while not self.complete:
            try:
                async with asyncio.timeout(began + BODY_S + size / LEAST_FLOW - time.monotonic()):
                    message = await self._receive()
            except TimeoutError:
                raise Refusal(408, "BodyTooSlow", f"only {size} bytes of the body came in {BODY_S} s") from None
            if message["type"] == "http.disconnect":
                raise Refusal(400, "ClientGone", "the client has closed the connection")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._most:
                raise self._too_large()
            self.complete = not message.get("more_body", False)
        return b"".join(chunks)

    def _too_large(self) -> Refusal:
        return Refusal(413, "RequestTooLarge", f"the request has more than the {self._most} bytes allowed; shrink it")


async def _give(send: "Send", reply: Reply, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    told: list[Any] = [*headers, *_NOT_KEPT, (b"content-type", reply.content_type.encode())]
    told.append((b"content-length", str(len(reply.body)).encode()))
    if reply.retry_after is not None:
        told.append((b"retry-after", str(reply.retry_after).encode()))
    await send({"type": "http.response.start", "status": reply.status, "headers": told})
    await send({"type": "http.response.body", "body": reply.body})
