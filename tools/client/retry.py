"""Asking again where that is safe and may help."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tools.client.errors import ServerFailed, ServerUnavailable

FIRST_WAIT_S = 0.25  # before the second attempt; doubled for each further one
LONGEST_WAIT_S = 8.0

Result = TypeVar("Result")


async def attempt(ask: Callable[[], Awaitable[Result]], retries: int, timeout: float) -> Result:
    """What `ask` gives, asked up to 1 + `retries` times while it raises ServerUnavailable.

    timeout: seconds for all attempts and the waits between them. A wait is as long as the server wishes, or else
    random between half and all of a doubling time, so that many clients do not come back at once. Raises
    ServerUnavailable when attempts or time are used up, ServerFailed when an answer does not come in time.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    wait = FIRST_WAIT_S
    for left in range(retries, -1, -1):
        try:
            async with asyncio.timeout_at(deadline):
                return await ask()
        except TimeoutError:
            raise ServerFailed(f"no answer within {timeout:g} s; see the server's log, or allow more time") from None
        except ServerUnavailable as error:
            pause = random.uniform(wait / 2, wait)  # noqa: S311  # no secret
            pause = max(pause, error.retry_after or 0.0)
            if not left or clock() + pause > deadline:
                raise
        await asyncio.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT_S)
    raise AssertionError("the last attempt returns or raises")
