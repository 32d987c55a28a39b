"""Signatures: what Marina and the serving image, each by its own code, take for a signed archive, and what not."""

import argparse
import base64
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from tiny_archive import as_built, write_archive

from handlers.errors import BadArchive, MarinaError
from tools.archive.companions import SIGNATURE, beside
from tools.archive.reader import PROVENANCE
from tools.archive.verify import check_entries
from tools.cli import main
from tools.errors import ToolError
from tools.serve.process import bindable_port
from tools.serve.rollout import Address
from tools.sign.command import VARIABLE, lifetime_of
from tools.sign.envelope import Envelope, encode, signed_bytes
from tools.sign.keys import (
    PASSPHRASE_VARIABLE,
    key_id,
    make_keys,
    pem_of,
    read_passphrase,
    read_private,
    read_public,
)
from tools.sign.signature import sign_archive, verify_signature
from tools.sign.statement import BadSignature, read_signature
from tools.store import command as store_command
from tools.store.deploy import deploy
from tools.store.promote import promote, roll_back, tag
from tools.store.store import Store
from tools.store.trust import distrust, trust

DOCKER = Path(__file__).resolve().parent.parent / "docker"
# The files of the image find each other beside them, as there.
sys.path.insert(0, str(DOCKER))

import checksums  # noqa: E402
import signatures  # noqa: E402

NOW = datetime(2030, 5, 17, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CHANGES = 200
NOWHERE = Address("http://127.0.0.1:9", "http://127.0.0.1:9", {})

# serve.py, with what the image has at fixed places put elsewhere, and a program that ends at once for Java.
DRIVER = """
import sys
from pathlib import Path
docker, keys, runtime, port = sys.argv[1:]
sys.path.insert(0, docker)
import serve
serve.KEYS, serve.JAVA, serve.RUNTIME, serve.PORT = Path(keys), Path("/bin/true"), Path(runtime), int(port)
sys.exit(serve.main())
"""


class Signer:
    """A pair of keys in files."""

    def __init__(self, folder: Path, name: str):
        self.private_file, self.public_file, self.id = make_keys(folder / name, None)
        self.private: Ed25519PrivateKey = read_private(self.private_file, None)
        self.public = {self.id: self.private.public_key()}

    def sign(self, archive: Path, lifetime: timedelta = DAY, now: datetime = NOW) -> Path:
        return sign_archive(archive, self.private, lifetime, now)


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Signer, Signer]:
    folder = tmp_path_factory.mktemp("keys")
    return Signer(folder, "team"), Signer(folder, "other")


@pytest.fixture
def team(signers: tuple[Signer, Signer]) -> Signer:
    return signers[0]


@pytest.fixture
def other(signers: tuple[Signer, Signer]) -> Signer:
    return signers[1]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """With a provenance, as the builder writes it; signed by nobody."""
    (tmp_path / "models").mkdir()
    path = as_built(write_archive(tmp_path / "tiny.mar", "tiny"))
    return Path(shutil.move(path, tmp_path / "models" / "tiny.mar"))


@pytest.fixture
def signed(archive: Path, team: Signer) -> Path:
    team.sign(archive)
    return archive


def refusals(archive: Path, *trusted: Signer, now: datetime = NOW) -> list[str]:
    """What Marina and the image say, one after the other."""
    keys = read_public(signer.public_file for signer in trusted)
    with pytest.raises(BadSignature) as ours:
        verify_signature(archive, keys, now)
    with pytest.raises(checksums.Refused) as theirs:
        signatures.check_signature(archive, {signer.id: signer.public_file for signer in trusted}, now)
    found = [str(ours.value), str(theirs.value)]
    assert not any("\n" in text for text in found)
    return found


def accepted(archive: Path, *trusted: Signer, now: datetime = NOW) -> None:
    verify_signature(archive, read_public(signer.public_file for signer in trusted), now)
    line = signatures.check_signature(archive, {signer.id: signer.public_file for signer in trusted}, now)
    assert line.startswith("signed by key ")


# What is published.


def test_the_envelope_is_dsses() -> None:
    """The example of https://github.com/secure-systems-lab/dsse/blob/master/protocol.md."""
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert signed_bytes(b"hello world", "http://example.com/HelloWorld") == expected


