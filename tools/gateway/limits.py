"""How much a request may bring, how slowly, and how many there may be: before anything is done for it."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.gateway.errors import GatewayError
from tools.gateway.settings import Limits

# A body that flows at this many bytes a second is never too slow.
LEAST_FLOW = 64_000
# Asked by machines that must get an answer just when the gateway is busy.
UNLIMITED = ("/healthz", "/readyz", "/metrics")
MOST_CALLERS = 10_000


class Door:
    """ASGI middleware: 413 for a body that is too large, before it is all read; 408 for one that is too slow; 503
    when too many requests are under way.

    larger: the most bytes for paths that begin like this.
    """

    def __init__(self, app: ASGIApp, limits: Limits, larger: Mapping[str, int]):
        self._app = app
        self._limits = limits
        self._larger = larger
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNLIMITED:
            await self._app(scope, receive, send)
            return
        most = next((size for path, size in self._larger.items() if scope["path"].startswith(path)), None)
        most = most or self._limits.max_bytes
        refusal = self._refusal(scope, most)
        if refusal:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, _Body(receive, most, self._limits.body_timeout_s).receive, send)
        finally:
            self._under_way -= 1

    def _refusal(self, scope: Scope, most: int) -> GatewayError | None:
        if self._under_way >= self._limits.concurrency:
            return GatewayError(503, "Busy", f"{self._under_way} requests are under way, no more are taken", 1)
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        # The server has checked that it is a number.
        return _too_large(most) if int(announced) > most else None


def _too_large(most: int) -> GatewayError:
    return GatewayError(413, "BodyTooLarge", f"the body has more than the {most} bytes that are taken; shrink it")


class _Body:
    """One request's body as it arrives. Raises GatewayError from `receive`."""

    def __init__(self, receive: Receive, most: int, timeout_s: float):
        self._receive = receive
        self._most = most
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._size = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        deadline = self._began + self._timeout_s + self._size / LEAST_FLOW
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise GatewayError(
                408, "BodyTooSlow", f"only {self._size} bytes of the body came in {self._timeout_s:.0f} s"
            ) from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._most:
            raise _too_large(self._most)
        return message


class Rates:
    """Requests a second of each caller: a bucket of tokens (RFC 2697's idea), full after two seconds' worth."""

    def __init__(self, per_second: float):
        self._per_second = per_second
        self._burst = max(1.0, 2 * per_second)
        # caller: tokens left at a time; the one seen longest ago first.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, caller: str) -> None:
        """Raises GatewayError 429 with the time until the next request is taken."""
        now = time.monotonic()
        left, then = self._buckets.pop(caller, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._per_second)
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        if left < 1:
            raise GatewayError(
                429,
                "TooManyRequests",
                f"more than {self._per_second:g} requests a second; slow down",
                (1 - left) / self._per_second,
            )
