"""Bulk detection: every picture exactly once, whatever dies; bad ones apart; one line for what cannot work."""

import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pytest
import store_places
from faster_coco_eval import COCO
from model_folder import LABELS, encode, scene, write_model
from store_places import BUCKET
from tiny_archive import as_built

from tools.bulk.cluster import Crew, share
from tools.bulk.job import Job, Ledger
from tools.bulk.outputs import write_outputs
from tools.bulk.parts import read_part
from tools.bulk.plan import Shard, add_pictures, list_pictures, read_lines, read_shards
from tools.bulk.plan import entries as entries_of
from tools.bulk.run import Model, read_model
from tools.bulk.source import open_source, open_target
from tools.bulk.worker import Worker
from tools.errors import ToolError
from tools.store.objects import Entry, Objects

# Works through a source with the settings of the test that kills it, without Ray.
ALONE = """
import sys
from pathlib import Path
from test_bulk import Ledger, Worker, planned, read_model, read_shards
source, out, archive = sys.argv[1:]
model = read_model(Path(archive))
target, job = planned(source, out, model, max_detections=5)
worker = Worker(job, model.content, 1, Ledger())
for shard in read_shards(target):
    worker.do(shard)
"""

HOSTILE = ["plain.jpg", 'a b/c\'d "e".jpg', "new\nline.jpg", "é 漢字 $(date).jpg", "-f.jpg", "x" * 200 + ".jpg"]

# The command for each line of stdin, in one process: it imports torch and Ray.
EACH = """
import json, sys
from tools import cli
for line in sys.stdin:
    print(cli.main(json.loads(line)), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained YOLOv5n as an archive."""
    folder = tmp_path_factory.mktemp("model")
    config = write_model(folder)
    model = {"modelName": "small", "modelVersion": "1.0", "handler": "h.py", "configFile": "model-config.yaml"}
    (folder / "MAR-INF").mkdir()
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": model}))
    (folder / "model-config.yaml").write_text(json.dumps(config))
    path = tmp_path_factory.mktemp("archives") / "small.mar"
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.rglob("*")):
            file.write(each, each.relative_to(folder))
    return as_built(path)


@pytest.fixture(scope="module")
def model(archive: Path) -> Model:
    return read_model(archive)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with store_places.moto() as endpoint:
        store_places.client(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in store_places.credentials(server).items():
        monkeypatch.setenv(name, value)
    yield f"s3://{BUCKET}"
    client = store_places.client(server)
    for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=each["Key"])


def pictures(count: int) -> list[bytes]:
    return [encode(scene(60 + 10 * seed, 100, seed), "JPEG") for seed in range(count)]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return folder


def planned(source: str | Path, target: str | Path, model: Model, **options: object) -> tuple[Objects, Job]:
    """As the command begins."""
    place, there = open_source(str(source)), open_target(str(target))
    wanted = model.options(options)
    manifest = model.manifest(place.url, wanted).open(there, str(target))
    add_pictures(there, list_pictures(place)[0])
    return there, Job(manifest, str(target), wanted, batch=2)


def names_in(target: Objects, shards: list[Shard]) -> list[str]:
    return [entry.name for shard in shards for entry in entries_of(read_lines(target, shard).splitlines())]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_every_name_stands_in_one_shard_and_what_comes_later_behind_it(place: str, bucket: str, tmp_path: Path) -> None:
    target = open_target(f"{bucket}/out" if place == "bucket" else str(tmp_path / "out"))
    names = sorted([f"{index:02d}.jpg" for index in range(40)] + HOSTILE)
    add_pictures(target, [Entry(name, 1) for name in names])
    before = read_shards(target)
    add_pictures(target, [Entry(name, 1) for name in sorted(["00-later.jpg", *names[5:]])])
    after = read_shards(target)
    assert after[: len(before)] == before
    assert names_in(target, after) == [*names, "00-later.jpg"]
    assert [(shard.number, shard.first, shard.pictures) for shard in after] == [
        (0, 0, 16),
        (1, 16, 16),
        (2, 32, 14),
        (3, 46, 1),
    ]


