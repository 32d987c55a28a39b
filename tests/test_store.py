"""The store, in a folder and in a bucket of a real S3 server: the same tests on both."""

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import store_places
from store_places import BUCKET, write_run, write_zip
from tiny_archive import as_built, write_archive

from handlers.errors import BadArchive, MarinaError
from tools.data.dataset import read_dataset
from tools.data.drawn_set import DrawSettings, draw_dataset
from tools.errors import ToolError
from tools.store import command
from tools.store.gc import collect
from tools.store.manifest import ID, StoredFile, new_id
from tools.store.promote import promote, tag
from tools.store.store import Store
from tools.store.tags import standing

NOW = timedelta(0)
WEEK = timedelta(days=7)

# A push in a process of its own, which stops at some point until it is told to go on.
PUSH = """
import sys
from pathlib import Path
from handlers.errors import MarinaError
from tools.store.objects import LocalFile
from tools.store.store import Store

def stop():
    print("stopped", flush=True)
    sys.stdin.readline()

store = Store(sys.argv[1])
read, create = LocalFile.part, store.objects.create
def part(file, number):
    if sys.argv[3] == "part" and number == 2:
        stop()
    return read(file, number)
def create_or_stop(name, data):
    if sys.argv[3] == "manifest" and name.startswith("manifests/"):
        stop()
    return create(name, data)
LocalFile.part, store.objects.create = part, create_or_stop
try:
    print(store.push(Path(sys.argv[2])).id)
except MarinaError as error:
    print(error)
"""

# Pushes and promotes one archive after another.
WRITER = """
import sys
from pathlib import Path
from tools.store.promote import promote
from tools.store.store import Store
store = Store(sys.argv[1])
for path in map(Path, sys.argv[2:]):
    manifest = store.push(path)
    promote(store, manifest, "production", None, "a test")
    print(manifest.id)
"""

# Runs a command with files of this process limited to a size: for it, the disk is full.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from handlers.errors import MarinaError
from tools.store.store import Store
store = Store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    if sys.argv[2] == "push":
        store.push(Path(sys.argv[3]))
    else:
        store.pull(store.find("big", "datasets"), Path(sys.argv[3]))
