"""A store: push, find, pull."""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tools.errors import ToolError
from tools.progress import Progress
from tools.store.contents import Contents, read_contents
from tools.store.evidence import read_evidence
from tools.store.manifest import (
    FORMAT,
    GATED,
    ID,
    KINDS,
    Evidence,
    Kind,
    Manifest,
    StoredFile,
    check_kind,
    manifest_key,
    new_id,
    read_record,
    unique_blobs,
)
from tools.store.objects import PROBES, Advance, Missing, open_objects
from tools.store.tags import Tag, Tags, check_tag, parse_target, who
from tools.store.transfer import download, is_there, writing

# Transfers at a time, of small files mostly; each holds a part of 8 MiB at most.
THREADS = 8
# In the place of the manifest of a push that `gc` has given up.
ABANDONED = "abandoned"
PUSHES, CONDEMNED, BLOBS, MANIFESTS = "pushes/", "condemned/", "blobs/", "manifests/"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Store:
    """url: `s3://BUCKET[/PREFIX]` or a folder. Raises ToolError when it cannot be reached."""

    def __init__(self, url: str):
        self.url = url
        self.objects = open_objects(url)

    def tags(self, kind: Kind, name: str) -> Tags:
        return Tags(self.objects, kind, name)

    def check(self) -> None:
        """Raises ToolError unless the store can be written to and tags can be moved on it."""
        probe = f"{PROBES}{new_id()}"
        self.objects.create(probe, b"")
        self.objects.delete(probe)
        self.objects.check_exclusive()

    def push(
        self, path: Path, name: str | None = None, evaluation: Path | None = None, require: Sequence[str] = ()
    ) -> Manifest:
        """Store a file or folder under a new id; it can be seen once all of it is there.

        name, evaluation, require: see `read_contents` and `read_evidence`. Raises ToolError or BadArchive.
        """
        if require and evaluation is None:
            raise ToolError("--require goes with --evaluation, whose figures it looks at")
        contents = read_contents(path, name)
        evidence = read_evidence(evaluation, require, contents) if evaluation else None
        manifest = _manifest(contents, evidence)
        text = manifest.model_dump_json(indent=1).encode()
        marker = f"{PUSHES}{manifest.id}.json"
        self.objects.create(marker, text)
        self._check_condemned(manifest)
        self._upload(contents)
        if not self.objects.create(manifest.key, text):
            raise ToolError(f"{path}: `marina store gc` has given up this push, as it took too long; push it again")
        self.objects.delete(marker)
        return manifest

    def find(self, target: str, kind: Kind) -> Manifest:
        """What `ID`, `NAME` (the newest push) or `NAME@TAG` means; `kind` is that of the name, an id has its own.

        Raises ToolError when there is no such thing, or the tag points to nothing.
        """
        name, tag = parse_target(target)
        if tag is not None:
            move = self.tags(kind, name).current(tag)
            if move is None:
                raise ToolError(f"tag {tag} of {kind} {name} was never set; `{_setter(tag, kind, name)}` sets it")
            manifest = self.manifest(kind, name, move.id)
            if manifest is None:
                raise ToolError(f"tag {tag} of {kind} {name} points to {move.id}, which is not in store {self.url}")
            return manifest
        if ID.fullmatch(target):
            keys = [key for key in self._keys(MANIFESTS) if key.endswith(f"/{target}.json")]
        else:
            keys = self._keys(f"{MANIFESTS}{kind}/{name}/")
        for key in reversed(keys):
            manifest = self._read(key)
            if manifest is not None:
                return manifest
        raise ToolError(f"store {self.url} has no {kind} {target!r}; `marina store list` shows what there is")

    def manifest(self, kind: Kind, name: str, id: str) -> Manifest | None:
        """None when there is no such push."""
        try:
            return self._read(manifest_key(kind, name, id))
        except Missing:
            return None

    def manifests(self, kinds: Iterable[Kind] = KINDS, name: str | None = None) -> list[Manifest]:
        """Every push that is done, the oldest first."""
        keys = [
            key for kind in kinds for key in self._keys(f"{MANIFESTS}{kind}/{name}/" if name else f"{MANIFESTS}{kind}/")
        ]
        found = parallel(self._read, keys)
        return sorted((each for each in found if each is not None), key=lambda manifest: manifest.id)

    def tagged(self) -> dict[tuple[str, str, str], list[Tag]]:
        """The tags that point at a push, by its kind, name and id."""
        names = {tuple(key.split("/")[1:4]) for key in self._keys("tags/")}
        found: dict[tuple[str, str, str], list[Tag]] = {}
        for kind, name, tag in sorted(names):
            move = self.tags(check_kind(kind), name).current(check_tag(tag))
            if move is not None:
                found.setdefault((kind, name, move.id), []).append(check_tag(tag))
        return found

    def pushes(self) -> list[Manifest]:
        """Every push that is under way or was cut off."""

        def read(key: str) -> Manifest | None:
            try:
                return self._read(key)
            except Missing:
                return None  # done meanwhile

        return [each for each in parallel(read, self._keys(PUSHES)) if each is not None]

    def condemned(self) -> dict[str, list[str]]:
        """Blobs that a `gc` is about to remove, by the name of its list."""
        lists = {}
        for key in self._keys(CONDEMNED):
            try:
                lists[key] = list(json.loads(self.objects.read(key)))
            except Missing:
                continue  # it is done
        return lists

    def pull(self, manifest: Manifest, output: Path) -> Path:
        """Write what was pushed to `output`: the file itself, or in it where it is a folder; a pushed folder becomes
        `output`. Returns where it is. Raises ToolError, and leaves what was there as it was."""
        if manifest.folder:
            return self._pull_folder(manifest, output)
        main = manifest.files[0].path
        target = output / main if output.is_dir() else output
        # What lies beside an archive first: whoever finds the archive finds all.
        for file in reversed(manifest.files):
            place = target.with_name(target.name + file.path.removeprefix(main))
            if not is_there(file, place):
                with Progress(f"pulling {file.path}", file.size) as progress:
                    download(self.objects, file, place, progress.advance)
        return target

    def _pull_folder(self, manifest: Manifest, output: Path) -> Path:
        if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
            raise ToolError(f"{output} is there already; name a new folder with --output")
        draft = output.with_name(f".{output.name}.{manifest.id}.part")
        with writing(output):
            draft.mkdir(parents=True, exist_ok=True)
            handle = os.open(draft, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with Progress(f"pulling {manifest.name}", manifest.size) as progress:
                    advance = _shared(progress)
                    parallel(lambda file: self._fetch(file, draft, advance), manifest.files)
                draft.rename(output)
            except BlockingIOError:
                raise ToolError(f"another pull writes {output}; wait for it, or name another --output") from None
            finally:
                os.close(handle)
        return output

    def _fetch(self, file: StoredFile, folder: Path, advance: Advance) -> None:
        target = folder / file.path
        if is_there(file, target):
            advance(file.size)
        else:
            download(self.objects, file, target, advance)

    def _upload(self, contents: Contents) -> None:
        total = sum(file.size for file, _ in contents.files)
        local = {file.path: found for file, found in contents.files}
        with Progress(f"pushing {contents.name}", total) as progress:
            advance = _shared(progress)

            def upload(blob: str, file: StoredFile) -> None:
                if self.objects.holds(blob, local[file.path]):
                    advance(file.size)
                else:
                    self.objects.upload(blob, local[file.path], advance)

            blobs = unique_blobs([file for file, _ in contents.files])
            parallel(lambda item: upload(*item), list(blobs.items()))

    def _check_condemned(self, manifest: Manifest) -> None:
        ours = {file.blob for file in manifest.files}
        for key, blobs in self.condemned().items():
            if ours & set(blobs):
                raise ToolError(
                    f"`marina store gc` is removing what a push of the same content has left ({key}); push again when"
                    " it is done, or run it once more where it was cut off"
                )

    def _keys(self, prefix: str) -> list[str]:
        return [entry.name for entry in self.objects.names(prefix)]

    def _read(self, key: str) -> Manifest | None:
        """None for one that was given up. Raises Missing."""
        where = f"store {self.url}: {key}"
        try:
            content: Any = json.loads(self.objects.read(key))
        except ValueError as error:
            raise ToolError(f"{where} is damaged ({error}); somebody changed the store by hand") from error
        if isinstance(content, dict) and ABANDONED in content:
            return None
        return read_record(Manifest, content, where)


def parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results in order. The first error is raised, and what has not begun then is left."""
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _shared(progress: Progress) -> Advance:
    """For several threads."""
    lock = threading.Lock()

    def advance(count: int) -> None:
        with lock:
            progress.advance(count)

    return advance


def _manifest(contents: Contents, evidence: Evidence | None) -> Manifest:
    return Manifest(
        format=FORMAT,
        id=new_id(),
        kind=contents.kind,
        name=contents.name,
        version=contents.version,
        folder=contents.folder,
        files=[file for file, _ in contents.files],
        provenance=contents.provenance,
        marina=contents.marina,
        evidence=evidence,
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        who=who(),
    )


def _setter(tag: Tag, kind: Kind, name: str) -> str:
    """The command that sets a tag."""
    of = "" if kind == "archives" else f" --kind {kind}"
    if tag == "production" and kind in GATED:
        return f"marina store promote {name}{of} --to production"
    return f"marina store tag {name} {tag}{of}"
