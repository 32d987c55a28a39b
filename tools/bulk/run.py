"""One run: list what is new, answer the shards whose parts are missing, put the outputs together."""

import fcntl
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from handlers.labels import load_labels
from handlers.options import Options, default_options, parse_options
from handlers.settings import Settings, parse_settings
from tools.archive.reader import open_archive
from tools.archive.verify import check_entries
from tools.bulk.cluster import go_through, import_ray, session, share
from tools.bulk.job import Done, Job
from tools.bulk.outputs import write_outputs
from tools.bulk.plan import COCO, FAILED, PARTS, SUMMARY, Manifest, Shard, add_pictures, list_pictures, read_shards
from tools.bulk.source import S3, open_source, open_target
from tools.errors import ToolError
from tools.progress import Progress
from tools.store.folder import FolderObjects
from tools.store.objects import Objects

if TYPE_CHECKING:
    from tools.bulk.command import BulkSettings

OPTIONS = "score_threshold", "iou_threshold", "max_detections", "classes", "class_agnostic"


@dataclass(frozen=True)
class Model:
    """What is known of an archive without running it."""

    content: bytes
    settings: Settings
    labels: list[str]
    batch: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def options(self, given: Mapping[str, Any]) -> Options:
        """Raises InvalidOption, naming the option, the value and what is allowed."""
        defaults = parse_options({"format": "detections"}, default_options(self.settings), self.labels)
        return parse_options(given, defaults, self.labels)

    def manifest(self, source: str, options: Options) -> Manifest:
        shown = {name: getattr(options, name) for name in OPTIONS}
        shown["classes"] = sorted(options.classes) if options.classes is not None else None
        return Manifest(
            source=source,
            model=self.settings.name,
            version=self.settings.version,
            archive=self.sha256,
            options=shown,
        )


def read_model(path: Path) -> Model:
    """Raises BadArchive or BadSettings with one line for what is no archive that Marina built, or is damaged."""
    with open_archive(path) as archive, tempfile.TemporaryDirectory(prefix="marina-") as folder:
        if archive.settings is None:
            raise ToolError(f"{path}: Marina did not build it, so only TorchServe can run it")
        check_entries(path)
        settings = parse_settings(archive.settings)
        labels = Path(folder) / "labels.json"
        labels.write_bytes(archive.read(settings.labels))
        return Model(path.read_bytes(), settings, load_labels(labels), int(archive.config.get("batchSize", 1)))


class Speed:
    """Of what this run has done itself. working_s: from the first shard's begin to the last one's end."""

    def __init__(self) -> None:
        self.workers = self.pictures = 0
        self._first, self._last = math.inf, -math.inf

    def add(self, done: Done) -> None:
        self.pictures += done.pictures
        self._first, self._last = min(self._first, done.began), max(self._last, done.ended)

    @property
    def working_s(self) -> float:
        return max(0.0, self._last - self._first)

    def figures(self, total_s: float) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "pictures": self.pictures,
            "working_s": round(self.working_s, 1),
            "total_s": round(total_s, 1),
        }


def detect_bulk(source_url: str, target_url: str, settings: "BulkSettings") -> int:
    """The exit code of the command. Raises MarinaError with one line when the run cannot begin or go on."""
    began = time.time()
    ray = import_ray(settings.address)
    model = read_model(settings.archive)
    given = {name: getattr(settings, name) for name in OPTIONS}
    options = model.options({name: value for name, value in given.items() if value is not None})
    source, target = open_source(source_url), open_target(target_url)
    # Workers have other working folders.
    target_url = target_url if target_url.startswith(S3) else str(Path(target_url).resolve())
    with _alone(target_url):
        if isinstance(target, FolderObjects):
            target.clean(began)
        pictures, left_out = list_pictures(source)
        if left_out:
            print(f"marina: {left_out:,} files of SRC are no pictures by their names; left out", file=sys.stderr)
        manifest = model.manifest(source.url, options).open(target, target_url)
        add_pictures(target, pictures)
        speed = Speed()
        shards = read_shards(target)
        while missing := _missing(target, shards):
            _work(
                ray, missing, Job(manifest, target_url, options, settings.batch or model.batch), model, settings, speed
            )
            shards = read_shards(target)  # another run in the same bucket may have added some
        about = {"left_out": left_out, "last_run": speed.figures(time.time() - began)}
        summary = write_outputs(target, manifest, model.labels, shards, about)
    _tell(summary, target_url, speed, time.time() - began)
    return 0 if summary["answered"] else 1


def _work(
    ray: ModuleType, missing: Sequence[Shard], job: Job, model: Model, settings: "BulkSettings", speed: Speed
) -> None:
    total = sum(shard.pictures for shard in missing)
    cores = max(len(os.sched_getaffinity(0)), settings.workers or 1)
    print(f"detect: {total:,} pictures; Ray starts", file=sys.stderr)
    with session(ray, settings.address, cores, len(model.content)), ExitStack() as stack:
        crew = share(ray.cluster_resources(), settings.workers, model.settings.device)
        speed.workers = min(crew.workers, len(missing))
        progress = None
        for done in go_through(ray, missing, job, model.content, crew):
            # Of the time that Ray takes to start, nothing follows for the rest.
            progress = progress or stack.enter_context(Progress("detect", total, "pictures", done.began))
            speed.add(done)
            progress.advance(done.pictures)


def _missing(target: Objects, shards: Sequence[Shard]) -> list[Shard]:
    there = {entry.name for entry in target.names(PARTS)}
    return [shard for shard in shards if shard.part not in there]


@contextmanager
def _alone(target: str) -> Iterator[None]:
    """Keeps a second run out of a folder. Two in a bucket, or on machines that share no locks, do all twice, the same.

    Raises ToolError when another run is at work.
    """
    if target.startswith(S3):
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ToolError(f"another run is at work in DST {target}; wait for it, or give another DST") from error
        yield
    finally:
        os.close(handle)


def _tell(summary: dict[str, Any], target: str, speed: Speed, total_s: float) -> None:
    failed = sum(summary["failed"].values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary["failed"].items())
    print(
        f"{summary['pictures']:,} pictures, {summary['answered']:,} answered, {summary['detections']:,} detections"
        + (f"; {failed:,} failed, see {FAILED} ({kinds})" if failed else "")
    )
    if count := speed.pictures:
        work_s = speed.working_s
        print(
            f"{count:,} of them now, by {speed.workers} workers: {count / work_s:.1f} a second over {work_s:.1f} s of"
            f" work, {count / total_s:.1f} a second over {total_s:.1f} s in all, with start and output"
        )
    print(f"{target}: {PARTS}, {COCO}, {FAILED}, {SUMMARY}")