except MarinaError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The endpoint of a server with an empty bucket."""
    with store_places.moto() as endpoint:
        store_places.client(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a store that nobody has used can be: in a folder, or in a bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    for name, value in store_places.credentials(request.getfixturevalue("bucket")).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def store(url: str) -> Store:
    return Store(url)


@pytest.fixture
def folder_url(tmp_path: Path) -> str:
    """In a folder: for what does not depend on the place."""
    return str(tmp_path / "store")


@pytest.fixture
def local(folder_url: str) -> Store:
    return Store(folder_url)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "shapes.mar", "shapes")


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def finished(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate("\n", timeout=240)
    assert process.returncode == 0, errors
    return output.splitlines()


def push_that_stops(url: str, path: Path, where: str) -> subprocess.Popen[str]:
    process = start(PUSH, url, path, where)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n", process.communicate()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def names(store: Store, prefix: str) -> list[str]:
    return [entry.name for entry in store.objects.names(prefix)]


def versions(folder: Path, *numbers: int) -> list[Path]:
    """Archives of one name, each its own."""
    folder.mkdir(exist_ok=True)
    return [write_archive(folder / f"{number}.mar", "shapes", version=f"1.{number}") for number in numbers]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def marina(url: str, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([arguments[0], "--store", url, *arguments[1:]]))


def test_what_is_pushed_comes_back(store: Store, archive: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "cells-1")
    pictures = draw_dataset(DrawSettings(output=tmp_path / "set", pictures=[1, 1, 1], width=[64], height=[64]))
    weights = tmp_path / "best.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    packed = write_zip(tmp_path / "labels.zip", 1000)
    pushed = [store.push(path) for path in (archive, run, pictures.folder, weights, packed)]
    assert [each.kind for each in pushed] == ["archives", "runs", "datasets", "weights", "datasets"]
    assert [each.name for each in pushed] == ["shapes", "cells-1", "set", "best", "labels"]
    assert store.manifests() == pushed and all(ID.fullmatch(each.id) for each in pushed)
    (tmp_path / "out").mkdir()
    assert store.pull(pushed[0], tmp_path / "out").read_bytes() == archive.read_bytes()
    assert store.pull(pushed[0], tmp_path / "out" / "other.mar").read_bytes() == archive.read_bytes()
    assert tree(store.pull(pushed[1], tmp_path / "out" / "run")) == tree(run)
    assert read_dataset(store.pull(pushed[2], tmp_path / "out" / "set")).classes == pictures.classes
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shapes.mar", "other.mar", "run", "set"}
    with pytest.raises(ToolError, match="is there already"):
        store.pull(pushed[1], tmp_path / "out" / "run")


def test_the_same_content_is_stored_once(store: Store, archive: Path) -> None:
    one, two = store.push(archive), store.push(archive)
    assert one.id < two.id and one.files == two.files
    assert len(names(store, "blobs/")) == 1 and not names(store, "pushes/")
    assert store.find("shapes", "archives") == two and store.find(one.id, "runs") == one


def test_ids_sort_as_time_does() -> None:
    ids = [new_id() for _ in range(2000)]
    stamps = [id.partition("-")[0] for id in ids]
    assert stamps == sorted(stamps) and len(set(ids)) == len(ids) and all(map(ID.fullmatch, ids))


def test_fifty_pushes_and_promotes_at_once_are_all_there(url: str, tmp_path: Path) -> None:
    shares = [versions(tmp_path / "pushed", *range(first, 50, 4)) for first in range(4)]
    processes = [start(WRITER, url, *share) for share in shares]
    printed = [finished(process) for process in processes]
    ids = [id for each in printed for id in each]
    assert len(ids) == len(set(ids)) == 50
    store = Store(url)
    assert {each.id for each in store.manifests()} == set(ids)
    assert {each.version for each in store.manifests()} == {f"1.{number}" for number in range(50)}
    # `history` refuses moves that are not one line.
    moves = store.tags("archives", "shapes").history("production")
    assert sorted(move.id for move in moves) == sorted(ids)
    for each in printed:  # what one process did stands in its order
        assert [move.id for move in moves if move.id in each] == each


@pytest.mark.parametrize("where", ["part", "manifest"])
def test_a_push_that_is_killed_leaves_nothing_to_see_and_is_gone_on_with(url: str, where: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "big.zip", 20_000_000)
    kill(push_that_stops(url, path, where))
    store = Store(url)
    assert store.manifests() == [] and len(store.pushes()) == 1
    with pytest.raises(ToolError, match="has no datasets 'big'"):
        store.find("big", "datasets")
    manifest = store.push(path)
    assert store.manifests() == [manifest]
    assert store.pull(manifest, tmp_path / "out.zip").read_bytes() == path.read_bytes()
    # Nothing is taken that is younger than the age, and nothing that is in use.
    assert collect(store, WEEK).pushes == 0
    removed = collect(store, NOW)
    assert removed.pushes == 1 and removed.blobs == 0
    assert store.manifests() == [manifest] and not store.pushes() and not names(store, "uploads/")
    assert store.pull(manifest, tmp_path / "again.zip").read_bytes() == path.read_bytes()


def test_gc_removes_what_a_killed_push_has_left(url: str, tmp_path: Path) -> None:
    kill(push_that_stops(url, write_zip(tmp_path / "a.zip", 20_000_000), "part"))
    kill(push_that_stops(url, write_zip(tmp_path / "b.zip", 1000, seed=1), "manifest"))
    store = Store(url)
    removed = collect(store, NOW)
    assert (removed.pushes, removed.blobs, removed.uploads) == (2, 1, 1) and removed.size > 1000
    assert not names(store, "blobs/") and not names(store, "condemned/") and not store.pushes()
    assert store.manifests() == [] and collect(store, NOW).pushes == 0


def test_a_push_that_gc_has_given_up_does_not_become_visible(url: str, tmp_path: Path) -> None:
    process = push_that_stops(url, write_zip(tmp_path / "a.zip", 1000), "manifest")
    store = Store(url)
    assert collect(store, NOW).blobs == 1
    assert "has given up this push" in finished(process)[0]
    assert store.manifests() == []


def test_a_push_under_way_keeps_what_it_relies_on(folder_url: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", 1000)
    process = push_that_stops(folder_url, path, "manifest")
    store = Store(folder_url)
    assert collect(store, WEEK).blobs == 0
    (id,) = finished(process)
    assert store.pull(store.find(id, "datasets"), tmp_path / "out.zip").read_bytes() == path.read_bytes()


def test_a_push_does_not_rely_on_what_gc_is_about_to_remove(local: Store, archive: Path) -> None:
    manifest = local.push(archive)
    local.objects.create(f"condemned/{new_id()}.json", json.dumps([manifest.files[0].blob]).encode())
    with pytest.raises(ToolError, match="gc` is removing"):
        local.push(archive)
    collect(local, NOW)
    assert local.push(archive).files == manifest.files


def test_tags_move_and_go_back_along_a_line(store: Store, tmp_path: Path) -> None:
    one, two, three = (store.push(path) for path in versions(tmp_path, 1, 2, 3))
    tags = store.tags("archives", "shapes")
    with pytest.raises(ToolError, match="was never set"):
        store.find("shapes@staging", "archives")
    with pytest.raises(ToolError, match="it was never set"):
        tags.roll_back("staging", "")
    for manifest in (one, two, two, three):
        tag(store, manifest, "staging", "try\nit")
    assert tags.roll_back("staging", "bad").id == two.id
    assert tags.roll_back("staging", "worse").id == one.id
    with pytest.raises(ToolError, match="cannot go back: nothing stands before"):
        tags.roll_back("staging", "")
    tag(store, three, "staging", None)
    moves = tags.history("staging")
    assert [move.id for move in moves] == [one.id, two.id, three.id, two.id, one.id, three.id]
    assert [move.why for move in moves] == ["try it", "try it", "try it", "bad", "worse", ""]
    assert [move.number for move in moves] == [1, 2, 3, 4, 5, 6] and all("@" in move.who for move in moves)
    assert standing(moves) == [one.id, three.id]
    assert store.find("shapes@staging", "archives") == three
    assert store.tagged() == {("archives", "shapes", three.id): ["staging"]}
    assert names(store, "tags/")[-1] == "tags/archives/shapes/staging/00000006.json"


def test_a_rollback_that_somebody_else_overtakes_is_refused(local: Store, tmp_path: Path) -> None:
    one, two, three = (local.push(path) for path in versions(tmp_path, 1, 2, 3))
    tags = local.tags("archives", "shapes")
    for manifest in (one, two):
        tag(local, manifest, "latest", None)
    history = tags.history

    def overtaken(name: str) -> list:
        moves = history(name)
        tag(local, three, "latest", None)
        return moves

    tags.history = overtaken
    with pytest.raises(ToolError, match="moved by somebody else just now"):
        tags.roll_back("latest", "")
    assert tags.current("latest").id == three.id


def evaluation(folder: Path, map50: float | None = 0.9, model: str = "shapes 1.0") -> Path:
    """As `marina evaluate --output` writes it; tests/test_evaluate.py looks at the real ones."""
    from tools.evaluate.evaluation import OVERALL, PER_CLASS

    content = {
        "model": model,
        "data": {"split": "test", "pictures": 10, "boxes": 20, "digest": "0" * 64},
        "overall": dict.fromkeys(OVERALL, 0.5) | {"map50": map50},
        "per_class": [{"name": "star"} | dict.fromkeys(PER_CLASS, 0.7)],
    }
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_only_what_has_passed_its_gate_is_promoted(store: Store, archive: Path, tmp_path: Path) -> None:
    good, bad = evaluation(tmp_path / "good"), evaluation(tmp_path / "bad", 0.5)
    require = ["map50=0.8", "ap50:star=0.7"]
    passed = store.push(archive, evaluation=good, require=require)
    refused = {
        "failed its gate: map50 0.5 .required: 0.8.": store.push(archive, evaluation=bad, require=require),
        "map50 unknown": store.push(archive, evaluation=evaluation(tmp_path / "none", None), require=require),
        "without an evaluation": store.push(archive),
        "without a gate": store.push(archive, evaluation=good),
    }
    for reason, manifest in refused.items():
        with pytest.raises(ToolError, match=reason):
            promote(store, manifest, "production", None, None)
    failed = next(iter(refused.values()))
    for tagged in ("latest", "staging", "production"):
        with pytest.raises(ToolError, match="gate"):
            tag(store, failed, tagged, None)
    with pytest.raises(ToolError, match="marina store promote"):
        tag(store, passed, "production", None)
    assert (
        promote(store, passed, "production", None, None).why
        == "map50 0.9 (required: 0.8), ap50:star 0.7 (required: 0.7)"
    )
    forced = promote(store, failed, "production", None, "it's $(urgent)")
    assert forced.why.startswith("forced: it's $(urgent) (it failed its gate: map50 0.5")
    assert forced.previous == passed.id and forced.action == "promote"


@pytest.mark.parametrize(
    ("model", "require", "problem"),
    [
        ("shapes 2.0", ["map50=0.8"], "is about 'shapes 2.0', not about 'shapes 1.0'"),
        ("shapes 1.0", ["map51=0.8"], "map51"),
        ("shapes 1.0", ["map50=2"], "no number above 0 and up to 1"),
    ],
)
def test_evidence_that_is_none_is_refused(
    local: Store, archive: Path, tmp_path: Path, model: str, require: list[str], problem: str
) -> None:
    with pytest.raises(ToolError, match=problem):
        local.push(archive, evaluation=evaluation(tmp_path / "e", model=model), require=require)
    assert not (tmp_path / "store").exists()


def test_evidence_in_another_form_is_refused(local: Store, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"model": "shapes 1.0"}')
    with pytest.raises(ToolError, match="is no evaluation"):
        local.push(archive, evaluation=tmp_path / "e.json")
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(ToolError, match="is no JSON"):
        local.push(archive, evaluation=tmp_path / "e.json")
    with pytest.raises(ToolError, match="cannot be read"):
        local.push(archive, evaluation=tmp_path / "nowhere")
    with pytest.raises(ToolError, match="--require goes with --evaluation"):
        local.push(archive, require=["map50=0.8"])


def damage(store: Store, file: StoredFile) -> None:
    """Other content of the same size where the blob lies."""
    store.objects.delete(file.blob)
    store.objects.create(file.blob, b"x" * file.size)


def test_content_that_differs_is_never_given_out_and_mended_by_a_push(
    store: Store, archive: Path, tmp_path: Path
) -> None:
    manifest = store.push(archive)
    damage(store, manifest.files[0])
    (tmp_path / "out.mar").write_bytes(b"before")
    for _ in range(2):
        with pytest.raises(ToolError, match="has another checksum than what was pushed"):
            store.pull(manifest, tmp_path / "out.mar")
    assert (tmp_path / "out.mar").read_bytes() == b"before"
    with pytest.raises(ToolError, match="has another checksum"):
        promote(store, manifest, "production", None, "a test")
    assert store.tags("archives", "shapes").current("production") is None
    store.push(archive)
    assert store.pull(manifest, tmp_path / "out.mar").read_bytes() == archive.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_run_is_verified_before_it_is_promoted(store: Store, tmp_path: Path) -> None:
    manifest = store.push(write_run(tmp_path / "cells"))
    assert promote(store, manifest, "latest", None, "a test").id == manifest.id
    damage(store, manifest.files[0])
    with pytest.raises(ToolError, match="has another checksum"):
        promote(store, manifest, "staging", None, "a test")
    store.objects.delete(manifest.files[0].blob)
    with pytest.raises(ToolError, match="is gone from the store"):
        promote(store, manifest, "staging", None, "a test")
    with pytest.raises(ToolError, match="is gone from the store"):
        store.pull(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pull_that_was_cut_off_goes_on(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "big.zip", 20_000_000)
    manifest = store.push(path)
    chunks, starts = store.objects.chunks, []

    def cut_off(name: str, start: int, size: int) -> Iterator[bytes]:
        starts.append(start)
        for number, data in enumerate(chunks(name, start, size)):
            if number == 1 and len(starts) == 1:
                raise ToolError("cut off")
            yield data

    monkeypatch.setattr(store.objects, "chunks", cut_off)
    with pytest.raises(ToolError, match="cut off"):
        store.pull(manifest, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()
    (part,) = tmp_path.glob(".out.zip.*")
    there = part.stat().st_size
    assert there > 0
    store.pull(manifest, tmp_path / "out.zip")
    assert starts == [0, there] and (tmp_path / "out.zip").read_bytes() == path.read_bytes()
    # A part that is of something else is not built on.
    part.write_bytes(b"y" * 1000)
    (tmp_path / "out.zip").unlink()
    store.pull(manifest, tmp_path / "out.zip")
    assert starts[2:] == [1000, 0] and (tmp_path / "out.zip").read_bytes() == path.read_bytes()


def test_two_pulls_do_not_write_one_file(local: Store, archive: Path, tmp_path: Path) -> None:
    manifest = local.push(archive)
    part = tmp_path / f".out.mar.{manifest.files[0].sha256[:16]}.part"
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ToolError, match="another pull writes"):
            local.pull(manifest, tmp_path / "out.mar")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(folder_url: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "big.zip", 9_000_000)
    (line,) = finished(start(ON_A_FULL_DISK, folder_url, "push", path))
    assert "cannot be written (the disk is full); what is in it is as it was" in line
    assert Store(folder_url).manifests() == [] and not names(Store(folder_url), "uploads/")
    Store(folder_url).push(path)
    (tmp_path / "out.zip").write_bytes(b"before")
    (line,) = finished(start(ON_A_FULL_DISK, folder_url, "pull", tmp_path / "out.zip"))
    assert "cannot be written (the disk is full); what was there is as it was" in line
    assert (tmp_path / "out.zip").read_bytes() == b"before"
    Store(folder_url).pull(Store(folder_url).find("big", "datasets"), tmp_path / "out.zip")
    assert (tmp_path / "out.zip").read_bytes() == path.read_bytes()


def test_an_archive_of_a_newer_marina_is_not_promoted(local: Store, tmp_path: Path) -> None:
    path = as_built(write_archive(tmp_path / "a.mar", "shapes"), marina={"version": "99.0"})
    manifest = local.push(path)
    assert manifest.marina == "99.0" and manifest.provenance
    with pytest.raises(ToolError, match=r"built by Marina 99\.0, newer than this one"):
        promote(local, manifest, "production", None, "a test")


def test_a_damaged_archive_is_not_pushed(local: Store, tmp_path: Path) -> None:
    path = as_built(write_archive(tmp_path / "a.mar", "shapes"))
    content = path.read_bytes()
    place = content.index(b"def ")
    path.write_bytes(content[:place] + b"D" + content[place + 1 :])
    with pytest.raises(BadArchive, match=r"tiny_handler\.py"):
        local.push(path)
    assert not local.objects.root.exists()


def test_a_manifest_of_a_newer_marina_or_changed_by_hand_is_one_line(local: Store, archive: Path) -> None:
    manifest = local.push(archive)
    path = local.objects.root / manifest.key
    content = json.loads(path.read_text())
    outside = content | {"files": [content["files"][0] | {"path": "../../a"}]}
    for changed, problem in (
        (content | {"format": 2}, "newer Marina .format 2, known up to 1.; upgrade"),
        (outside, "damaged .*leads out of its folder"),
        (content | {"more": 1}, "damaged .*unknown key"),
        ([], "no JSON object"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ToolError, match=problem):
            local.find("shapes", "archives")
    path.write_text("{")
    with pytest.raises(ToolError, match="is damaged"):
        local.manifests()


def test_a_tag_that_points_to_nothing(store: Store, archive: Path) -> None:
    manifest = store.push(archive)
    promote(store, manifest, "production", None, "a test")
    store.objects.delete(manifest.key)
    with pytest.raises(
        ToolError, match=f"production of archives shapes points to {manifest.id}, which is not in store"
    ):
        store.find("shapes@production", "archives")


@pytest.mark.parametrize("path", ["/a", "../a", "a/../b", "a//b", "", ".", "a\\b", "a\0", "./a", "a/"])
def test_no_path_leads_out_of_its_folder(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        StoredFile(path=path, size=0, sha256="0" * 64)


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "$(date)",
        "it's",
        "..",
        "../a",
        "a/b",
        "",
        "-a",
        ".a",
        "a" * 101,
        "20261121T223817222425Z-0123456789abcdef",
    ],
)
def test_names_are_plain(local: Store, archive: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ToolError, match=r"no name|neither ID"):
        local.push(write_zip(tmp_path / "a.zip", 10), name)
    if name != "" and not ID.fullmatch(name):
        with pytest.raises(ToolError, match="neither ID, NAME nor NAME@TAG"):
            local.find(name, "archives")
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_pushed_is_one_line(local: Store, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "no.zip").write_text("x")
    (tmp_path / "no.pt").write_text("x")
    (tmp_path / "plain").mkdir()
    linked = write_run(tmp_path / "linked")
    (linked / "link").symlink_to("/etc/hostname")
    for path, problem in (
        (tmp_path / "nowhere", "is not there"),
        (tmp_path / "text.txt", "nothing that the store takes"),
        (tmp_path / "no.zip", "nothing that the store takes"),
        (tmp_path / "no.pt", "no.pt"),
        (tmp_path / "plain", "is no run"),
        (linked, "is a link"),
    ):
        with pytest.raises(MarinaError, match=problem):
            local.push(path)
    with pytest.raises(ToolError, match="has its name inside"):
        local.push(archive, "other")
    assert not (tmp_path / "store").exists()


def test_a_file_that_changes_while_it_is_pushed_is_not_pushed(store: Store, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", 1000)
    holds = store.objects.holds

    def meanwhile(name: str, file: object) -> bool:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        return holds(name, file)

    store.objects.holds = meanwhile
    with pytest.raises(ToolError, match="changed while it was pushed"):
        store.push(path)
    assert store.manifests() == []


@pytest.mark.parametrize("url", ["", "http://a/b", "s3://", "s3://key:secret@bucket", "s3://b/$(x)", "s3:/", "gs://b"])
def test_what_is_no_store_is_one_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolError, match=r"is no store|holds no credentials") as failure:
        Store(url)
    assert "secret" not in str(failure.value).replace("AWS_SECRET", "").lower()


def test_the_command_from_push_to_rollback(
    folder_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> list[str]:
        assert marina(folder_url, *arguments) == 0
        return capsys.readouterr().out.splitlines()

    assert run("check") == [f"{folder_url}: can be written to, and keeps tags; nothing was pushed to it yet"]
    one, two = versions(tmp_path, 1, 2)
    found = [evaluation(tmp_path / version, model=f"shapes {version}") for version in ("1.1", "1.2")]
    ids = [
        run("push", str(path), "--evaluation", str(folder), "--require", "map50=0.8")[0]
        for path, folder in zip((one, two), found, strict=True)
    ]
    assert run("check") == [f"{folder_url}: can be written to, and keeps tags"]
    with pytest.raises(ToolError, match="archives shapes has no tag"):
        marina(folder_url, "history", "shapes")
    assert "production is" in run("promote", ids[0], "--to", "production")[0]
    run("promote", "shapes", "--to", "production", "--why", "better")
    run("tag", ids[0], "latest")
    header, first, second = run("list")
    assert header.startswith("id ") and first.split()[0] == ids[0] and first.endswith("passed    latest")
    assert second.split()[0] == ids[1] and second.endswith("passed    production")
    shown = json.loads("\n".join(run("show", "shapes@production")))
    assert shown["id"] == ids[1] and shown["tags"] == ["production"] and shown["version"] == "1.2"
    assert shown["files"][0]["location"].startswith(f"{folder_url}/blobs/")
    monkeypatch.chdir(tmp_path)
    one.rename(tmp_path / "was.mar")
    assert run("pull", ids[0]) == ["1.mar"] and tree(tmp_path)["1.mar"] == tree(tmp_path)["was.mar"]
    assert ids[0] in run("rollback", "shapes", "production", "--why", "slow")[0]
    lines = run("history", "shapes", "production")
    assert [line.split()[4] for line in lines] == [ids[0], ids[1], ids[0]]
    assert lines[1].endswith("better") and lines[2].endswith("slow") and len(run("history", "shapes")) == 4
    assert run("gc", "--age", "0") == ["0 pushes given up; 0 blobs removed, 0 bytes; 0 unfinished uploads removed"]
    monkeypatch.delenv(command.VARIABLE, raising=False)
    with pytest.raises(ToolError, match="say which store"):
        marina("", "list")
    with pytest.raises(ToolError, match="a number of days"):
        marina(folder_url, "gc", "--age", "nan")
