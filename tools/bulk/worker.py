"""What a worker does: it loads the archive once, then answers shard after shard.

Knows nothing of Ray. What goes wrong with a picture goes into the part; what goes wrong with the source, the target or
the archive ends the run, and is raised.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from handlers.image import ACCEPTED, sniff
from handlers.lean_import import import_torchvision
from handlers.response import Context, json_answer
from tools.archive.reader import open_archive
from tools.bulk.job import Done, Job, Witness
from tools.bulk.parts import Answered, Failed, Part, encode
from tools.bulk.plan import Shard, entries, read_lines
from tools.bulk.source import PictureError, open_source, open_target
from tools.store.objects import Entry

if TYPE_CHECKING:
    from handlers.pipeline import Pipeline

# Pictures that are read while others are answered; a store answers many requests at once.
READERS = 8
# No pixels are kept for drawing.
PLAIN = {"Marina-Format": "detections"}
DIED = "WorkerDied", "the worker died twice on it"


class Row(NamedTuple):
    """id: of the picture, from 1 in all listings."""

    id: int
    entry: Entry


class Read(NamedTuple):
    row: Row
    body: Future[bytes]


class Worker:
    """Raises BadArchive, BadSettings or ToolError with one line."""

    def __init__(self, job: Job, archive: bytes, threads: int, ledger: Witness):
        self.job = job
        self.ledger = ledger
        self.source = open_source(job.manifest.source)
        self.target = open_target(job.target)
        self.pipeline = load(archive, threads, job.batch)
        self._readers = ThreadPoolExecutor(READERS)

    def do(self, shard: Shard) -> Done:
        """Answer the pictures of a shard and write its part."""
        began = time.time()
        again, deadly = self.ledger.begin(shard.number)
        lines = read_lines(self.target, shard)
        rows = [Row(shard.first + place + 1, entry) for place, entry in enumerate(entries(lines.splitlines()))]
        found: dict[int, Answered | Failed] = {
            row.id: Failed(_text(row.entry.name), *DIED) for row in rows if row.id in deadly
        }
        for batch in self._read([row for row in rows if row.id not in deadly], 1 if again else self.job.batch):
            bodies = [(row, _outcome(read)) for row, read in batch]
            if again:
                self.ledger.at(shard.number, batch[0].row.id)
            found |= self._answer(bodies)
        self.ledger.passed(shard.number)
        outcomes = [found[row.id] for row in rows]
        answered = [one for one in outcomes if isinstance(one, Answered)]
        failed = [one for one in outcomes if isinstance(one, Failed)]
        # Where another run was faster, it has written the same.
        self.target.create(shard.part, encode(Part(answered, failed), self.job.manifest, lines))
        return Done(shard.pictures, len(failed), began, time.time())

    def _read(self, rows: list[Row], size: int) -> Iterator[list[Read]]:
        """In batches; the next ones are read meanwhile."""
        ahead: deque[list[Read]] = deque()
        for start in range(0, len(rows), size):
            ahead.append([Read(row, self._readers.submit(self._body, row.entry)) for row in rows[start : start + size]])
            if len(ahead) > max(1, READERS // size):
                yield ahead.popleft()
        yield from ahead

    def _body(self, entry: Entry) -> bytes:
        """Raises PictureError for what is no picture, before it costs anything."""
        if _text(entry.name) != entry.name:
            raise PictureError("BadName", "its name is not UTF-8; rename it")
        most = self.pipeline.settings.limits.max_bytes
        if entry.size > most:
            raise PictureError("ImageTooLarge", f"the file has {entry.size:,} bytes, more than the {most:,} allowed")
        body = self.source.read(entry.name)
        if not body:
            raise PictureError("EmptyBody", "the file is empty")
        # Else it could pass for the JSON of a request.
        if sniff(body) is None:
            raise PictureError("UnsupportedMedia", f"the file begins with {body[:8]!r}, which is no {ACCEPTED} picture")
        return body

    def _answer(self, batch: list[tuple[Row, bytes | PictureError]]) -> dict[int, Answered | Failed]:
        """By id."""
        found: dict[int, Answered | Failed] = {}
        jobs, settings = {}, self.pipeline.settings
        for row, body in batch:
            if isinstance(body, PictureError):
                found[row.id] = Failed(_text(row.entry.name), body.kind, str(body))
                continue
            jobs[row] = self.pipeline.read({"body": body}, PLAIN)
            for item in jobs[row].items:
                item.options = self.job.options
        self.pipeline.infer(list(jobs.values()))
        for row, job in jobs.items():
            (item,) = job.items
            if item.error or item.detections is None:
                found[row.id] = Failed(row.entry.name, type(item.error).__name__, str(item.error))
                continue
            context = Context(settings.name, settings.version, self.pipeline.labels, item.height, item.width, {})
            detections = json_answer(item.detections, "detections", context)["detections"]
            found[row.id] = Answered(row.id, row.entry.name, item.width, item.height, detections)
        return found


def load(archive: bytes, threads: int, batch: int) -> "Pipeline":
    """The model of a .mar, its golden pictures answered. Raises BadArchive or BadSettings with one line."""
    with tempfile.TemporaryDirectory(prefix="marina-") as made:
        folder = Path(made)
        (folder / "model.mar").write_bytes(archive)
        with open_archive(folder / "model.mar") as opened:
            opened.extract(folder)
            config = opened.config
        import_torchvision()
        from handlers.pipeline import load_checked

        # It divides the cores among so many.
        workers = max(1, len(os.sched_getaffinity(0)) // threads)
        return load_checked(folder, config | {"maxWorkers": workers, "batchSize": batch})


def _outcome(read: Future[bytes]) -> bytes | PictureError:
    try:
        return read.result()
    except PictureError as error:
        return error


def _text(name: str) -> str:
    """A name that is not UTF-8, as bytes of a file's may be, so that it can be told."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
