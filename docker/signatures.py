"""Signatures of archives, checked before anything of an archive is opened. Marina's own rules, by openssl.

NAME.mar.sig.json   a DSSE envelope, https://github.com/secure-systems-lab/dsse
  payload           an in-toto Statement v1 about the SHA-256 of NAME.mar
  signature         Ed25519 (RFC 8032) over payload and type
"""

import base64
import binascii
import hashlib
import json
import re
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from checksums import Refused, archives_of

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:x-marina:archive-signature:v1"
SUFFIX = ".sig.json"
MAX_BYTES = 1 << 16
PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*")
# RFC 8410: what stands before the 32 bytes of an Ed25519 key.
ED25519 = bytes.fromhex("302a300506032b6570032100")
ID_DIGITS = 16
KEY_ID = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")
# How far the clock of a signer may be ahead of the one here.
SKEW = timedelta(minutes=5)
TIME = "%Y-%m-%dT%H:%M:%SZ"

# PEM files by the ids of their keys.
Keys = dict[str, Path]


def read_keys(folder: Path) -> Keys | None:
    """The public keys of a folder; None where there is no folder, and nothing has to be signed.

    Raises Refused for a folder without any: who mounts one wants signatures.
    """
    try:
        if not folder.exists():
            return None
        files = {path: path.read_bytes() for path in sorted(folder.glob("*.pem"))}
    except OSError as error:
        raise Refused(f"{folder}: a key cannot be read ({error})") from error
    if not files:
        raise Refused(f"{folder} holds no public key, no file *.pem: put one there, or do not mount the folder")
    return {_key_id(path, content): path for path, content in files.items()}


def _key_id(path: Path, content: bytes) -> str:
    if b"PRIVATE KEY" in content:
        raise Refused(
            f"{path} holds a private key: mount the public one, *.pub.pem, and keep the private one elsewhere"
        )
    found = PEM.fullmatch(content)
    try:
        der = base64.b64decode(found[1]) if found else b""
    except binascii.Error:
        der = b""
    if not der.startswith(ED25519) or len(der) != len(ED25519) + 32:
        raise Refused(f"{path} is not one public key of the kind Ed25519 in PEM: `marina archive keygen` makes one")
    return hashlib.sha256(der).hexdigest()[:ID_DIGITS]


def check_signatures(store: Path, keys: Keys, now: datetime) -> list[str]:
    """A line for each archive of `store`. Raises Refused at the first that `check_signature` refuses, and for what
    TorchServe would load beside archives, folders and `.model` files, which no signature is of."""
    lines = [f"{path.name}: {check_signature(path, keys, now)}" for path in archives_of(store)]
    for path in sorted(store.iterdir()):
        if not path.name.startswith(".") and path.suffix != ".mar" and (path.is_dir() or path.suffix == ".model"):
            raise Refused(f"{path} would be served, and nothing says who made it: remove it from the model store")
    return lines


def check_signature(archive: Path, keys: Keys, now: datetime) -> str:
    """By which key an archive is signed, and until when. Raises Refused: it is not signed, damaged, by another key, not
    valid now, or not about this archive."""
    path = archive.with_name(archive.name + SUFFIX)
    if not path.exists():
        raise Refused(f"{archive} is not signed: there is no {path.name} beside it")
    try:
        with path.open("rb") as file:
            payload, key, signature = _open(file.read(MAX_BYTES))
        if key not in keys:
            raise Refused(f"{archive} is signed by key {key}, which is not trusted; trusted: {', '.join(keys)}")
        if not _fits(keys[key], signature, _signed_bytes(payload)):
            raise Refused(f"signature {path} is not by key {key}, as it says; it was changed, do not use this archive")
        wanted, signed, expires = _read(payload)
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"the signature of {archive} cannot be checked: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"signature {path} is damaged, or of something else; sign the archive again") from error
    if signed > now + SKEW:
        raise Refused(f"the signature of {archive} is of {signed:{TIME}}, and the clock here says {now:{TIME}}")
    if expires <= now:
        raise Refused(f"the signature of {archive} has expired at {expires:{TIME}}; sign the archive again")
    if found != wanted:
        raise Refused(f"{archive} is not what was signed (its SHA-256 is another); do not use this archive")
    return f"signed by key {key} until {expires:{TIME}}"


def _open(content: bytes) -> tuple[bytes, str, bytes]:
    """Payload, id of the key, and signature. Raises ValueError, KeyError or TypeError for what is no envelope, or is
    written in another way than the one that `marina archive sign` has."""
    found = json.loads(content)
    (signature,) = found["signatures"]
    payload, signed = base64.b64decode(found["payload"]), base64.b64decode(signature["sig"])
    same: dict[str, Any] = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": signature["keyid"], "sig": base64.b64encode(signed).decode()}],
    }
    # The id is put into messages.
    if (json.dumps(same, indent=1) + "\n").encode() != content or not KEY_ID.fullmatch(signature["keyid"]):
        raise ValueError
    return payload, signature["keyid"], signed


def _signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _fits(key: Path, signature: bytes, message: bytes) -> bool:
    """Whether openssl says so."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "message").write_bytes(message)
        (Path(folder) / "signature").write_bytes(signature)
        command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(key.absolute())]
        done = subprocess.run(
            [*command, "-in", "message", "-sigfile", "signature"], cwd=folder, env={}, capture_output=True
        )
    return done.returncode == 0


def _read(payload: bytes) -> tuple[str, datetime, datetime]:
    """The archive's SHA-256, and from when to when the signature counts."""
    statement = json.loads(payload)
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError
    (subject,) = statement["subject"]
    predicate = statement["predicate"]
    signed, expires = (datetime.strptime(predicate[key], TIME).replace(tzinfo=UTC) for key in ("signedAt", "expiresAt"))
    return str(subject["digest"]["sha256"]), signed, expires
