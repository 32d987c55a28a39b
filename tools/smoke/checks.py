"""Asks a running server three things: whether it is up, a picture's detections, and what it says of no picture."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from tools.errors import ToolError

NO_PICTURE = b"this is no picture"
# The fields of every error body, TorchServe's own and ours.
ERROR_FIELDS = {"code", "type", "message"}


@dataclass(frozen=True)
class Server:
    """Where to ask. url: scheme, host and port (and a path, behind a proxy). timeout: seconds for each answer."""

    url: str
    model: str
    token: str | None
    timeout: float


def smoke(server: Server, image: bytes, content_type: str, report: Callable[[str], None]) -> None:
    """Report one line for each question. Raises ToolError, naming what was seen, at the first wrong answer."""
    base = server.url.rstrip("/")
    # Marina's archives answer in other shapes too; others ignore the header.
    headers = {"Marina-Format": "torchserve"}
    if server.token:
        headers["Authorization"] = f"Bearer {server.token}"
    predictions = f"{base}/predictions/{server.model}"
    with httpx.Client(headers=headers, timeout=server.timeout) as client:
        healthy = _ask(client, "GET", f"{base}/ping")
        _expect(healthy, (200,), "is not healthy")
        report(f"ok  health: {_short(healthy)}")

        began = time.monotonic()
        answer = _ask(client, "POST", predictions, image, content_type)
        elapsed = time.monotonic() - began
        _expect(answer, (200,), "does not answer a picture")
        detections = _json(answer)
        if not isinstance(detections, list):
            raise ToolError(f"{predictions} answers a picture with {_short(answer)}, and not with a JSON list")
        report(f"ok  prediction: {len(detections)} detections in {elapsed * 1000:.0f} ms")

        refusal = _ask(client, "POST", predictions, NO_PICTURE, "image/jpeg")
        _expect(refusal, (400, 415), "does not refuse what is no picture")
        body = _json(refusal)
        if not isinstance(body, dict) or not body.keys() >= ERROR_FIELDS:
            raise ToolError(
                f"{predictions} refuses what is no picture with {_short(refusal)}, without code, type, message"
            )
        report(f"ok  refusal: {refusal.status_code} {body['type']}: {body['message']}")


def _ask(
    client: httpx.Client, method: str, url: str, content: bytes | None = None, content_type: str | None = None
) -> httpx.Response:
    headers = {"Content-Type": content_type} if content_type else {}
    try:
        return client.request(method, url, content=content, headers=headers)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ToolError(f"{url} is no address of a server ({error}); give one such as http://127.0.0.1:8080") from error
    except httpx.TimeoutException as error:
        raise ToolError(f"{url} does not answer within {client.timeout.read} s; see the server's log") from error
    except httpx.TransportError as error:
        raise ToolError(f"{url} cannot be reached ({error}); is the server up, the port right?") from error


def _expect(answer: httpx.Response, statuses: tuple[int, ...], problem: str) -> None:
    if answer.status_code in statuses:
        return
    message = f"{answer.url} {problem}: {answer.status_code} {_short(answer)}"
    # TorchServe answers a wrong token with 400, and sees to it before anything else.
    if "InvalidKeyException" in answer.text or answer.status_code in (401, 403):
        message += "; give the file that `marina serve` prints as --token-file"
    raise ToolError(message)


def _json(answer: httpx.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _short(answer: httpx.Response) -> str:
    return " ".join(answer.text.split())[:200] or "(empty)"