def test_the_image_checks_ed25519(tmp_path: Path) -> None:
    """RFC 8032, section 7.1, test 2; and not without its signature, its message or its key."""
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    pem = tmp_path / "key.pem"
    pem.write_bytes(pem_of(Ed25519PublicKey.from_public_bytes(public)))
    assert signatures._fits(pem, signature, b"\x72")
    assert not signatures._fits(pem, signature, b"\x73")
    assert not signatures._fits(pem, signature[:-1] + b"\1", b"\x72")
    assert not signatures._fits(tmp_path / "missing.pem", signature, b"\x72")


def test_the_statement_is_in_totos(signed: Path, team: Signer) -> None:
    envelope, _ = read_signature(signed)
    said = json.loads(envelope.payload)
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert [each["name"] for each in said["subject"]] == ["tiny.mar"]
    assert said["predicate"]["signedAt"] == "2030-05-17T12:00:00Z"
    assert said["predicate"]["expiresAt"] == "2030-05-18T12:00:00Z"
    assert envelope.key == team.id
    accepted(signed, team)


# What is refused.


def changed_at(content: bytes, place: int, by: int) -> bytes:
    return content[:place] + bytes([content[place] ^ by]) + content[place + 1 :]


def test_an_archive_with_any_byte_changed_is_refused(signed: Path, team: Signer) -> None:
    content, chance = signed.read_bytes(), random.Random(7)
    for _ in range(CHANGES):
        signed.write_bytes(changed_at(content, chance.randrange(len(content)), chance.randrange(1, 256)))
        for text in refusals(signed, team):
            assert "was signed" in text
    signed.write_bytes(content)
    accepted(signed, team)


def test_a_signature_with_any_byte_changed_is_refused(signed: Path, team: Signer) -> None:
    """Where the change means something, and where it does not: a blank, the case of a hexadecimal digit, spare bits."""
    path = beside(signed, SIGNATURE)
    content, chance = path.read_bytes(), random.Random(8)
    for _ in range(CHANGES):
        path.write_bytes(changed_at(content, chance.randrange(len(content)), chance.randrange(1, 256)))
        refusals(signed, team)
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + b" " + content[place:])
        refusals(signed, team)
    path.write_bytes(content)
    accepted(signed, team)


def test_spare_bits_of_base64_are_not_spare(signed: Path, team: Signer) -> None:
    path = beside(signed, SIGNATURE)
    content = path.read_text()
    signature = json.loads(content)["signatures"][0]["sig"]
    assert signature.endswith("==")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = alphabet[alphabet.index(signature[-3]) ^ 1]
    path.write_text(content.replace(signature, f"{signature[:-3]}{other}=="))
    assert all("damaged" in text for text in refusals(signed, team))


def test_bytes_before_and_behind_are_refused(signed: Path, team: Signer) -> None:
    """A zip file is read from its end, and stands more before it."""
    content = signed.read_bytes()
    for changed in (b"x" + content, content + b"x", content[:-1], b""):
        signed.write_bytes(changed)
        refusals(signed, team)


def test_another_key_is_refused(signed: Path, team: Signer, other: Signer) -> None:
    for text in refusals(signed, other):
        assert team.id in text and other.id in text and "not trusted" in text
    accepted(signed, other, team)


def test_a_signature_by_another_key_under_a_trusted_name_is_refused(signed: Path, team: Signer, other: Signer) -> None:
    path = beside(signed, SIGNATURE)
    envelope, _ = read_signature(signed)
    forged = Envelope(envelope.payload, team.id, other.private.sign(signed_bytes(envelope.payload)))
    path.write_bytes(encode(forged))
    assert all(f"is not by key {team.id}" in text for text in refusals(signed, team, other))


def test_no_signature_is_refused(archive: Path, team: Signer) -> None:
    assert all("tiny.mar is not signed: there is no tiny.mar.sig.json" in text for text in refusals(archive, team))


