"""A part: the answers to one shard, as Parquet.

Its rows are the pictures that were answered. Those that were not stand in the file's metadata, so that both are there
at once, with a digest of all that the part follows from. The same shard gives the same bytes.
"""

import io
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]  # it has none
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # it has none

from tools.bulk.plan import Manifest, Shard
from tools.errors import ToolError
from tools.store.objects import Objects

DETECTION = pa.struct(
    [("label", pa.string()), ("index", pa.int32()), ("score", pa.float64()), ("box", pa.list_(pa.float64()))]
)
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("picture", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("detections", pa.list_(DETECTION)),
        ("model", pa.string()),
        ("version", pa.string()),
        ("archive_sha256", pa.string()),
    ]
)
DIGEST, FAILURES = b"marina.digest", b"marina.failures"


@dataclass(frozen=True)
class Answered:
    """id: its place in all listings, from 1. picture: its name in the source. width, height: of the upright picture.
    detections: as the served format of that name has them."""

    id: int
    picture: str
    width: int
    height: int
    detections: list[dict[str, Any]]


@dataclass(frozen=True)
class Failed:
    """type: the error's name. message: what was wrong with this picture."""

    picture: str
    type: str
    message: str


class Part(NamedTuple):
    answered: list[Answered]
    failed: list[Failed]


def encode(part: Part, manifest: Manifest, lines: bytes) -> bytes:
    """lines: the shard's, of the listing."""
    constant = {"model": manifest.model, "version": manifest.version, "archive_sha256": manifest.archive}
    rows = [asdict(one) | constant for one in part.answered]
    failures = json.dumps([asdict(one) for one in part.failed])
    schema = SCHEMA.with_metadata({DIGEST: manifest.digest(lines), FAILURES: failures})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    return buffer.getvalue()


def read_part(target: Objects, shard: Shard, manifest: Manifest, lines: bytes) -> Part:
    """Raises ToolError for a part that is damaged, or that follows from something else."""
    try:
        table = pq.read_table(pa.BufferReader(target.read(shard.part)))
        meta = table.schema.metadata
        fits = meta[DIGEST].decode() == manifest.digest(lines)
        failures = json.loads(meta[FAILURES])
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ToolError(
            f"{shard.part} in DST is damaged ({error}); delete it and run the same command again"
        ) from error
    if not fits:
        raise ToolError(
            f"{shard.part} in DST is of another run, which was begun there at the same moment; delete it and run the"
            " same command again"
        )
    columns = table.select(["id", "picture", "width", "height", "detections"])
    return Part([Answered(**row) for row in columns.to_pylist()], [Failed(**one) for one in failures])
