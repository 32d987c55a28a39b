"""What there is to do: the manifest of a run and the listing of its pictures, cut into shards.

Both are written once, under names that nobody else can take: of two runs at once, the second finds what the first has
written and goes by that.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tools.bulk.source import Source, is_picture
from tools.errors import ToolError
from tools.store.objects import PROBES, Entry, Missing, Objects
from tools.strict import Strict, parse

MANIFEST = "manifest.json"
LISTING = "listing/"
PARTS = "parts/"
COCO, FAILED, SUMMARY = "coco.json", "failed.jsonl", "summary.json"
# A shard is what a kill loses and what a worker gets at a time: about a thousandth of all, between these.
LEAST, MOST = 16, 1000


class Manifest(Strict):
    """What all parts of one DST have in common. archive: SHA-256. options: as they count for every picture."""

    source: str
    model: str
    version: str
    archive: str
    options: dict[str, Any]

    def open(self, target: Objects, url: str) -> "Manifest":
        """This one, written, or the one of an earlier run. url: of the target. Raises ToolError where it differs."""
        there = read_manifest(target, url)
        if there is None:
            others = (entry.name for entry in target.names("") if not entry.name.startswith((MANIFEST, PROBES)))
            if other := next(others, None):
                raise ToolError(f"DST {url} holds something else than a run of detect-bulk, {other}; give an empty one")
            target.create(MANIFEST, json.dumps(self.model_dump(), indent=1).encode())
            there = read_manifest(target, url)
        assert there is not None
        old, new = (each.model_dump() | each.options for each in (there, self))
        for name in ("source", "archive", *self.options):
            was, now = old.get(name), new[name]
            if was != now:
                raise ToolError(f"DST {url} was begun with another {name} ({was}, now {now}); give another DST")
        return there

    def digest(self, lines: bytes) -> str:
        """What the answers to these lines of a listing follow from."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode() + b"\n" + lines).hexdigest()


@dataclass(frozen=True)
class Shard:
    """Lines `start` to `end`, in bytes, of a listing. first: how many pictures stand before it in all listings."""

    number: int
    first: int
    pictures: int
    listing: str
    start: int
    end: int

    @property
    def part(self) -> str:
        return f"{PARTS}{self.number:06d}.parquet"


def read_manifest(target: Objects, url: str) -> Manifest | None:
    """Raises ToolError for a file of that name that is none."""
    try:
        return parse(Manifest, json.loads(target.read(MANIFEST)))
    except Missing:
        return None
    except ValueError as error:
        raise ToolError(f"DST {url}: {MANIFEST} is of another program ({error}); give another DST") from error


def read_shards(target: Objects) -> list[Shard]:
    """Of all listings, in order."""
    shards: list[Shard] = []
    first = 0
    for entry in target.names(LISTING):
        lines = _lines(target, entry)
        head = next(lines)
        size = json.loads(head)["shard"]
        start = end = len(head)
        count = 0
        for line in lines:
            end += len(line)
            count += 1
            if count == size:
                shards.append(Shard(len(shards), first, count, entry.name, start, end))
                first, start, count = first + count, end, 0
        if count:
            shards.append(Shard(len(shards), first, count, entry.name, start, end))
            first += count
    return shards


def list_pictures(source: Source) -> tuple[list[Entry], int]:
    """What is there, by name, and how many files are no pictures by theirs. Raises ToolError without any picture."""
    files = list(source.files())
    pictures = sorted(entry for entry in files if is_picture(entry.name))
    if not pictures:
        raise ToolError(
            f"SRC {source.url} holds no pictures, of {len(files)} files; known by .jpg, .png, .webp, .bmp, .gif, .tif"
            " and their like"
        )
    return pictures, len(files) - len(pictures)


def add_pictures(target: Objects, pictures: list[Entry]) -> None:
    """Write those that no listing has into one more."""
    while True:
        listings = target.names(LISTING)
        known = {name for entry in listings for name, _ in entries(islice(_lines(target, entry), 1, None))}
        new = [entry for entry in pictures if entry.name not in known]
        # Refused when another run has just written one of this number: then there is more that is known.
        if not new or target.create(f"{LISTING}{len(listings):05d}.jsonl", _listing(new)):
            return


def read_lines(target: Objects, shard: Shard) -> bytes:
    """Those of a shard; `entries` reads them."""
    data = bytearray()
    for chunk in target.chunks(shard.listing, shard.start, shard.end):
        data += chunk
        if len(data) >= shard.end - shard.start:
            break
    return bytes(data[: shard.end - shard.start])


def entries(lines: Iterable[bytes]) -> list[Entry]:
    return [Entry(*json.loads(line)) for line in lines]


def _listing(pictures: list[Entry]) -> bytes:
    size = min(MOST, max(LEAST, len(pictures) // 1000))
    rows: Iterable[Any] = ({"shard": size}, *pictures)
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _lines(target: Objects, entry: Entry) -> Iterator[bytes]:
    """With their ends."""
    rest = b""
    for chunk in target.chunks(entry.name, 0, entry.size):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
