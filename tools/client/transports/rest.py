"""TorchServe's REST interface: POST /predictions/<model>[/<version>] with the picture as the body."""

import ssl
import urllib.parse
from collections.abc import Mapping
from typing import Any

import httpx

from tools.client.answer import Answer
from tools.client.errors import ServerFailed, ServerUnavailable
from tools.client.transports import (
    FORMAT,
    NOT_TRUSTED,
    WORKER_DIED,
    bearer,
    distrusted,
    read_answer,
    reason,
    retry_after,
)

BUSY = (429, 503)
EXAMPLE = "one such as http://127.0.0.1:8080"


class RestTransport:
    """url: scheme, host and port (and a path, behind a proxy). authority: see `session`. connections: kept open at
    most."""

    def __init__(
        self, url: str, model: str, version: str | None, token: str | None, authority: str | None, connections: int
    ):
        parts = [model] if version is None else [model, version]
        self._url = "/".join([url.rstrip("/"), "predictions", *(urllib.parse.quote(part, safe="") for part in parts)])
        self._session = session(token, authority, connections)

    async def predict(self, body: bytes, options: Mapping[str, str]) -> Answer:
        given = {"format": FORMAT, **options}
        if all(value.isascii() for value in given.values()):
            headers = {f"Marina-{name.replace('_', '-').title()}": value for name, value in given.items()}
            headers["Content-Type"] = "application/octet-stream"
            answer = await post(self._session, self._url, headers=headers, content=body)
        else:
            # TorchServe reads headers as Latin-1, and classes may have names in any script.
            answer = await post(self._session, self._url, data=given, files={"data": body})
        return read_answer(answer.content, answer.status_code)

    def use_token(self, token: str) -> None:
        self._session.headers["Authorization"] = bearer(token)

    async def aclose(self) -> None:
        await self._session.aclose()


def session(token: str | None, authority: str | None, connections: int) -> httpx.AsyncClient:
    """Without time-outs: the client has one for all attempts together. authority: certificates, PEM, None for those
    of the system."""
    headers = {"Authorization": bearer(token)} if token else {}
    verify = ssl.create_default_context(cadata=authority) if authority else True
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=verify)  # noqa: S113  # see the docstring


def _lost(url: str, error: httpx.TransportError) -> ServerUnavailable:
    return ServerUnavailable(f"{url}: the connection was lost ({error or type(error).__name__})")


async def post(session: httpx.AsyncClient, url: str, **request: Any) -> httpx.Response:
    """The response, of any status but those of a busy server. Raises ServerUnavailable, also for a worker that died
    under the request, or ServerFailed.

    request: as `httpx.AsyncClient.post` takes it.
    """
    try:
        answer = await session.post(url, **request)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
        raise ServerFailed(f"{url} cannot be asked ({error}); give {EXAMPLE}") from error
    except httpx.ConnectError as error:
        if NOT_TRUSTED in str(error):
            raise distrusted(url) from error
        raise ServerUnavailable(f"{url} cannot be reached ({error}); is the server up, the port right?") from error
    except httpx.RemoteProtocolError as error:
        # h11's word for what does not begin as HTTP/1.1 does.
        if "illegal" not in str(error):
            raise _lost(url, error) from error
        raise ServerFailed(f"{url} does not speak HTTP/1.1; where it is a gRPC port, say --protocol grpc") from error
    except httpx.TransportError as error:
        raise _lost(url, error) from error
    if answer.status_code in BUSY or (answer.is_server_error and WORKER_DIED.encode() in answer.content):
        raise ServerUnavailable(
            f"{url} is busy or down ({answer.status_code}): {reason(answer.content)}",
            retry_after(answer.headers.get("Retry-After")),
        )
    return answer