def test_times_are_kept(signed: Path, team: Signer) -> None:
    accepted(signed, team, now=NOW + DAY - timedelta(seconds=1))
    assert all("expired at 2030-05-18T12:00:00Z" in text for text in refusals(signed, team, now=NOW + DAY))
    # Clocks differ a little.
    accepted(signed, team, now=NOW - timedelta(minutes=5))
    for text in refusals(signed, team, now=NOW - timedelta(minutes=6)):
        assert "2030-05-17T12:00:00Z" in text and "clock here says 2030-05-17T11:54:00Z" in text


def test_the_signature_of_another_archive_is_refused(signed: Path, team: Signer, tmp_path: Path) -> None:
    for name, version in (("tiny", "2.0"), ("large", "1.0")):
        another = as_built(write_archive(tmp_path / f"{name}.mar", name, version=version))
        shutil.copy(beside(signed, SIGNATURE), beside(another, SIGNATURE))
        ours, theirs = refusals(another, team)
        assert f"is {name} {version}, and the signature beside it is of tiny 1.0" in ours
        assert "is not what was signed" in theirs


def test_a_swapped_provenance_with_right_checksums_is_refused(signed: Path, team: Signer, tmp_path: Path) -> None:
    with zipfile.ZipFile(signed) as file:
        assert PROVENANCE in file.namelist()
    forged = as_built(write_archive(tmp_path / "tiny.mar", "tiny"), recipe={"license": "MIT"})
    shutil.copy(forged, signed)
    check_entries(signed)
    assert "3 entries are those that were built" in checksums.check_archive(signed)
    ours, theirs = refusals(signed, team)
    assert "PROVENANCE.json is not the one that was signed" in ours
    assert "is not what was signed" in theirs


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v2"},
        {"predicateType": "https://slsa.dev/provenance/v1"},
        {"subject": []},
        {"subject": [{"name": "a", "digest": {"sha1": "0"}}]},
        {"predicate": {}},
        {"predicate": {"signedAt": "2030-02-30T00:00:00Z", "expiresAt": "2031-01-01T00:00:00Z"}},
    ],
)
def test_another_statement_of_a_trusted_key_is_refused(signed: Path, team: Signer, change: dict[str, object]) -> None:
    envelope, _ = read_signature(signed)
    payload = json.dumps(json.loads(envelope.payload) | change).encode()
    forged = Envelope(payload, team.id, team.private.sign(signed_bytes(payload)))
    beside(signed, SIGNATURE).write_bytes(encode(forged))
    refusals(signed, team)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 9000, b'{"signatures": [1]}'])
def test_what_is_no_envelope_is_refused(signed: Path, team: Signer, content: bytes) -> None:
    beside(signed, SIGNATURE).write_bytes(content)
    assert all("damaged" in text for text in refusals(signed, team))


def test_an_id_is_plain(signed: Path, team: Signer) -> None:
    """It is printed."""
    envelope, _ = read_signature(signed)
    for key in ("\x1b[2J", "serve: signed", team.id.upper()):
        beside(signed, SIGNATURE).write_bytes(encode(Envelope(envelope.payload, key, envelope.signature)))
        assert all("damaged" in text for text in refusals(signed, team))


def test_a_damaged_archive_is_not_signed(archive: Path, team: Signer, tmp_path: Path) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"import json", b"import jsoN"))
    with pytest.raises(BadArchive):
        team.sign(archive)
    assert not beside(archive, SIGNATURE).exists()
    with pytest.raises(BadArchive, match="no such file"):
        team.sign(tmp_path / "none.mar")


def test_another_builders_archive_can_be_signed(tmp_path: Path, team: Signer) -> None:
    path = write_archive(tmp_path / "stock.mar", "stock")
    team.sign(path)
    accepted(path, team)


# Keys.


def test_keys_are_private_to_their_owner_and_never_replaced(tmp_path: Path) -> None:
    private, public, key = make_keys(tmp_path / "a", None)
    assert private.stat().st_mode & 0o777 == 0o600
    assert read_public([public]).keys() == {key} == {key_id(read_private(private, None).public_key())}
    before = private.read_bytes()
    for name in (private, public):
        with pytest.raises(ToolError, match="is there already"):
            make_keys(tmp_path / "a", None)
        name.unlink()
        if name == private:
            assert not private.exists() and public.exists()
    assert b"PRIVATE KEY" in before
    new, _, _ = make_keys(tmp_path / "new" / "folder", None)
    assert new.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ToolError, match="cannot be written"):
        make_keys(new / "folder", None)
    for name in (Path(), Path("/")):
        with pytest.raises(ToolError, match="names no file"):
            make_keys(name, None)


