"""A client of served models: pictures, folders, videos and live sources, over every protocol.

from tools.client import Client

with Client("http://127.0.0.1:8080", "shapes", token=token) as client:
    for answer in client.predict_many(["photos/", "door.mp4"]):
        print(answer.source, answer.error or answer.detections)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    # `marina --help` loads this package, and numpy comes with the two.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tools.client import client

    return getattr(client, name)
