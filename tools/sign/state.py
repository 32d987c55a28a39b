"""What there is to say about an archive's signature, for people and programs."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.sign.statement import BadSignature, read_signature

if TYPE_CHECKING:
    from tools.sign.keys import Keys


def signature_state(archive: Path, trusted: "Keys", now: datetime) -> dict[str, Any]:
    """state: none, unchecked (no key to check with), valid or refused. key, signed, expires: what the signature says.
    reason: why it is refused, in one line."""
    state: dict[str, Any] = {"state": "none", "key": None, "signed": None, "expires": None, "reason": None}
    try:
        found = read_signature(archive)
        if found:
            envelope, statement = found
            claim = statement.predicate
            state |= {"state": "unchecked", "key": envelope.key, "signed": claim.signed, "expires": claim.expires}
        if trusted:
            from tools.sign.signature import verify_signature

            verify_signature(archive, trusted, now)
            state["state"] = "valid"
    except BadSignature as error:
        state |= {"state": "refused", "reason": str(error)}
    return state


def state_line(state: dict[str, Any]) -> str:
    """`signature_state` for people."""
    match state["state"]:
        case "none":
            return "none"
        case "refused":
            return f"REFUSED: {state['reason']}"
        case "valid":
            how = "valid"
        case _:
            how = "not checked, for want of --key"
    return f"by key {state['key']}, {state['signed']} to {state['expires']}: {how}"