def test_a_passphrase_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    (tmp_path / "words").write_text("correct horse\n")
    private, _, _ = make_keys(tmp_path / "a", read_passphrase(tmp_path / "words"))
    assert b"ENCRYPTED" in private.read_bytes()
    for given, said in ((None, "wants its passphrase"), (b"wrong", "the passphrase is wrong, or the file damaged")):
        with pytest.raises(ToolError, match=said):
            read_private(private, given)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    assert read_private(private, read_passphrase(None))
    (tmp_path / "words").write_text("\n")
    with pytest.raises(ToolError, match="is empty"):
        read_passphrase(tmp_path / "words")


def test_other_files_are_no_keys_and_are_not_shown(tmp_path: Path, team: Signer) -> None:
    elliptic = generate_private_key(SECP256R1())
    secret = elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = elliptic.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    two = team.public_file.read_bytes() * 2
    private = team.private_file.read_bytes()
    broken = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    der = signatures.ED25519 + bytes(33)
    long = b"-----BEGIN PUBLIC KEY-----\n%s\n-----END PUBLIC KEY-----\n" % base64.b64encode(der)
    file = tmp_path / "key.pem"
    for content, said in (
        (private, "holds a private key"),
        (secret, "holds a private key"),
        (public, "Ed25519"),
        (two, "not one public key"),
        (b"", "public key"),
        (broken, "public key"),
        (long, "public key"),
    ):
        file.write_bytes(content)
        for read in (lambda: read_public([file]), lambda: signatures.read_keys(tmp_path)):
            with pytest.raises((ToolError, checksums.Refused), match=said) as refused:
                read()
            told = str(refused.value)
            assert "\n" not in told and not any(part.decode() in told for part in content.splitlines() if part)
    for content, said in (
        (team.public_file.read_bytes(), "holds a public key"),
        (secret, "another kind than Ed25519"),
        (b"", "no private key in PEM"),
    ):
        file.write_bytes(content)
        with pytest.raises(ToolError, match=said):
            read_private(file, None)


def test_a_folder_of_keys(tmp_path: Path, team: Signer, other: Signer) -> None:
    assert signatures.read_keys(tmp_path / "none") is None
    for read in (lambda: read_public([tmp_path]), lambda: signatures.read_keys(tmp_path)):
        with pytest.raises((ToolError, checksums.Refused), match="holds no public key"):
            read()
    for signer in (team, other):
        shutil.copy(signer.public_file, tmp_path)
    (tmp_path / "notes.txt").write_text("-----BEGIN PRIVATE KEY-----")
    assert read_public([tmp_path]).keys() == signatures.read_keys(tmp_path).keys() == {team.id, other.id}


@pytest.mark.parametrize("text", ["", "365", "0d", "-1d", "1y", "1.5d", "d", "100000d"])
def test_lifetimes_that_are_none(text: str) -> None:
    with pytest.raises(ToolError, match="days or hours"):
        lifetime_of(text)


# The commands.