def test_of_many_that_list_at_once_each_picture_is_listed_once(tmp_path: Path) -> None:
    target = open_target(str(tmp_path))
    everything = [Entry(f"{index:03d}.jpg", 1) for index in range(60)]
    threads = [
        threading.Thread(target=add_pictures, args=(target, everything[begin : begin + 24]))
        for begin in (0, 12, 24, 36)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names_in(target, read_shards(target))) == [entry.name for entry in everything]


def test_large_listings_have_large_shards(tmp_path: Path) -> None:
    target = open_target(str(tmp_path))
    add_pictures(target, [Entry(f"{index:06d}.jpg", 1) for index in range(50_000)])
    shards = read_shards(target)
    assert [shard.pictures for shard in shards] == [50] * 1000
    assert names_in(target, shards[-1:])[-1] == "049999.jpg"


def test_pictures_in_a_bucket_bad_ones_apart_and_their_neighbours_as_served(
    bucket: str, server: str, model: Model
) -> None:
    client = store_places.client(server)
    hostile = [name for name in HOSTILE if "\n" not in name]  # the server has no such keys
    good = dict(zip(hostile, pictures(len(hostile)), strict=True))
    bad = {"cut.jpg": good["plain.jpg"][:300], "none.png": b"", "text.gif": b'{"b64": ""}', "gone.jpg": b"x"}
    for name, body in {**good, **bad, "notes.txt": b"no picture"}.items():
        client.put_object(Bucket=BUCKET, Key=f"in/{name}", Body=body)
    target, job = planned(f"{bucket}/in", f"{bucket}/out", model, score_threshold=0.3, max_detections=5)
    client.delete_object(Bucket=BUCKET, Key="in/gone.jpg")
    worker = Worker(job, model.content, 1, Ledger())
    shards = read_shards(target)
    for shard in shards:
        worker.do(shard)
    summary = write_outputs(target, job.manifest, model.labels, shards, {})
    assert (summary["pictures"], summary["answered"]) == (9, 5)
    failed = {row["picture"]: row["type"] for row in map(json.loads, target.read("failed.jsonl").splitlines())}
    assert failed == {
        "cut.jpg": "InvalidImage",
        "none.png": "EmptyBody",
        "text.gif": "UnsupportedMedia",
        "gone.jpg": "Missing",
    }
    coco = json.loads(target.read("coco.json"))
    assert [image["file_name"] for image in coco["images"]] == sorted(good)
    everyone = sorted([*good, *bad])
    assert [everyone[image["id"] - 1] for image in coco["images"]] == sorted(good)
    assert [annotation["id"] for annotation in coco["annotations"]] == list(range(1, summary["detections"] + 1))
    for image in coco["images"]:
        (expected,) = worker.pipeline.detect([good[image["file_name"]]], job.options)
        found = [each for each in coco["annotations"] if each["image_id"] == image["id"]]
        assert [each["category_id"] for each in found] == expected.labels.tolist()
        assert [each["score"] for each in found] == pytest.approx(expected.scores.tolist(), abs=1e-6)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in found)]
        assert corners == [pytest.approx(box, abs=2e-3) for box in expected.boxes.tolist()]
    assert summary["detections"] > 5


