"""DSSE, https://github.com/secure-systems-lab/dsse: an envelope around a payload that is signed together with its type.

An envelope is written in one way only, and no other is read: whoever changes a byte is refused, be it a blank.
"""

import base64
import json
import re
from dataclasses import dataclass

PAYLOAD_TYPE = "application/vnd.in-toto+json"
KEY_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Envelope:
    """payload: what was signed. key: the id of the key that has signed it. signature: its 64 bytes."""

    payload: bytes
    key: str
    signature: bytes


def signed_bytes(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """What the signature is over: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def encode(envelope: Envelope) -> bytes:
    content = {
        "payload": base64.b64encode(envelope.payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": envelope.key, "sig": base64.b64encode(envelope.signature).decode()}],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def decode(content: bytes) -> Envelope:
    """Raises ValueError for anything that `encode` has not written so."""
    try:
        found = json.loads(content)
        (signature,) = found["signatures"]
        envelope = Envelope(
            base64.b64decode(found["payload"]), str(signature["keyid"]), base64.b64decode(signature["sig"])
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("it is no DSSE envelope of one signature") from error
    if encode(envelope) != content or not KEY_ID.fullmatch(envelope.key):
        raise ValueError("it is not written as `marina archive sign` writes it")
    return envelope
