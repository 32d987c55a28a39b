"""Removes what pushes have left that were cut off, and nothing that anybody could still want."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tools.store.manifest import Manifest, new_id, time_of
from tools.store.store import ABANDONED, BLOBS, CONDEMNED, PUSHES, Store


@dataclass(frozen=True)
class Removed:
    """pushes: given up. blobs, size: without a push that refers to them, bytes. uploads: begun and not finished."""

    pushes: int
    blobs: int
    size: int
    uploads: int


def collect(store: Store, age: timedelta) -> Removed:
    """age: of a push that counts as cut off. One that is slower than that is told so when it ends, and can be repeated.

    Raises ToolError for a server on which this is not safe.
    """
    store.objects.check_exclusive()
    before = datetime.now(UTC) - age
    given_up = sum(_give_up(store, push, before) for push in store.pushes())
    blobs = {entry.name: entry.size for entry in store.objects.names(BLOBS)}
    condemned = sorted(blobs.keys() - _referred(store))
    if condemned:
        key = f"{CONDEMNED}{new_id()}.json"
        store.objects.create(key, json.dumps(condemned).encode())
        # A push that has not seen the list has its marker in the store by now, or its manifest.
        condemned = sorted(set(condemned) - _referred(store))
        for name in condemned:
            store.objects.delete(name)
        store.objects.delete(key)
    for key in store.condemned():
        if time_of(key.removeprefix(CONDEMNED)) < before:
            store.objects.delete(key)
    uploads = store.objects.clean(time.time() - age.total_seconds())
    return Removed(given_up, len(condemned), sum(blobs[name] for name in condemned), uploads)


def _give_up(store: Store, push: Manifest, before: datetime) -> bool:
    """Close a push that is too old by taking the place of its manifest, so that it cannot become visible any more."""
    if time_of(push.id) >= before:
        return False
    note = {ABANDONED: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "id": push.id}
    was_open = store.objects.create(push.key, json.dumps(note).encode())
    store.objects.delete(f"{PUSHES}{push.id}.json")
    return was_open


def _referred(store: Store) -> set[str]:
    """The blobs that a push, done or under way, refers to."""
    # Markers first: a push that ends in between is then seen by its manifest.
    manifests: Iterable[Manifest] = [*store.pushes(), *store.manifests()]
    return {file.blob for manifest in manifests for file in manifest.files}
