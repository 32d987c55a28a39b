"""Ed25519 keys (RFC 8032) in PEM files: private ones as PKCS #8, public ones as SubjectPublicKeyInfo."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from tools.errors import ToolError

PASSPHRASE_VARIABLE = "MARINA_KEY_PASSPHRASE"  # noqa: S105  # a name
SUFFIX = ".pem"
ID_DIGITS = 16

# By their ids.
Keys = dict[str, Ed25519PublicKey]


def key_id(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:ID_DIGITS]


def pem_of(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def make_keys(name: Path, passphrase: bytes | None) -> tuple[Path, Path, str]:
    """Write NAME.key.pem, which its owner alone may read, and NAME.pub.pem. Returns both and the id.

    passphrase: encrypts the private key. Raises ToolError rather than replace a file.
    """
    if not name.name:
        raise ToolError(f"NAME {str(name)!r} names no file; give one such as keys/team")
    private = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    paths = name.with_name(f"{name.name}.key.pem"), name.with_name(f"{name.name}.pub.pem")
    for path in paths:
        if path.exists():
            raise ToolError(f"{path} is there already, and a key that is lost cannot be had again; give another NAME")
    for path, content, mode in zip(paths, (secret, pem_of(private.public_key())), (0o600, 0o644), strict=True):
        try:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except OSError as error:
            raise ToolError(f"{path} cannot be written ({error.strerror}); give NAME in a folder of yours") from error
    return *paths, key_id(private.public_key())


def read_passphrase(file: Path | None) -> bytes | None:
    """From the file, without the end of its line, else from the environment; None when neither is there."""
    if file is None:
        return os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None
    found = _read(file, "passphrase file").rstrip(b"\r\n")
    if not found:
        raise ToolError(f"passphrase file {file} is empty")
    return found


def read_private(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    """Raises ToolError for anything else; no message shows what is in the file."""
    content = _read(path, "key")
    if b"PUBLIC KEY" in content:
        raise ToolError(f"{path} holds a public key; sign with the private one, which `marina archive keygen` made too")
    encrypted = b"ENCRYPTED" in content
    if encrypted and passphrase is None:
        raise ToolError(f"{path} wants its passphrase: --passphrase-file FILE, or {PASSPHRASE_VARIABLE}")
    try:
        key = load_pem_private_key(content, passphrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = "the passphrase is wrong, or the file damaged" if encrypted else "it is no private key in PEM"
        # Whatever the library says may quote the file.
        raise ToolError(f"{path} cannot be used: {why}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ToolError(f"{path} is of another kind than Ed25519; `marina archive keygen` makes one")
    return key


def read_public(paths: Iterable[Path]) -> Keys:
    """The keys of files, and of the `.pem` files of folders. Raises ToolError when there is none, or a private one."""
    found: Keys = {}
    for path in paths:
        files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise ToolError(f"{path} holds no public key, no file *{SUFFIX}")
        for file in files:
            key = public_key(_read(file, "key"), str(file))
            found[key_id(key)] = key
    return found


def public_key(content: bytes, where: str) -> Ed25519PublicKey:
    """where: names it in messages. Raises ToolError for anything but one public key."""
    if b"PRIVATE KEY" in content:
        raise ToolError(
            f"{where} holds a private key; give the public one, *.pub.pem, and keep the private one from every machine"
            " that only checks"
        )
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ToolError(f"{where} is no public key in PEM; `marina archive keygen` makes one, *.pub.pem") from None
    if not isinstance(key, Ed25519PublicKey) or content.count(b"-----BEGIN") != 1:
        raise ToolError(f"{where} is not one public key of the kind Ed25519; `marina archive keygen` makes one")
    return key


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ToolError(f"{what} {path} cannot be read ({error.strerror})") from error
