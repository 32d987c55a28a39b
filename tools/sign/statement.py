"""What a signature says: an in-toto Statement v1, https://github.com/in-toto/attestation, about one archive."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError

from tools.archive.companions import SIGNATURE, beside
from tools.errors import ToolError
from tools.sign.envelope import Envelope, decode
from tools.strict import Strict

StatementType = Literal["https://in-toto.io/Statement/v1"]
PredicateType = Literal["urn:x-marina:archive-signature:v1"]
STATEMENT_TYPE: StatementType
PREDICATE_TYPE: PredicateType
(STATEMENT_TYPE,) = get_args(StatementType)
(PREDICATE_TYPE,) = get_args(PredicateType)
SHA256 = r"^[0-9a-f]{64}$"
TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
# Some 1,200 bytes are usual.
MAX_BYTES = 1 << 16


class BadSignature(ToolError):
    """An archive does not carry the signature that it must; says why in one line."""


class Digest(Strict):
    sha256: str = Field(pattern=SHA256)


class Subject(Strict):
    """name: of the file when it was signed; it may have another now."""

    name: str
    digest: Digest


class Predicate(Strict):
    """model, version: of the archive's manifest. provenance: of its PROVENANCE.json, None where it has none. signed,
    expires: from when to when the signature counts, UTC."""

    model: str
    version: str
    provenance: Digest | None
    signed: str = Field(alias="signedAt", pattern=TIME)
    expires: str = Field(alias="expiresAt", pattern=TIME)


class Statement(Strict):
    type: StatementType = Field(alias="_type")
    subject: tuple[Subject]
    predicate_type: PredicateType = Field(alias="predicateType")
    predicate: Predicate

    @property
    def sha256(self) -> str:
        """Of the archive."""
        return self.subject[0].digest.sha256

    def __str__(self) -> str:
        return f"{self.predicate.model} {self.predicate.version}"


def text_of(time: datetime) -> str:
    return f"{time.astimezone(UTC):{TIME_FORMAT}}"


def time_of(text: str) -> datetime:
    """Raises ValueError for a day that no calendar has."""
    return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)


def read_signature(archive: Path) -> tuple[Envelope, Statement] | None:
    """What lies beside an archive, checked for its form alone; None when nothing does. Raises BadSignature."""
    path = beside(archive, SIGNATURE)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
        envelope = decode(content)
        statement = Statement.model_validate_json(envelope.payload)
        time_of(statement.predicate.signed), time_of(statement.predicate.expires)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadSignature(f"signature {path.name} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise BadSignature(
            f"{path.name} signs something else than an archive of Marina; sign the archive again"
        ) from error
    except ValueError as error:
        raise BadSignature(f"signature {path.name} is damaged ({error}); sign the archive again") from error
    return envelope, statement


def check_subject(archive: Path, sha256: str) -> None:
    """Raises BadSignature when what lies beside an archive of that checksum is the signature of another one."""
    found = read_signature(archive)
    if found and found[1].sha256 != sha256:
        raise BadSignature(
            f"{beside(archive, SIGNATURE).name} is not the signature of {archive.name} as it is (it is of {found[1]});"
            " sign the archive again, or remove that file"
        )
