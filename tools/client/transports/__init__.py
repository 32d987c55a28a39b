"""One module a protocol. Each asks once: time-outs and further attempts are the client's.

A transport closes itself by `aclose`; its `predict` raises ServerRefused, ServerUnavailable or ServerFailed.
"""

import json
import ssl
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any, Protocol

from tools.client.answer import Answer
from tools.client.errors import UNNAMED, ServerFailed, ServerRefused
from tools.errors import ToolError

FORMAT = "detections"
# The fields of every error body, TorchServe's own, the handler's and the gateway's.
ERROR_FIELDS = {"code", "type", "message"}
# OpenSSL's and gRPC's word for a certificate of nobody known.
NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED"
# TorchServe's word for a worker that ended under a request, with 500, 507 or INTERNAL.
WORKER_DIED = "Worker died."
# A server that refuses a token names it so.
WRONG_KEY = "InvalidKeyException"
# The gateway's name for a path that it does not have, such as TorchServe's.
NO_PATH = "NotFound"


class Transport(Protocol):
    async def predict(self, body: bytes, options: Mapping[str, str]) -> Answer:
        """Asks about one encoded picture. options: those of a request, by their names with underscores."""
        ...

    def use_token(self, token: str) -> None:
        """For the requests that follow."""
        ...

    async def aclose(self) -> None: ...


def read_token(path: Path) -> str:
    """Raises ToolError for a file that cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"--token-file {path} cannot be read ({error})") from error


def bearer(token: str) -> str:
    """The header, or gRPC's metadata, `Authorization`."""
    return f"Bearer {token}"


def read_authority(path: Path) -> str:
    """Certificates of an authority, PEM. Raises ToolError for a file that has none."""
    try:
        text = path.read_text(encoding="ascii")
        ssl.create_default_context().load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:
        raise ToolError(f"--ca {path} cannot be used ({error}); give the authority's certificate as PEM") from error
    return text


def read_answer(body: bytes | str, status: int = 200) -> Answer:
    """The answer in a body of the format `detections`.

    Raises ServerRefused for a body that tells an error, whatever the status says, ServerFailed for any other.
    """
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = None
    if isinstance(content, dict) and content.keys() >= ERROR_FIELDS and "detections" not in content:
        code = content["code"]
        kind, message = str(content["type"]), str(content["message"])
        if kind == NO_PATH:
            message += "; of a gateway use the protocol kserve"
        raise refused(code if isinstance(code, int) else status, kind, message)
    if status != 200:
        raise refused(status, UNNAMED, short(body) or "the server gives no reason")
    try:
        return Answer.from_json(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ServerFailed(
            f"the server does not answer in Marina's format `detections` ({short(body)}); ask a model that Marina built"
        ) from error


def refused(status: int, kind: str, message: str) -> ServerRefused:
    if kind == WRONG_KEY or status in (401, 403):
        message += "; give the server's token, for the command by --token-file"
    return ServerRefused(status, kind, message)


def distrusted(url: str) -> ServerFailed:
    return ServerFailed(f"{url} shows a certificate that is not trusted; give that of its authority, by --ca")


def reason(body: bytes) -> str:
    """What a body says to people that tells an error, in TorchServe's form or in that of KServe v2."""
    try:
        content = json.loads(body)
        return short(str(content["message"] if "message" in content else content["error"]))
    except (ValueError, LookupError, TypeError):
        return short(body)


def short(body: bytes | str) -> str:
    text = body.decode("utf-8", errors="replace") if isinstance(body, bytes) else body
    return " ".join(text.split())[:200]


def retry_after(value: str | None) -> float | None:
    """Seconds from now, from a header Retry-After: a number of them, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None