def test_the_outputs_are_read_by_others(model: Model, tmp_path: Path) -> None:
    names = [f"{index:02d}.jpg" for index in range(20)]
    source = write(tmp_path / "in", dict(zip(names, pictures(20), strict=True)))
    target, job = planned(source, tmp_path / "out", model)
    worker = Worker(job, model.content, 1, Ledger())
    shards = read_shards(target)
    for shard in shards:
        worker.do(shard)
    summary = write_outputs(target, job.manifest, model.labels, shards, {})
    table = ds.dataset(tmp_path / "out" / "parts").to_table()
    rows = sorted(table.to_pylist(), key=lambda row: row["id"])
    assert [(row["id"], row["picture"]) for row in rows] == list(enumerate(names, 1))
    assert {row["archive_sha256"] for row in rows} == {model.sha256} and {row["model"] for row in rows} == {"small"}
    assert (rows[1]["width"], rows[1]["height"]) == (100, 70)
    coco = COCO(str(tmp_path / "out" / "coco.json"))
    assert [coco.cats[index]["name"] for index in sorted(coco.cats)] == LABELS
    assert len(coco.anns) == sum(len(row["detections"]) for row in rows) == summary["detections"]
    first = rows[0]["detections"][0]
    assert first["label"] == LABELS[first["index"]] and len(first["box"]) == 4


def test_a_picture_of_a_folder_that_cannot_be_taken(model: Model, tmp_path: Path) -> None:
    body = pictures(1)[0]
    source = write(tmp_path / "in", {"good.jpg": body, "gone.jpg": body, "other.jpg": body})
    with open(source / "large.jpg", "wb") as file:
        file.truncate(20_000_001)
    Path(os.fsdecode(os.fsencode(source) + b"/\xff.jpg")).write_bytes(body)
    (source / "link.jpg").symlink_to("nothing")
    target, job = planned(source, tmp_path / "out", model)
    (source / "gone.jpg").unlink()
    (source / "other.jpg").unlink()
    (source / "other.jpg").mkdir()
    (shard,) = read_shards(target)
    worker = Worker(job, model.content, 1, Ledger())
    worker.do(shard)
    part = read_part(target, shard, job.manifest, read_lines(target, shard))
    assert [one.picture for one in part.answered] == ["good.jpg"]
    assert {one.picture: one.type for one in part.failed} == {
        "gone.jpg": "Missing",
        "large.jpg": "ImageTooLarge",
        "link.jpg": "Unreadable",
        "other.jpg": "Unreadable",
        "\\xff.jpg": "BadName",
    }
    # When all of it is gone, no picture is to blame.
    source.rename(tmp_path / "moved")
    with pytest.raises(ToolError, match="is gone; bring it back"):
        worker.do(shard)