def test_from_a_key_to_a_checked_archive(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def marina(*arguments: object, code: int = 0) -> str:
        assert main(["archive", *map(str, arguments)]) == code
        return capsys.readouterr().out

    def state(*arguments: object) -> dict[str, str]:
        code = main(["archive", "inspect", str(archive), "--json", *map(str, arguments)])
        found = json.loads(capsys.readouterr().out)["signature"]
        assert code == (found["state"] == "refused")
        return found

    for name in ("team", "other"):
        assert marina("keygen", tmp_path / name).splitlines()[-1].startswith("key ")
    public, wrong = (tmp_path / f"{name}.pub.pem" for name in ("team", "other"))
    assert state()["state"] == "none" and "signature   none" in marina("inspect", archive)
    assert state("--key", public)["state"] == "refused"
    before = archive.read_bytes()
    marina("sign", archive, "--key", tmp_path / "team.key.pem", "--expires", "12h")
    assert archive.read_bytes() == before
    assert state()["state"] == "unchecked" and "not checked" in marina("inspect", archive)
    assert state("--key", public)["state"] == state("--key", wrong, "--key", public)["state"] == "valid"
    refused = state("--key", wrong)
    assert refused["state"] == "refused" and "not trusted" in refused["reason"]
    monkeypatch.setenv(VARIABLE, str(public))
    assert state()["state"] == "valid" and state("--key", wrong)["state"] == "refused"
    assert "REFUSED: tiny.mar is signed by key" in marina("inspect", archive, "--key", wrong, code=1)


def test_nothing_of_an_unsigned_archive_is_run(archive: Path, team: Signer, capsys: pytest.CaptureFixture[str]) -> None:
    """By verify, whose golden answers are given by the archive's own code, and by serve."""
    for arguments in (
        ["archive", "verify", str(archive), "--key", str(team.public_file)],
        ["serve", "--store", str(archive.parent), "--port", "0", "--require-signature", str(team.public_file)],
    ):
        assert main(arguments) == 1
        told = capsys.readouterr()
        assert told.err.startswith("marina: tiny.mar is not signed: ") and not told.out


# The store.


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv(VARIABLE, raising=False)
    return Store(str(tmp_path / "store"))


def test_a_signature_goes_along(store: Store, archive: Path, team: Signer, tmp_path: Path) -> None:
    team.sign(archive, now=datetime.now(UTC))
    manifest = store.push(archive)
    (tmp_path / "pulled").mkdir()
    for output, name in ((tmp_path / "pulled", "tiny.mar"), (tmp_path / "pulled" / "other.mar", "other.mar")):
        pulled = store.pull(manifest, output)
        assert pulled == tmp_path / "pulled" / name and pulled.read_bytes() == archive.read_bytes()
        verify_signature(pulled, team.public, datetime.now(UTC))
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(BadSignature, match="is not the signature of"):
        store.push(archive)


@pytest.mark.parametrize("path", ["evil", "sub/evil", "tiny.mar/evil"])
def test_no_other_file_goes_along(store: Store, archive: Path, team: Signer, path: str) -> None:
    team.sign(archive)
    manifest = store.push(archive)
    record = Path(store.url, manifest.key)
    record.write_text(record.read_text().replace(archive.name + SIGNATURE, path))
    with pytest.raises(ToolError, match="is damaged"):
        store.find(manifest.id, "archives")


def test_a_store_that_trusts_keys_makes_nothing_else_production(
    store: Store, archive: Path, team: Signer, other: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsigned = store.push(archive)
    other.sign(archive, now=datetime.now(UTC))
    wrong = store.push(archive)
    team.sign(archive, now=datetime.now(UTC) - 2 * DAY)
    expired = store.push(archive)
    team.sign(archive, now=datetime.now(UTC))
    right = store.push(archive)
    promote(store, unsigned, "production", None, "nothing is wanted yet")
    assert trust(store, [team.public_file]) == [team.id]
    trust(store, [team.public_file])
    servers = tmp_path / "servers"
    servers.mkdir()
    for manifest, said in ((unsigned, "is not signed"), (wrong, "not trusted"), (expired, "has expired")):
        with pytest.raises(ToolError, match=f"wants a signature that counts: tiny.mar.*{said}|{said}") as refused:
            promote(store, manifest, "production", None, "whatever")
        assert str(tmp_path / "store") in str(refused.value)
        with pytest.raises(ToolError, match=said):
            deploy(store, manifest, NOWHERE, servers, print)
        assert [path.name for path in servers.iterdir() if path.suffix != ".lock"] == []
        # Only what serves must be signed.
        tag(store, manifest, "latest", None)
        promote(store, manifest, "staging", None, "whatever")
    promote(store, right, "production", None, "signed")
    with pytest.raises(ToolError, match="cannot be reached"):
        deploy(store, right, NOWHERE, servers, print)
    assert [path.name for path in servers.iterdir() if path.suffix != ".lock"] == []
    # What this machine trusts counts beside what the store does.
    monkeypatch.setenv(VARIABLE, str(other.public_file))
    with pytest.raises(ToolError, match=f"{VARIABLE} wants a signature that counts"):
        deploy(store, right, NOWHERE, servers, print)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ToolError, match="is not signed"):
        roll_back(store, "archives", right.name, "production", "")
    assert store.find(f"{right.name}@production", "archives").id == right.id
    distrust(store, team.id)
    assert roll_back(store, "archives", right.name, "production", "").id == unsigned.id
    promote(store, unsigned, "production", None, "whatever")


def test_keys_of_a_store_by_the_command(store: Store, team: Signer, capsys: pytest.CaptureFixture[str]) -> None:
    def marina(*arguments: object) -> str:
        parser = argparse.ArgumentParser()
        store_command.add_arguments(parser)
        assert (
            store_command.run(parser.parse_args([str(arguments[0]), "--store", store.url, *map(str, arguments[1:])]))
            == 0
        )
        return capsys.readouterr().out

    marina("check")
    assert marina("trust") == "no key: nothing has to be signed\n"
    assert marina("trust", team.public_file).startswith(f"{team.id}  ")
    with pytest.raises(ToolError, match="trusts no key"):
        marina("distrust", "../../etc")
    with pytest.raises(ToolError, match="holds a private key"):
        marina("trust", team.private_file)
    assert marina("distrust", team.id) == f"key {team.id} is not trusted any more; 0 left\n"
    record = Path(store.url, "keys", f"{team.id}.json")
    for content in ("no JSON", "{}"):
        record.write_text(content)
        with pytest.raises(MarinaError, match="is damaged"):
            marina("trust")


# The container.


def serve(archive: Path, keys: Path) -> tuple[int, list[str]]:
    """Exit code and lines of process 1."""
    runtime = archive.parent.parent / "run"
    arguments = [DOCKER, keys, runtime, bindable_port("127.0.0.1", 0)]
    environment = os.environ | {"MODEL_STORE": str(archive.parent), "MARINA_ALLOW_CPU": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stderr.splitlines()


@pytest.fixture
def mounted(tmp_path: Path, team: Signer) -> Path:
    folder = tmp_path / "mounted"
    folder.mkdir()
    shutil.copy(team.public_file, folder)
    return folder


STARTED = "serve: TorchServe ended by itself, with exit code 0"


def test_without_keys_the_container_asks_for_no_signature(archive: Path, tmp_path: Path) -> None:
    _, lines = serve(archive, tmp_path / "none")
    assert lines[-1] == STARTED and not any("signed" in line for line in lines)


def test_with_keys_the_container_starts_torchserve_on_signed_archives(
    archive: Path, mounted: Path, team: Signer
) -> None:
    team.sign(archive, now=datetime.now(UTC))
    _, lines = serve(archive, mounted)
    assert lines[0].startswith(f"serve: tiny.mar: signed by key {team.id} until 20")
    assert "entries are those that were built" in lines[1]
    assert lines[-1] == STARTED


def unsigned(archive: Path, keys: Path) -> None:
    """As it is."""


def one_of_two(archive: Path, keys: Path) -> None:
    write_archive(archive.with_name("another.mar"), "another")


def unpacked(archive: Path, keys: Path) -> None:
    """TorchServe would serve it."""
    (archive.parent / "unpacked" / "MAR-INF").mkdir(parents=True)


def older_form(archive: Path, keys: Path) -> None:
    (archive.parent / "tiny.model").touch()


def no_keys(archive: Path, keys: Path) -> None:
    for path in keys.iterdir():
        path.unlink()


def no_archive(archive: Path, keys: Path) -> None:
    archive.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unsigned, "tiny.mar is not signed"),
        (one_of_two, "another.mar is not signed"),
        (unpacked, "unpacked would be served, and nothing says who made it"),
        (older_form, "tiny.model would be served"),
        (no_keys, "holds no public key"),
        (no_archive, "no .mar archive in"),
    ],
)
def test_with_keys_the_container_ends_with_one_line(
    archive: Path, mounted: Path, team: Signer, change: Callable[[Path, Path], None], said: str
) -> None:
    if change is not unsigned:
        team.sign(archive, now=datetime.now(UTC))
    change(archive, mounted)
    code, lines = serve(archive, mounted)
    assert code == 1 and len(lines) == 1 and said in lines[0]
