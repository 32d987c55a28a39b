"""Signs archives, and checks that they are signed by whom they should be."""

import hashlib
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from handlers.errors import BadArchive
from tools.archive.companions import SIGNATURE, beside
from tools.archive.reader import PROVENANCE, Archive, open_archive
from tools.archive.sources import sha256_of
from tools.archive.verify import check_entries
from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.sign.envelope import Envelope, encode, signed_bytes
from tools.sign.keys import Keys, key_id
from tools.sign.statement import (
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    BadSignature,
    Statement,
    read_signature,
    text_of,
    time_of,
)
from tools.strict import parse

# How far the clock of a signer may be ahead of that of who checks.
SKEW = timedelta(minutes=5)


def sign_archive(archive: Path, key: Ed25519PrivateKey, lifetime: timedelta, now: datetime) -> Path:
    """Write the signature beside the archive, in place of one that is there. Returns where.

    Raises BadArchive for an archive that is not what was built, ToolError when nothing can be written.
    """
    with open_archive(archive) as opened:
        ours = opened.settings is not None
        provenance = _provenance_digest(opened)
        predicate = {
            "model": opened.name,
            "version": opened.version,
            "provenance": provenance and {"sha256": provenance},
            "signedAt": text_of(now),
            "expiresAt": text_of(now + lifetime),
        }
    if ours:
        check_entries(archive)
    content = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": archive.name, "digest": {"sha256": sha256_of(archive)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    statement = parse(Statement, content)
    payload = statement.model_dump_json(by_alias=True).encode()
    envelope = Envelope(payload, key_id(key.public_key()), key.sign(signed_bytes(payload)))
    path = beside(archive, SIGNATURE)
    try:
        with replacing(path) as file:
            file.write(encode(envelope))
    except OSError as error:
        raise ToolError(
            f"{path} cannot be written ({error.strerror}); copy the archive to a folder of yours"
        ) from error
    return path


def verify_signature(archive: Path, trusted: Keys, now: datetime) -> Statement:
    """What a trusted key says of an archive; nothing of the archive itself is opened before its checksum is right.

    Raises BadSignature: it is not signed, damaged, by another key, not valid now, or not about this archive.
    """
    found = read_signature(archive)
    path = beside(archive, SIGNATURE)
    if found is None:
        raise BadSignature(
            f"{archive.name} is not signed: there is no {path.name} beside it; `marina archive sign` makes it"
        )
    envelope, statement = found
    if envelope.key not in trusted:
        raise BadSignature(
            f"{archive.name} is signed by key {envelope.key}, which is not trusted; trusted: {', '.join(trusted)}"
        )
    try:
        trusted[envelope.key].verify(envelope.signature, signed_bytes(envelope.payload))
    except InvalidSignature:
        raise BadSignature(
            f"signature {path.name} is not by key {envelope.key}, as it says; it was changed, do not use the archive"
        ) from None
    claim = statement.predicate
    if time_of(claim.signed) > now + SKEW:
        raise BadSignature(
            f"the signature of {archive.name} is not valid yet: it is of {claim.signed}, and the clock here says"
            f" {text_of(now)}; set the clock that is wrong"
        )
    if time_of(claim.expires) <= now:
        raise BadSignature(f"the signature of {archive.name} has expired at {claim.expires}; sign the archive again")
    if sha256_of(archive) != statement.sha256:
        raise BadSignature(_difference(archive, statement))
    with open_archive(archive) as opened:
        if _provenance_digest(opened) != (claim.provenance and claim.provenance.sha256):
            raise BadSignature(
                f"{archive.name}: its {PROVENANCE} is not the one that was signed; do not use this archive"
            )
    return statement


def _provenance_digest(archive: Archive) -> str | None:
    return hashlib.sha256(archive.read(PROVENANCE)).hexdigest() if PROVENANCE in archive.names() else None


def _difference(archive: Path, statement: Statement) -> str:
    """Why an archive may have another checksum than the signed one."""
    claim = statement.predicate
    try:
        with open_archive(archive) as opened:
            if (opened.name, opened.version) != (claim.model, claim.version):
                return (
                    f"{archive.name} is {opened.name} {opened.version}, and the signature beside it is of {statement};"
                    " sign this archive, or fetch its own signature"
                )
            if _provenance_digest(opened) != (claim.provenance and claim.provenance.sha256):
                return f"{archive.name}: its {PROVENANCE} is not the one that was signed; do not use this archive"
    except BadArchive as error:
        return f"{archive.name} is not what was signed: {error}"
    return f"{archive.name} was changed after it was signed (its SHA-256 is another); do not use this archive"
