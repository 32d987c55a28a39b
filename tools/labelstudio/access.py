"""How Label Studio is told who calls: a legacy token as it is, a personal access token by way of short-lived ones.

https://labelstud.io/guide/access_tokens: a personal access token is a JSON Web Token that buys access tokens, valid
for minutes, at /api/token/refresh.
"""

import re
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress

import httpx

from tools.errors import ToolError

# Where Label Studio serves pictures, its own and those of storages that it is connected to.
_PICTURE = re.compile(r"/(data|storage-data|tasks/\d+/resolve|projects/\d+/resolve)/")


class Access(httpx.Auth):
    """For clients of httpx, blocking or not, whose base URL is that of Label Studio. No token goes anywhere else."""

    def __init__(self, url: str, token: str):
        """Raises ToolError for what is no token."""
        token = token.strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ToolError("the token of Label Studio is empty, or more than one word; give just the token")
        self._url = url.rstrip("/")
        self._token = token
        self._access = ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        # A legacy token is 40 hexadecimal digits.
        if self._token.count(".") != 2:
            request.headers["Authorization"] = f"Token {self._token}"
            yield request
            return
        fresh = not self._access
        if fresh and not self._take((yield self._refresh())):
            return
        request.headers["Authorization"] = f"Bearer {self._access}"
        answer = yield request
        if answer.status_code == 401 and not fresh and self._take((yield self._refresh())):
            request.headers["Authorization"] = f"Bearer {self._access}"
            yield request

    # Only what answers a refresh is read here: the body of any other answer may be too large for whoever asks.
    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        flow = self.auth_flow(request)
        sent = next(flow)
        with suppress(StopIteration):
            while True:
                answer = yield sent
                if sent is not request:
                    answer.read()
                sent = flow.send(answer)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        flow = self.auth_flow(request)
        sent = next(flow)
        with suppress(StopIteration):
            while True:
                answer = yield sent
                if sent is not request:
                    await answer.aread()
                sent = flow.send(answer)

    def _refresh(self) -> httpx.Request:
        return httpx.Request("POST", f"{self._url}/api/token/refresh/", json={"refresh": self._token})

    def _take(self, answer: httpx.Response) -> bool:
        """Whether the answer holds an access token; where it does not, it is the answer to the request itself."""
        try:
            self._access = str(answer.json()["access"]) if answer.status_code == 200 else ""
        except (ValueError, TypeError, KeyError):
            self._access = ""
        return bool(self._access)


def picture_url(url: str, address: object) -> str | None:
    """Where the picture of a task is had from the Label Studio at `url`; None for an address that is not below it.

    address: of the task's data. It comes from whoever made the task, and must not lead the token, or whoever fetches
    it, to another place.
    """
    own = httpx.URL(url)
    try:
        found = own.join(address) if isinstance(address, str) else None
    except httpx.InvalidURL:
        return None
    if found is None or found.userinfo or (found.scheme, found.host, found.port) != (own.scheme, own.host, own.port):
        return None
    prefix = own.path.rstrip("/")
    if not found.path.startswith(prefix) or not _PICTURE.match(found.path.removeprefix(prefix)):
        return None
    return str(found)
