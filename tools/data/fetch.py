"""Many pictures over HTTP: several at a time, again where that may help, and none half-written."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx

from handlers.errors import RequestError
from handlers.image import decode
from tools.checkpoint.safetensors_format import replacing
from tools.data.check import LIMITS
from tools.errors import ToolError
from tools.progress import Progress

ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # before the second attempt; doubled for each further one
TIMEOUT_S = 30.0
GIVE_UP_AFTER = 40  # failures without one success: then the address or the network is at fault, not a picture


class _Again(Exception):
    """What another attempt may mend."""


def fetch(urls: Mapping[Path, str], parallel: int) -> dict[Path, str]:
    """Gets the picture at each URL into its file, and returns the reason for every file that failed.

    A file that is there and whole is not fetched again. Raises ToolError when nothing but failures comes, OSError
    when a file cannot be written.
    """
    failures: dict[Path, str] = {}
    for folder in {file.parent for file in urls}:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        httpx.Client(timeout=TIMEOUT_S, follow_redirects=True) as client,
        ThreadPoolExecutor(parallel) as pool,
        Progress("fetching", len(urls), unit="pictures") as progress,
    ):
        tasks = {pool.submit(_fetch_one, client, url, file): file for file, url in urls.items()}
        try:
            for done, task in enumerate(as_completed(tasks), start=1):
                reason = task.result()
                progress.advance()
                if reason:
                    failures[tasks[task]] = reason
                if len(failures) == done == GIVE_UP_AFTER:
                    raise ToolError(f"the first {done} pictures all failed, the last with: {reason}")
        finally:
            pool.shutdown(cancel_futures=True)
    return failures


def _fetch_one(client: httpx.Client, url: str, file: Path) -> str | None:
    """None, or why there is no picture."""
    if file.is_file() and _fault(file.read_bytes()) is None:
        return None
    reason: str | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            body = _get(client, url)
        except _Again as error:
            reason = f"{error} ({ATTEMPTS} attempts)"
            continue
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return str(error) or type(error).__name__
        reason = _fault(body)
        if reason is None:
            with replacing(file) as stream:
                stream.write(body)
        return reason
    return reason


def _get(client: httpx.Client, url: str) -> bytes:
    """Raises _Again for what may pass, HTTPError for what will not."""
    try:
        with client.stream("GET", url) as response:
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
                raise _Again(f"HTTP {response.status_code}")
            if not response.is_success:
                raise httpx.HTTPError(f"HTTP {response.status_code}")
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > LIMITS.max_bytes:
                    raise httpx.HTTPError(f"more than {LIMITS.max_bytes:,} bytes")
            return bytes(body)
    except httpx.TransportError as error:  # time-outs, refused connections, answers cut off
        raise _Again(str(error) or type(error).__name__) from error


def _fault(body: bytes) -> str | None:
    """Why the bytes are no picture."""
    try:
        decode(body, LIMITS)
    except RequestError as error:
        return str(error)
    return None