def test_a_shard_that_is_done_twice_has_one_part_the_same_every_time(model: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": pictures(1)[0], "b.jpg": b"bad"})
    contents = []
    for name in ("one", "two"):
        target, job = planned(source, tmp_path / name, model)
        (shard,) = read_shards(target)
        for _ in range(2):
            Worker(job, model.content, 1, Ledger()).do(shard)
        contents.append(target.read(shard.part))
        assert [entry.name for entry in target.names("parts/")] == ["parts/000000.parquet"]
    assert contents[0] == contents[1]


def test_a_part_that_is_damaged_or_of_another_run_is_not_taken(model: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": pictures(1)[0]})
    target, job = planned(source, tmp_path / "out", model)
    other, other_job = planned(source, tmp_path / "other", model, score_threshold=0.9)
    (shard,) = read_shards(target)
    Worker(other_job, model.content, 1, Ledger()).do(shard)
    target.create(shard.part, other.read(shard.part))
    with pytest.raises(ToolError, match=r"parts/000000\.parquet in DST is of another run"):
        write_outputs(target, job.manifest, model.labels, [shard], {})
    target.delete(shard.part)
    target.create(shard.part, other.read(shard.part)[:-9])
    with pytest.raises(ToolError, match=r"parts/000000\.parquet in DST is damaged"):
        write_outputs(target, job.manifest, model.labels, [shard], {})


def test_a_picture_that_kills_a_worker_twice_is_left_out(model: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {f"{name}.jpg": pictures(1)[0] for name in "abc"})
    target, job = planned(source, tmp_path / "out", model)
    (shard,) = read_shards(target)
    ledger = Ledger()
    worker = Worker(job, model.content, 1, ledger)
    infer = worker.pipeline.infer
    asked = 0

    def dies_at_b(jobs: list) -> None:
        """As often as it is asked about the second picture: with its neighbour, and then alone."""
        nonlocal asked
        asked += 1
        if asked in (1, 3):
            raise SystemExit
        infer(jobs)

    worker.pipeline.infer = dies_at_b
    for _ in range(2):
        with pytest.raises(SystemExit):
            worker.do(shard)
    assert worker.do(shard).failed == 1
    part = read_part(target, shard, job.manifest, read_lines(target, shard))
    assert [one.picture for one in part.answered] == ["a.jpg", "c.jpg"]
    assert [(one.picture, one.type) for one in part.failed] == [("b.jpg", "WorkerDied")]


def test_a_full_disk_leaves_no_half_of_a_part(model: Model, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": pictures(1)[0]})
    target, job = planned(source, tmp_path / "out", model)
    (shard,) = read_shards(target)
    worker = Worker(job, model.content, 1, Ledger())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ToolError, match="the disk is full"):
            worker.do(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert target.names("parts/") == []
    worker.do(shard)
    assert len(target.names("parts/")) == 1


def test_a_target_that_was_begun_otherwise_is_refused(model: Model, tmp_path: Path) -> None:
    body = pictures(1)[0]
    one, two = (write(tmp_path / name, {"a.jpg": body}) for name in ("one", "two"))
    planned(one, tmp_path / "out", model, classes="cat,person")
    planned(one, tmp_path / "out", model, classes="3,0")
    with pytest.raises(ToolError, match=r"begun with another classes \(\[0, 3\], now \[0\]\)"):
        planned(one, tmp_path / "out", model, classes="cat")
    with pytest.raises(ToolError, match="begun with another source"):
        planned(two, tmp_path / "out", model, classes="cat,person")
    with pytest.raises(ToolError, match="begun with another archive"):
        planned(one, tmp_path / "out", replace(model, content=b"other"), classes="cat,person")
    write(tmp_path / "foreign", {"notes/mine.txt": b"{}"})
    with pytest.raises(ToolError, match=r"holds something else than a run of detect-bulk, notes/mine\.txt; give"):
        planned(one, tmp_path / "foreign", model)
    write(tmp_path / "strange", {"manifest.json": b'{"a": 1}'})
    with pytest.raises(ToolError, match=r"manifest\.json is of another program"):
        planned(one, tmp_path / "strange", model)


def test_the_cores_and_gpus_among_the_workers() -> None:
    assert share({"CPU": 8.0}, None, "auto") == Crew(8, 1, 0.0)
    assert share({"CPU": 8.0}, 3, "auto") == Crew(3, 2, 0.0)
    assert share({"CPU": 8.0, "GPU": 2.0}, None, "auto") == Crew(2, 4, 1.0)
    assert share({"CPU": 8.0, "GPU": 2.0}, 4, "gpu") == Crew(4, 2, 0.5)
    assert share({"CPU": 8.0, "GPU": 2.0}, None, "cpu") == Crew(8, 1, 0.0)
    with pytest.raises(ToolError, match="9 workers need a core each, and the cluster has 8"):
        share({"CPU": 8.0}, 9, "auto")


def test_one_line_for_what_cannot_work(archive: Path, bucket: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": pictures(1)[0]})
    write(tmp_path / "texts", {"a.txt": b"x"})
    write(tmp_path, {"no.mar": b"x", "file": b"x"})
    (tmp_path / "locked").mkdir()
    out, model = str(tmp_path / "out"), ["--archive", str(archive)]
    damaged = write(tmp_path, {"damaged.mar": archive.read_bytes().replace(b"person", b"parsun")}) / "damaged.mar"
    cases = [
        ([str(tmp_path / "gone"), out, *model], "gone is no folder"),
        ([str(tmp_path / "texts"), out, *model], "holds no pictures, of 1 files"),
        (["ftp://x/y", out, *model], "'ftp://x/y' is none of ours; give a folder or s3://BUCKET/PREFIX"),
        (["s3://absent/in", out, *model], "there is no bucket 'absent'"),
        ([str(source), "s3://absent", *model], "there is no bucket 'absent'"),
        ([str(source), str(tmp_path / "file" / "x"), *model], "cannot be made (Not a directory)"),
        ([str(source), str(tmp_path / "locked"), *model], "another run is at work in DST"),
        ([str(source), out], "archive: missing; it is: the model, as `marina archive build` makes it"),
        ([str(source), out, "--archive", str(tmp_path / "none.mar")], "no such file"),
        ([str(source), out, "--archive", str(tmp_path / "no.mar")], "not a zip file"),
        ([str(source), out, "--archive", str(damaged)], "index_to_name.json"),
        ([str(source), out, *model, "--score-threshold", "2"], "score_threshold is 2.0; allowed: a number from 0 to 1"),
        ([str(source), out, *model, "--classes", "lion"], "unknown class 'lion' in classes; this model knows 0 cat"),
        ([str(source), out, *model, "--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1 ("),
        ([str(source), out, *model, "--address", "auto"], "no Ray cluster at auto (no port in it)"),
    ]
    handle = os.open(tmp_path / "locked", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        lines = "".join(json.dumps(["detect-bulk", *arguments]) + "\n" for arguments, _ in cases)
        run = subprocess.run([sys.executable, "-c", EACH], input=lines, capture_output=True, text=True, check=True)
    finally:
        os.close(handle)
    told = [line for line in run.stderr.splitlines() if not line.startswith("detect: ")]
    assert [told[index] for index in range(1, len(told), 2)] == ["1"] * len(cases), told
    for (_, expected), line in zip(cases, told[::2], strict=True):
        assert expected in line


def test_killed_with_nine_and_resumed_each_picture_is_there_once(archive: Path, tmp_path: Path) -> None:
    """First a worker without Ray, where it stands; then, of the run on Ray that goes on, its worker."""
    drawn = pictures(4)
    files = {f"{index % 7}/it's {index:03d}\n.jpg": drawn[index % 4] for index in range(240)}
    source, out = write(tmp_path / "in", files | {"bad.jpg": b"bad"}), tmp_path / "out"
    places = [str(source), str(out)]

    def wait_for_parts(count: int, run: subprocess.Popen) -> None:
        while len(list((out / "parts").glob("*.parquet"))) < count:
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)

    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    first = subprocess.Popen([sys.executable, "-c", ALONE, *places, str(archive)], stderr=subprocess.PIPE, env=here)
    wait_for_parts(3, first)
    first.kill()
    first.communicate()
    done = len(list((out / "parts").glob("*.parquet")))
    assert 3 <= done < 12
    settings = ["--archive", str(archive), "--workers", "1", "--max-detections", "5"]
    second = subprocess.Popen(
        [sys.executable, "-m", "tools.cli", "detect-bulk", *places, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_parts(done + 1, second)
    family = psutil.Process(second.pid).children(recursive=True)
    (worker,) = [one for one in family if one.name().startswith("ray::MapWorker")]
    worker.kill()
    told, noise = second.communicate()
    assert second.returncode == 0, noise
    assert "241 pictures, 240 answered" in told and "1 failed, see failed.jsonl (1 UnsupportedMedia)" in told
    assert "by 1 workers: " in told and len(told.splitlines()) == 3
    assert all(line.startswith("detect: ") for line in noise.splitlines()), noise
    rows = ds.dataset(out / "parts").to_table(["picture"]).to_pylist()
    assert sorted(row["picture"] for row in rows) == sorted(files)
    images = json.loads((out / "coco.json").read_text())["images"]
    assert [image["file_name"] for image in images] == sorted(files)
