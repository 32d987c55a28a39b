"""What a shadow has found so far, as it outlives the gateway: a JSON file, always whole."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.shadow.matching import Counts, Tolerance

# Below what a model's own clock tells.
LEAST_MS = 0.001


class Identity(BaseModel):
    """A model as it describes itself. checksum: of all that its archive holds."""

    name: str
    version: str
    checksum: str


class Totals(BaseModel):
    """Of pictures. compared: answered by both. agreed: of those, without any difference. failed: the candidate answered
    with an error or too late. unreachable: it could not be asked. dropped: there was no room, or a model changed
    meanwhile. captured, not_captured: of those with a difference, where a destination is set; the latter for a fault
    of it.

    live_ms, candidate_ms: sums of what the models took, by their own clocks. log_ratio: the sum of the logarithms of
    candidate's to live model's milliseconds.
    """

    compared: NonNegativeInt = 0
    agreed: NonNegativeInt = 0
    failed: NonNegativeInt = 0
    unreachable: NonNegativeInt = 0
    dropped: NonNegativeInt = 0
    captured: NonNegativeInt = 0
    not_captured: NonNegativeInt = 0
    live_ms: float = 0.0
    candidate_ms: float = 0.0
    log_ratio: float = 0.0
    classes: dict[str, Counts] = {}

    def add(self, differences: Mapping[str, Counts], live_ms: float, candidate_ms: float) -> None:
        """One picture that both have answered."""
        self.compared += 1
        self.agreed += all(counts.agree for counts in differences.values())
        for label, counts in differences.items():
            self.classes.setdefault(label, Counts()).add(counts)
        self.live_ms += live_ms
        self.candidate_ms += candidate_ms
        self.log_ratio += math.log(max(candidate_ms, LEAST_MS) / max(live_ms, LEAST_MS))

    @property
    def overall(self) -> Counts:
        found = Counts()
        for counts in self.classes.values():
            found.add(counts)
        return found


class Record(BaseModel):
    """live, candidate: between whom; None before both were seen. since: when counting began."""

    live: Identity | None = None
    candidate: Identity | None = None
    tolerance: Tolerance
    since: datetime = Field(default_factory=lambda: datetime.now(UTC))
    totals: Totals = Field(default_factory=Totals)


def read_record(path: Path, tolerance: Tolerance) -> Record:
    """The one in the file; a new one where there is none, or one by another tolerance. Raises ToolError."""
    try:
        record = Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Record(tolerance=tolerance)
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no report of a shadow"
        raise ToolError(f"{path} cannot be read ({why}); move it away, and counting begins anew") from error
    return record if record.tolerance == tolerance else Record(tolerance=tolerance)


def write_record(path: Path, content: bytes) -> None:
    """Raises OSError."""
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)
