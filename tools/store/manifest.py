"""What stands in the store about a push, and how it is named."""

import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, field_validator, model_validator

from tools.errors import ToolError
from tools.strict import Strict, parse

FORMAT = 1
Kind = Literal["archives", "weights", "runs", "datasets"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# These are good or bad, and an evaluation says which.
GATED: tuple[Kind, ...] = ("archives", "weights", "runs")

# It becomes a part of keys, file names and URLs.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ID = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{16}")
SHA256 = r"^[0-9a-f]{64}$"


class StoredFile(Strict):
    """path: relative, with slashes; where it lies below the folder that was pushed, or its name."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if "\0" in path or "\\" in path or str(PurePosixPath(path)) != path or path.startswith("/"):
            raise ValueError("no relative path")
        if path == "." or ".." in PurePosixPath(path).parts:
            raise ValueError("a path that leads out of its folder")
        return path

    @property
    def blob(self) -> str:
        """Where the content lies. Archives keep their suffix, so that a server that reads S3 can be pointed at one."""
        return f"blobs/{self.sha256}{'.mar' if self.path.endswith('.mar') else ''}"


class GateResult(Strict):
    """value: None where the figure could not be said, which passes no gate."""

    name: str
    least: float
    value: float | None
    passed: bool


class Evidence(Strict):
    """How good it is. sha256: of the evaluation.json. model, split, pictures: what was evaluated on what."""

    sha256: str = Field(pattern=SHA256)
    model: str
    split: str
    pictures: int
    figures: dict[str, float | None]
    gates: list[GateResult]

    def failed(self) -> list[GateResult]:
        return [gate for gate in self.gates if not gate.passed]

    def line(self) -> str:
        """The gates and what was reached, for people."""
        shown = (
            f"{gate.name} {'unknown' if gate.value is None else f'{gate.value:g}'} (required: {gate.least:g})"
            for gate in self.gates
        )
        return ", ".join(shown) or "no gate"


class Manifest(Strict):
    """folder: whether a folder was pushed rather than one file, which an archive's signature and bill of materials may
    follow, under its name with another ending. provenance: sha256 of an archive's provenance, None
    where it has none. marina: the version that built the archive. who: user@host of the push."""

    format: int
    id: str = Field(pattern=rf"^{ID.pattern}$")
    kind: Kind
    name: str = Field(pattern=rf"^{NAME.pattern}$")
    version: str | None
    folder: bool
    files: list[StoredFile]
    provenance: str | None
    marina: str | None
    evidence: Evidence | None
    created: str
    who: str

    @field_validator("files")
    @classmethod
    def _no_file_twice(cls, files: list[StoredFile]) -> list[StoredFile]:
        paths = {file.path for file in files}
        parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        if not files or len(paths) != len(files) or paths & parents:
            raise ValueError("no files, or one path twice")
        return files

    @model_validator(mode="after")
    def _one_file_and_what_lies_beside_it(self) -> "Manifest":
        main = self.files[0].path
        if not self.folder and any("/" in file.path or not file.path.startswith(main) for file in self.files):
            raise ValueError("files that do not belong together")
        return self

    @property
    def key(self) -> str:
        return manifest_key(self.kind, self.name, self.id)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.id}"


def manifest_key(kind: str, name: str, id: str) -> str:
    return f"manifests/{kind}/{name}/{id}.json"


def new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(8)}"


def time_of(id: str) -> datetime:
    """When an id was made."""
    return datetime.strptime(id.partition("-")[0], "%Y%m%dT%H%M%S%fZ").replace(tzinfo=UTC)


def check_name(name: str, hint: str) -> str:
    """Raises ToolError for what could be anything but a plain part of a key. hint: what to do."""
    if not NAME.fullmatch(name) or ID.fullmatch(name):
        raise ToolError(f"{name!r} is no name: letters, digits and ._- only, a letter or digit first; {hint}")
    return name


def check_kind(text: str) -> Kind:
    """Raises ToolError for any other."""
    for kind in KINDS:
        if text == kind:
            return kind
    raise ToolError(f"{text!r} is no kind; there are {', '.join(KINDS)}")


Record = TypeVar("Record", bound=Strict)


def read_record(kind: type[Record], content: Any, where: str) -> Record:
    """Raises ToolError for one that is damaged or of a newer Marina. where: names it."""
    if not isinstance(content, dict):
        raise ToolError(f"{where} is damaged (no JSON object); somebody changed the store by hand")
    found = content.get("format", 0)
    if isinstance(found, int) and found > FORMAT:
        raise ToolError(f"{where} is of a newer Marina (format {found}, known up to {FORMAT}); upgrade marina")
    try:
        return parse(kind, content)
    except ValueError as error:
        raise ToolError(f"{where} is damaged ({error}); somebody changed the store by hand") from error


def unique_blobs(files: Sequence[StoredFile]) -> dict[str, StoredFile]:
    """One file for each blob."""
    return {file.blob: file for file in files}
