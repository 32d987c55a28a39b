"""What a client gets."""

import json
from dataclasses import dataclass
from typing import Any

JSON = "application/json"


@dataclass(frozen=True)
class Reply:
    """retry_after: seconds, for one that is only busy."""

    status: int
    content_type: str
    body: bytes
    retry_after: int | None = None


class Refusal(Exception):
    """A request that no worker answers. kind: a name for programs; TorchServe's where it has one, for its clients."""

    def __init__(self, status: int, kind: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        body = {"code": status, "type": kind, "message": message}
        self.reply = json_reply(body, status, retry_after)


def json_reply(value: Any, status: int = 200, retry_after: int | None = None) -> Reply:
    return Reply(status, JSON, json.dumps(value).encode(), retry_after)
