"""Whose signature an archive must carry before it becomes production or is deployed.

    keys/<id>.json    a public key that the store trusts, with who said so and when

Nothing has to be signed while there is none. It keeps people from forgetting; whoever may write to the store may change
it too, so a server that must be safe from them has keys of its own: `MARINA_KEYS`, in the container `/etc/marina/keys`.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tools.errors import ToolError
from tools.sign.command import VARIABLE, trusted_keys
from tools.store.manifest import FORMAT, read_record
from tools.store.objects import Missing
from tools.store.store import Store
from tools.store.tags import who
from tools.strict import Strict

if TYPE_CHECKING:
    from tools.sign.keys import Keys

KEYS = "keys/"


class TrustedKey(Strict):
    """pem: the public key. when, who: since when, and who said so."""

    format: int
    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    pem: str
    when: str
    who: str


def trust(store: Store, paths: list[Path]) -> list[str]:
    """Have the store trust the public keys of files or folders; their ids. Raises ToolError for other files."""
    from tools.sign.keys import pem_of, read_public

    found = read_public(paths)
    for id, key in found.items():
        when = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        record = TrustedKey(format=FORMAT, id=id, pem=pem_of(key).decode(), when=when, who=who())
        store.objects.create(f"{KEYS}{id}.json", record.model_dump_json(indent=1).encode())
    return list(found)


def distrust(store: Store, id: str) -> None:
    """Raises ToolError when the store does not trust it anyway."""
    if id not in {record.id for record in trusted(store)}:
        raise ToolError(f"store {store.url} trusts no key {id!r}; `marina store trust` lists those that it does")
    store.objects.delete(f"{KEYS}{id}.json")


def trusted(store: Store) -> list[TrustedKey]:
    found = []
    for entry in store.objects.names(KEYS):
        where = f"store {store.url}: {entry.name}"
        try:
            found.append(read_record(TrustedKey, json.loads(store.objects.read(entry.name)), where))
        except Missing:
            continue  # taken away meanwhile
        except ValueError as error:
            raise ToolError(f"{where} is damaged ({error}); somebody changed the store by hand") from error
    return found


def check_signature(store: Store, archive: Path) -> None:
    """Raises ToolError unless an archive that was pulled is signed by a key that this machine trusts, and by one that
    the store does, where either names any."""
    for keys, whose in ((trusted_keys([]), VARIABLE), (_keys_of(store), f"store {store.url}")):
        if not keys:
            continue
        from tools.sign.signature import verify_signature
        from tools.sign.statement import BadSignature

        try:
            verify_signature(archive, keys, datetime.now(UTC))
        except BadSignature as error:
            raise ToolError(f"{whose} wants a signature that counts: {error}; then push it again") from error


def _keys_of(store: Store) -> "Keys":
    records = trusted(store)
    if not records:
        return {}
    from tools.sign.keys import key_id, public_key

    keys = [public_key(record.pem.encode(), f"store {store.url}: key {record.id}") for record in records]
    return {key_id(key): key for key in keys}
