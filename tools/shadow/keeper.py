"""Pictures on which two models differ, kept as a server's capture keeps its own: see `handlers.capture_store`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from handlers.capture_budget import Hourly, Memory
from handlers.capture_picture import look, prepared
from handlers.capture_store import open_store, write_item
from handlers.settings import Limits
from tools.shadow.matching import Row
from tools.shadow.record import Identity

REASON = "disagreement"


class Keeper:
    """At most `per_hour` pictures, and none that is like another. Blocking. to: see `open_store`."""

    def __init__(self, to: str, per_hour: int, limits: Limits):
        self._store = open_store(to)
        self._hour = Hourly(per_hour)
        self._memory = Memory()
        self._limits = limits

    def keep(
        self, body: bytes, live: Identity, answer: Mapping[str, Any], threshold: float, shadow: Mapping[str, Any]
    ) -> bool:
        """Whether it was kept. answer, shadow: of the live model, above its threshold, and of the candidate, in format
        `detections`. Raises StoreError, and RequestError for a picture that cannot be read."""
        now = time.monotonic()
        if not self._hour.left(now):
            return False
        rows: Sequence[Row] = answer["detections"]
        seen = look(body, self._limits), frozenset(row["index"] for row in rows)
        if self._memory.has_like(*seen):
            return False
        picture, suffix = prepared(body, self._limits, [])
        record = {
            "model": live.name,
            "version": live.version,
            "checksum": live.checksum,
            "reasons": [REASON],
            "width": answer["width"],
            "height": answer["height"],
            "detections": rows,
            "score_threshold": threshold,
            "blurred": False,
            "shadow": {name: shadow[name] for name in ("model", "version", "detections")},
        }
        write_item(self._store, time.time(), picture, suffix, record)
        self._memory.add(*seen)
        self._hour.take(now)
        return True
