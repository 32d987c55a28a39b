"""Certificates of a private authority for 127.0.0.1, made anew by whoever needs them."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Files(NamedTuple):
    """PEM files. authority: what clients trust. locked: the key with a password."""

    authority: Path
    certificate: Path
    key: Path
    locked: Path


def write_certificates(folder: Path) -> Files:
    files = Files(*(folder / f"{name}.pem" for name in Files._fields))
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("authority", "server"))
    ca = x509.BasicConstraints(ca=True, path_length=0)
    root = _builder(root_name, root_name, root_key.public_key()).add_extension(ca, critical=True)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    leaf = _builder(name, root_name, key.public_key()).add_extension(address, critical=False)
    leaf = leaf.add_extension(identifier, critical=False)
    for path, builder in ((files.authority, root), (files.certificate, leaf)):
        path.write_bytes(builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    for path, lock in (
        (files.key, serialization.NoEncryption()),
        (files.locked, serialization.BestAvailableEncryption(b"secret")),
    ):
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(pem, pkcs8, lock))
    return files


def _builder(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
