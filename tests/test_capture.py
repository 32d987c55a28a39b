"""Which pictures are kept while serving, what is stored of them, and that nothing of it reaches a request."""

import base64
import http.server
import io
import itertools
import json
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import store_places
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from model_folder import LABELS, assert_one_line, encode, oriented, scene
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from handlers import capture as capture_module
from handlers import capture_budget, capture_store
from handlers.capture import QUEUE_PICTURES, RARE_AFTER, Budget, Interest, Pace, Queue, Reason
from handlers.capture_budget import ALIKE, HOUR_S, Memory
from handlers.capture_picture import head, look, prepared, without_metadata
from handlers.capture_store import Bucket, Folder, Keys, StoreError, new_id, open_store, signed, write_item
from handlers.errors import BadSettings
from handlers.image import decode
from handlers.metrics import CAPTURED
from handlers.settings import Blur, Capture, Keep, Limits, parse_settings
from handlers.worker import Worker
from tools.archive.build import check_recipe
from tools.archive.recipe import load_recipe

PATIENCE_S = 60
LIMITS = Limits()
PICTURE = encode(scene(240, 320), "JPEG")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def wait_for(found, wanted=True):
    deadline = time.monotonic() + PATIENCE_S
    while (seen := found()) != wanted:
        assert time.monotonic() < deadline, f"{seen}, not {wanted}"
        time.sleep(0.01)


# --- The recipe


RECIPE = {"to": "/srv/kept", "keep": {"near_threshold": 0.1, "classes": ["star"], "empty": True}, "days": 7}


def recipe_of(repository: Path, folder: Path, section: object):
    for item in (repository / "archives" / "shapes").iterdir():
        (folder / item.name).symlink_to(item)
    content = yaml.safe_load((folder / "archive.yaml").read_text()) | {"capture": section}
    (folder / "archive.yaml").unlink()
    (folder / "archive.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(folder)
    check_recipe(recipe)
    return recipe


def test_a_recipe_says_what_is_kept(repository: Path, tmp_path: Path) -> None:
    found = recipe_of(repository, tmp_path, RECIPE).capture
    keep = Keep(near_threshold=0.1, classes=("star",), empty=True)
    assert found == Capture(keep, "/srv/kept", per_hour=100, per_class_per_hour=20, days=7, blur=Blur())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"capture\.keep: missing"),
        ({"keep": {}}, "nothing is kept; give near_threshold, classes, rare, empty or random"),
        ({"keep": {"empty": True, "dogs": 1}}, r"capture\.keep\.dogs: unknown key; known here: near_threshold, "),
        ({"keep": {"random": 1.5}}, r"random is 1\.5, outside of 0 to 1"),
        ({"keep": {"empty": True}, "per_hour": 0}, "per_hour is 0, outside of 1 to"),
        ({"keep": {"empty": True}, "days": 0}, "days is 0, outside of 1 to"),
        ({"keep": {"empty": True}, "to": "kept"}, "to is 'kept', neither an absolute folder nor s3://bucket/prefix"),
        ({"keep": {"empty": True}, "to": "s3://"}, "to is 's3://', neither an absolute folder nor"),
        ({"keep": {"classes": ["dog"]}}, r"capture\.keep\.classes has 'dog', which is no class of this model; it know"),
        ({"keep": {"empty": True}, "blur": {"classes": ["face"]}}, r"capture\.blur\.classes has 'face'"),
        ({"keep": {"empty": True}, "blur": {"heads_of": ["person"]}}, r"capture\.blur\.heads_of has 'person'"),
    ],
)
def test_a_wrong_section_is_one_line_at_build(repository: Path, tmp_path: Path, section, message: str) -> None:
    with pytest.raises(BadSettings, match=message) as caught:
        recipe_of(repository, tmp_path, section)
    assert_one_line(caught.value)


# --- Why


def reasons_of(keep: Keep, labels: list[int], scores: list[float], **more) -> list[str]:
    return [reason.text for reason in Interest(keep, 0.25, LABELS, **more).reasons(labels, scores)]


def test_reasons() -> None:
    near = Keep(near_threshold=0.1)
    assert reasons_of(near, [0, 1], [0.9, 0.36]) == []
    assert reasons_of(near, [], []) == []
    assert reasons_of(near, [0, 1, 1], [0.9, 0.35, 0.3]) == ["near-threshold"]
    wanted = Keep(classes=("dog", "traffic light"))
    assert reasons_of(wanted, [0, 3], [0.9, 0.3]) == []
    assert reasons_of(wanted, [4, 1, 1], [0.9, 0.3, 0.8]) == ["class:dog", "class:traffic light"]
    empty = Keep(empty=True)
    assert reasons_of(empty, [], []) == ["empty"]
    assert reasons_of(empty, [0], [0.9]) == []
    for chance, expected in ((0.19, ["random"]), (0.2, [])):
        assert reasons_of(Keep(random=0.2), [0], [0.9], chance=lambda chance=chance: chance) == expected
    assert reasons_of(Keep(0.1, ("dog",), random=1), [1], [0.3]) == ["near-threshold", "class:dog", "random"]


def test_a_class_is_rare_by_what_was_seen_before() -> None:
    interest = Interest(Keep(rare=0.05), 0.25, LABELS)
    # At first everything would be.
    assert not any(interest.reasons([0, 0], [0.9, 0.9]) for _ in range(RARE_AFTER))
    found = [bool(interest.reasons([0, 1], [0.9, 0.9])) for _ in range(10)]
    # Five in a hundred, then no more.
    assert found == [True] * 6 + [False] * 4
    assert interest.reasons([3], [0.9]) == [Reason("class:person", 3)]


# --- How many


@given(st.integers(1, 5), st.lists(st.floats(0, 3 * HOUR_S), max_size=40))
def test_no_hour_has_more_than_the_budget(most: int, times: list[float]) -> None:
    budget = Budget(Capture(Keep(empty=True), per_hour=2 * most), workers=2)
    kept = []
    for now in sorted(times):
        if budget.allowed([Reason("empty")], now):
            budget.take([Reason("empty")], now)
            kept.append(now)
        else:
            assert sum(now - HOUR_S < other for other in kept) >= most
    for begin in kept:
        assert sum(begin <= other < begin + HOUR_S for other in kept) <= most


def test_a_class_does_not_use_up_the_budget_of_others() -> None:
    budget = Budget(Capture(Keep(empty=True), per_hour=4, per_class_per_hour=2), workers=1)
    cat, dog, chance = Reason("class:cat", 0), Reason("near-threshold", 1), Reason("random")
    for _ in range(2):
        assert budget.allowed([cat], 0) == [cat]
        budget.take([cat], 0)
    assert budget.allowed([cat], 1) == []
    assert budget.allowed([cat, dog, chance], 1) == [dog, chance]
    budget.take([dog, chance], 1)
    budget.take([chance], 1)
    assert budget.allowed([dog, chance], 2) == []
    assert budget.allowed([cat, dog], HOUR_S) == [cat, dog]


def test_more_workers_than_pictures_an_hour_keep_one_each() -> None:
    budget = Budget(Capture(Keep(empty=True), per_hour=1, per_class_per_hour=1), workers=8)
    assert budget.allowed([Reason("class:cat", 0)], 0)


def sighting(body: bytes = PICTURE) -> capture_module.Sighting:
    return capture_module.Sighting(0.0, body, 240, 320, None, [Reason("empty")], None, None)


def test_the_queue_is_bounded_by_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    puts = [queue.put(sighting(bytes([index]))) for index in range(QUEUE_PICTURES + 3)]
    assert puts == [True] * QUEUE_PICTURES + [False] * 3
    assert [queue.get(0).body[0] for _ in range(QUEUE_PICTURES)] == [*range(QUEUE_PICTURES)]
    assert queue.get(0) is None
    monkeypatch.setattr(capture_module, "QUEUE_BYTES", 10)
    assert [queue.put(sighting(bytes(size))) for size in (6, 5, 4, 11)] == [True, False, True, False]
    queue.get(0)
    assert queue.put(sighting(bytes(6)))


@given(st.lists(st.floats(0.001, 0.2), min_size=50, max_size=60))
def test_the_thread_takes_a_hundredth_of_a_core(used: list[float]) -> None:
    pace, now, first = Pace(), 1000.0, 1000.0
    for seconds in used:
        now += seconds
        now += pace.pause(seconds, now)
    assert sum(used) <= capture_module.SHARE * (now - first) + capture_module.AT_ONCE_S + 0.01
    # After a pause, a few pictures are taken at once.
    assert pace.pause(0.1, now + 3600) == 0


# --- What is like what


def test_pictures_that_look_alike() -> None:
    pixels = scene(480, 640)
    first = look(encode(pixels, "JPEG"), LIMITS)
    again = [
        encode(pixels, "JPEG", quality=40),
        encode(pixels, "PNG"),
        encode(Image.fromarray(pixels).resize((320, 240)), "JPEG"),
        encode(np.clip(pixels.astype(int) + 8, 0, 255).astype(np.uint8), "WEBP"),
    ]
    for body in again:
        assert (first ^ look(body, LIMITS)).bit_count() <= ALIKE
    others = [look(encode(scene(480, 640, seed), "JPEG"), LIMITS) for seed in range(1, 20)]
    for one, other in itertools.combinations([first, *others], 2):
        assert (one ^ other).bit_count() > ALIKE


def test_of_a_fixed_camera_other_classes_are_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_budget, "REMEMBERED", 2)
    memory = Memory()
    memory.add(0b1111, frozenset({1}))
    assert memory.has_like(0b0000, frozenset({1}))
    assert not memory.has_like(0b11111 << 4 | 0b1111, frozenset({1}))
    assert not memory.has_like(0b1111, frozenset({1, 2}))
    memory.add(1 << 40, frozenset())
    memory.add(1 << 50, frozenset())
    assert not memory.has_like(0b1111, frozenset({1}))


# --- What is stored of a picture


GPS, XMP = 0x8825, b'<x:xmpmeta xmlns:x="adobe:ns:meta/">secret place</x:xmpmeta>'


def with_metadata(pixels: np.ndarray, orientation: int, **options) -> bytes:
    lying = Image.open(io.BytesIO(oriented(pixels, orientation)))
    exif = lying.getexif()
    exif[0x010F] = "secret camera"
    exif.get_ifd(GPS)[2] = (52.0, 31.0, 0.0)
    return encode(lying, "JPEG", exif=exif, comment=b"secret comment", xmp=XMP, **options) + b"secret trailer"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 90}], ids=["baseline", "progressive"])
def test_a_jpeg_keeps_its_pixels_and_loses_its_metadata(orientation: int, options: dict) -> None:
    pixels = scene(60, 90)
    body = with_metadata(pixels, orientation, **options)
    assert b"secret" in body
    kept, suffix = prepared(body, LIMITS, [])
    assert suffix == ".jpg"
    assert b"secret" not in kept
    exif = Image.open(io.BytesIO(kept)).getexif()
    assert dict(exif) == ({} if orientation == 1 else {0x0112: orientation})
    np.testing.assert_array_equal(decode(kept, LIMITS), decode(body, LIMITS))
    assert without_metadata(kept) == kept


def test_what_tells_the_colours_of_a_jpeg_stays() -> None:
    image = Image.fromarray(scene(60, 90))
    body = encode(image.convert("CMYK"), "JPEG", icc_profile=b"profile" * 10000)
    kept = without_metadata(body)
    assert b"Adobe" in kept and kept.count(b"ICC_PROFILE") == 2
    np.testing.assert_array_equal(decode(kept, LIMITS), decode(body, LIMITS))


@given(st.lists(st.tuples(st.integers(2, 600), st.integers(0, 255)), min_size=1, max_size=4), st.integers(100, 3000))
def test_a_damaged_jpeg_is_refused_or_looks_as_before(changes: list[tuple[int, int]], cut: int) -> None:
    body = bytearray(with_metadata(scene(40, 50), 6)[:cut])
    for place, value in changes:
        body[place % len(body)] = value
    try:
        before = decode(bytes(body), LIMITS)
    except Exception:
        return
    try:
        kept = without_metadata(bytes(body))
    except ValueError:
        kept, _ = prepared(bytes(body), LIMITS, [])
        assert decode(kept, LIMITS).shape == before.shape
        return
    assert decode(kept, LIMITS).shape == before.shape


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_what_is_no_jpeg_becomes_a_plain_png(form: str) -> None:
    pixels = scene(60, 90)
    options = {}
    if form in ("PNG", "WEBP", "TIFF"):
        exif = Image.open(io.BytesIO(oriented(pixels, 6))).getexif()
        exif[0x010F] = "secret camera"
        options = {"exif": exif}
    if form == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Author", "secret person")
    body = encode(pixels, form, **options)
    kept, suffix = prepared(body, LIMITS, [])
    assert suffix == ".png" and kept.startswith(b"\x89PNG")
    assert b"secret" not in kept and b"eXIf" not in kept
    np.testing.assert_array_equal(decode(kept, LIMITS), decode(body, LIMITS))


def test_a_blurred_box_holds_a_few_colours_and_the_rest_is_as_before() -> None:
    noise = np.random.default_rng(0).integers(256, size=(200, 300, 3), dtype=np.uint8)
    kept, _ = prepared(encode(noise), LIMITS, [(100, 50, 160, 130), (290, 190, 900, 900), (10.2, 10.2, 13.7, 13.7)])
    after = decode(kept, LIMITS)
    assert len(np.unique(after[50:130, 100:160].reshape(-1, 3), axis=0)) <= 16
    assert len(np.unique(after[190:, 290:].reshape(-1, 3), axis=0)) <= 16
    assert len(np.unique(after[10:14, 10:14].reshape(-1, 3), axis=0)) == 1
    changed = (after != noise).any(axis=2)
    changed[42:139, 94:167] = False
    changed[100:, 200:] = False
    changed[9:16, 9:16] = False
    assert not changed.any()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_blurred_jpeg_lies_upright_as_its_boxes_do(orientation: int) -> None:
    pixels = np.full((120, 200, 3), 90, dtype=np.uint8)
    pixels[20:60, 130:180:2] = 255
    body = oriented(pixels, orientation, "JPEG")
    kept, suffix = prepared(body, LIMITS, [(130, 20, 180, 60)])
    image = Image.open(io.BytesIO(kept))
    assert (suffix, image.format, image.size, dict(image.getexif())) == (".jpg", "JPEG", (200, 120), {})
    after = np.asarray(image).astype(int)
    stripes = np.abs(np.diff(after[24:56, 134:176, 0], axis=1))
    assert stripes.max() < 60 and after[24:56, 134:176].mean() > 140
    assert np.abs(after[80:, :] - 90).max() < 6


def test_the_head_is_in_the_upper_part() -> None:
    assert head((10, 20, 40, 140)) == (10, 20, 40, 60)  # standing: a third
    assert head((10, 20, 70, 120)) == (10, 20, 70, 80)  # sitting: a square
    assert head((10, 20, 110, 50)) == (10, 20, 110, 50)  # lying: all


# --- Places


def test_an_id_is_of_version_7_and_in_the_order_of_time() -> None:
    ids = [new_id(1_700_000_000.0 + index / 1000) for index in range(200)]
    assert ids == sorted(ids) and len(set(ids)) == 200
    assert {(found[14], found[19] in "89ab") for found in ids} == {("7", True)}
    assert int(ids[0].replace("-", "")[:12], 16) == 1_700_000_000_000


def test_a_folder_gets_the_picture_first_and_nothing_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "a" / "kept"))
    written = []
    put = Folder.put
    monkeypatch.setattr(Folder, "put", lambda self, name, content: (written.append(name), put(self, name, content)))
    item = write_item(store, 1_700_000_000.5, b"picture", ".jpg", {"reasons": ["empty"]})
    day = tmp_path / "a" / "kept" / "2023-11-14"
    assert written == [f"2023-11-14/{item}.jpg", f"2023-11-14/{item}.json"]
    assert sorted(path.name for path in day.iterdir()) == [f"{item}.jpg", f"{item}.json"]
    assert (day / f"{item}.jpg").read_bytes() == b"picture"
    assert json.loads((day / f"{item}.json").read_text()) == {
        "id": item, "time": "2023-11-14T22:13:20.500+00:00", "image": f"{item}.jpg", "reasons": ["empty"]
    }  # fmt: skip
    assert {stat.S_IMODE(path.stat().st_mode) for path in day.iterdir()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (day, day.parent)} == {0o700}
    # A disk that is full when all but the last step is done.
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left on device"):
        write_item(store, 1_700_000_001, b"picture", ".jpg", {})
    assert len([*day.iterdir()]) == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file") as caught:
        write_item(open_store(str(tmp_path / "file" / "kept")), 0, b"", ".jpg", {})
    assert_one_line(caught.value)


def test_only_our_own_old_items_are_removed(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    old = write_item(store, 1_700_000_000, b"old", ".jpg", {})
    new = write_item(store, 1_700_100_000, b"new", ".png", {})
    (tmp_path / "2023-11-14" / f".{old}.jpg.part").write_text("")
    for foreign in ("2023-11-14/notes.txt", "2022-01-01/keep.jpg", "other/x.jpg", "2023-1-1.txt"):
        (tmp_path / foreign).parent.mkdir(exist_ok=True)
        (tmp_path / foreign).write_text("")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / f"{old}.jpg").write_text("")
    (tmp_path / "2021-01-01").symlink_to(outside)
    write_item(store, 1_600_000_000, b"oldest", ".jpg", {})
    store.expire("2023-11-15")
    left = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    foreign = ["2021-01-01", "2022-01-01/keep.jpg", "2023-1-1.txt", "2023-11-14/notes.txt", "other/x.jpg"]
    assert sorted(left) == sorted([*foreign, *(f"2023-11-16/{new}{suffix}" for suffix in (".json", ".png"))])
    assert (outside / f"{old}.jpg").exists()
    assert not (tmp_path / "2020-09-13").exists()
    Folder(tmp_path / "not there yet").expire("2023-11-15")


def test_the_signature_of_the_documentation() -> None:
    """Amazon S3 API Reference, "Authenticating Requests: Using the Authorization Header", example PUT Object."""
    keys = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", None)
    headers = {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"}
    url = "https://examplebucket.s3.amazonaws.com/test%24file.text"
    moment = datetime(2013, 5, 24, tzinfo=UTC)
    found = signed("PUT", url, headers, b"Welcome to Amazon S3.", keys, "us-east-1", moment)
    assert found["Authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class, "
        "Signature=98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
    )
    with_token = signed("PUT", url, headers, b"", keys._replace(token="t"), "us-east-1", moment)
    assert with_token["x-amz-security-token"] == "t"
    assert "x-amz-date;x-amz-security-token;x-amz" in with_token["Authorization"]


def test_a_bucket(tmp_path: Path) -> None:
    with store_places.moto() as endpoint:
        client = store_places.client(endpoint)
        client.create_bucket(Bucket=store_places.BUCKET)
        environment = store_places.credentials(endpoint) | {"AWS_SESSION_TOKEN": "token"}
        store = Bucket(f"s3://{store_places.BUCKET}/über cameras/a+b/", environment)
        item = write_item(store, 1_700_000_000, b"picture", ".png", {"blurred": False})
        prefix = f"über cameras/a+b/2023-11-14/{item}"
        found = client.get_object(Bucket=store_places.BUCKET, Key=f"{prefix}.png")
        assert (found["Body"].read(), found["ContentType"]) == (b"picture", "image/png")
        record = client.get_object(Bucket=store_places.BUCKET, Key=f"{prefix}.json")["Body"].read()
        assert json.loads(record)["image"] == f"{item}.png"
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/.*: the server says 404 NoSuchBucket"):
            write_item(Bucket("s3://no-such-bucket", environment), 0, b"", ".jpg", {})


@pytest.mark.skipif(store_places.rclone() is None, reason="RCLONE MISSING: no signature is checked by a real server")
def test_a_server_that_checks_signatures(tmp_path: Path) -> None:
    (tmp_path / store_places.BUCKET).mkdir()
    with store_places.rclone_server(tmp_path) as endpoint:
        to = f"s3://{store_places.BUCKET}/köln (1)/$x"
        item = write_item(Bucket(to, store_places.credentials(endpoint)), 1_700_000_000, b"picture", ".jpg", {})
        day = tmp_path / store_places.BUCKET / "köln (1)" / "$x" / "2023-11-14"
        assert sorted(path.name for path in day.iterdir()) == [f"{item}.jpg", f"{item}.json"]
        assert (day / f"{item}.jpg").read_bytes() == b"picture"
        with pytest.raises(StoreError, match="403 SignatureDoesNotMatch") as caught:
            write_item(Bucket(to, store_places.credentials(endpoint, "sesame")), 0, b"", ".jpg", {})
        assert "sesame" not in str(caught.value)


@contextmanager
def server_that_says(*answers: int) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that answers so, one after the other; and what it was asked."""
    asked: list[str] = []
    left = iter(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            self.send_response(next(left))
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_tries_again_where_that_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_store, "_WAITS_S", (0, 0))
    for answers, tries, problem in (
        ((503, 200), 2, None),
        ((500, 429, 503), 3, "503"),
        ((403,), 1, "403"),
        ((307,), 1, "307"),
    ):
        with server_that_says(*answers) as (endpoint, asked):
            bucket = Bucket("s3://bucket", store_places.credentials(endpoint))
            if problem:
                with pytest.raises(StoreError, match=f"s3://bucket/d/a.jpg: the server says {problem}"):
                    bucket.put("d/a.jpg", b"x")
            else:
                bucket.put("d/a.jpg", b"x")
            assert asked == ["/bucket/d/a.jpg"] * tries


@contextmanager
def server_that_hangs() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_store, "_WAITS_S", (0,))
    monkeypatch.setattr(capture_store, "_TIMEOUT_S", 0.1)
    with server_that_hangs() as endpoint:
        bucket = Bucket("s3://bucket", store_places.credentials(endpoint))
        with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:\d+ cannot be reached \(timed out\)"):
            bucket.put("a.jpg", b"x")
    with pytest.raises(StoreError, match="cannot be reached"):
        bucket.put("a.jpg", b"x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": ""}, "AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is not set"),
        ({"AWS_ENDPOINT_URL_S3": "file:///etc"}, "AWS_ENDPOINT_URL is 'file:///etc', no http:// or https:// address"),
    ],
)
def test_an_environment_that_lacks_something_is_one_line(change: dict[str, str], message: str) -> None:
    bucket = Bucket("s3://bucket", store_places.credentials("http://127.0.0.1:1") | change)
    with pytest.raises(StoreError, match=message):
        bucket.put("a.jpg", b"x")


# --- A worker


Answers = list[tuple[int, dict]]


def start(small_model, monkeypatch: pytest.MonkeyPatch, to: Path | str, keep: dict, **section) -> Worker:
    folder, config = small_model
    capture = {"to": str(to), "keep": keep} | section
    handler = config["handler"] | {"response": {"format": "detections"}, "capture": capture}
    monkeypatch.delenv("MARINA_CAPTURE_TO", raising=False)
    return Worker(folder, config | {"maxWorkers": 1, "handler": handler}, "small")


def ask(worker: Worker, *requests: tuple[object, dict[str, str]]) -> list[tuple[int, dict]]:
    jobs = [worker.read({"body": body}, headers) for body, headers in requests]
    worker.infer(jobs)
    return [(answer.status, json.loads(answer.body)) for answer in worker.respond(jobs)]


class Outcomes:
    """What has become of the pictures so far."""

    def __init__(self, worker: Worker):
        self._figures = worker.figures
        self._found: Counter[str] = Counter()

    def __call__(self) -> dict[str, float]:
        for counter, amount, of in self._figures.take():
            if counter == "marina_capture":
                self._found[of[-1]] += amount
        return {outcome: count for outcome, count in self._found.items() if count}


def items(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def pictures(count: int) -> list[bytes]:
    return [encode(scene(240, 320, seed), "JPEG") for seed in range(count)]


def test_an_item_is_the_picture_and_what_was_found(small_model, monkeypatch, tmp_path: Path) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"near_threshold": 0.9, "classes": ["person"]})
    worker.pipeline.checksum = "sum"
    (_, answer), *_ = ask(worker, (bytearray(PICTURE), {}))
    outcomes = Outcomes(worker)
    wait_for(outcomes, {"stored": 1})
    (item,) = items(tmp_path)
    moment = datetime.fromisoformat(item["time"])
    assert abs((datetime.now(UTC) - moment).total_seconds()) < PATIENCE_S
    assert item == {
        "id": item["id"],
        "time": item["time"],
        "image": f"{item['id']}.jpg",
        "model": "small",
        "version": "1.0",
        "checksum": "sum",
        "reasons": ["near-threshold", "class:person"],
        "width": 320,
        "height": 240,
        "detections": answer["detections"],
        "score_threshold": 0.25,
        "blurred": False,
    }
    assert len(item["detections"]) == 300
    stored = (tmp_path / f"{moment:%Y-%m-%d}" / item["image"]).read_bytes()
    np.testing.assert_array_equal(decode(stored, LIMITS), decode(PICTURE, LIMITS))
    assert any(thread.name == "capture" and thread.daemon for thread in threading.enumerate())


def test_pictures_come_in_every_form_and_what_is_none_does_not(small_model, monkeypatch, tmp_path: Path) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"random": 1.0, "empty": True})
    raw, text, beside_bad, *instances = pictures(6)
    b64 = [base64.b64encode(body).decode() for body in (text, *instances)]
    tensor = np.zeros((3, 64, 64), dtype=np.float32).tobytes()
    as_tensor = {"content-type": "application/vnd.marina.tensor", "marina-shape": "3,64,64"}
    one_bad = {"instances": [{"b64": base64.b64encode(body).decode()} for body in (beside_bad, b"no picture")]}
    # What is not to be kept comes first, or it might come too late to be seen here.
    worker.infer(jobs := [worker.read({"body": tensor}, as_tensor)])
    assert worker.respond(jobs)[0].status == 200
    found = ask(
        worker,
        (one_bad, {}),
        (raw[:500], {}),
        (b"text", {}),
        (raw, {"marina-format": "?"}),
        (raw, {}),
        (b64[0], {}),
        ({"instances": [{"b64": each} for each in b64[1:]]}, {}),
    )
    assert [status for status, _ in found] == [415, 400, 415, 400, 200, 200, 200]
    outcomes = Outcomes(worker)
    wait_for(outcomes, {"stored": 5})
    kept = {(tmp_path / item["time"][:10] / item["image"]).read_bytes() for item in items(tmp_path)}
    assert kept == {without_metadata(body) for body in (raw, text, *instances)}


def test_only_what_is_answered_as_the_archive_says_is_kept(small_model, monkeypatch, tmp_path: Path) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"random": 1.0})
    asked = [
        {"marina-classes": "cat"},
        {"marina-score-threshold": "0.001"},
        {"marina-iou-threshold": "0.6"},
        {"marina-class-agnostic": "true"},
        {"marina-max-detections": "3"},
        {"marina-format": "coco"},
    ]
    golden, *others = pictures(8)
    worker.pipeline.golden = (golden,)
    ask(worker, (golden, {}), *zip(others, asked, strict=False))
    _, answer = ask(worker, (others[-1], {}))[0]
    outcomes = Outcomes(worker)
    wait_for(outcomes, {"stored": 2})
    *_, last = items(tmp_path)
    assert last["detections"] == answer["detections"]


def test_duplicates_and_budgets(small_model, monkeypatch, tmp_path: Path) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"classes": ["cat"], "random": 1.0}, per_hour=3)
    first, second, *others = pictures(5)
    again = encode(Image.open(io.BytesIO(first)), "JPEG", quality=60)
    for body in (first, first, again, second, *others):
        ask(worker, (body, {}))
    outcomes = Outcomes(worker)
    # The picture of another quality has other detections, and maybe of other classes.
    wait_for(lambda: sum(outcomes().values()), 7)
    found = outcomes()
    assert found["stored"] == 3 and found["duplicate"] >= 1 and found["budget"] >= 1
    assert set(found) == {"stored", "duplicate", "budget"}
    assert len(items(tmp_path)) == 3


def test_answers_are_the_same_to_the_bit_and_what_is_below_the_threshold_is_blurred(
    small_model, monkeypatch, tmp_path: Path
) -> None:
    folder, config = small_model
    own = config["handler"] | {"response": {"format": "detections"}, "postprocess": {"score_threshold": 1}}
    plain = Worker(folder, config | {"handler": own}, "small")
    blur = {"classes": ["salt, pepper"], "heads_of": ["dog"]}
    worker = start((folder, config | {"handler": own}), monkeypatch, tmp_path, {"random": 1.0}, blur=blur)
    noise = np.random.default_rng(0).integers(-20, 20, size=(240, 320, 3))
    noisy = [np.clip(scene(240, 320, seed) + noise, 0, 255).astype(np.uint8) for seed in range(3)]
    bodies = [encode(pixels) for pixels in noisy]
    requests = list(zip(bodies, [{}, {"marina-score-threshold": "0.1"}, {}], strict=True))
    with_it, without = ([ask(one, request)[0] for request in requests] for one in (worker, plain))
    for (_, one), (_, other) in zip(with_it, without, strict=True):
        assert {key: one[key] for key in one if key != "timing_ms"} == {
            key: other[key] for key in other if key != "timing_ms"
        }
    outcomes = Outcomes(worker)
    wait_for(outcomes, {"stored": 2})
    *_, last = items(tmp_path)
    assert (last["detections"], last["blurred"]) == ([], True)
    stored = decode((tmp_path / last["time"][:10] / last["image"]).read_bytes(), LIMITS)
    # All that the model finds at all, far below what is answered.
    seen = worker.pipeline.detect([bodies[2]], replace(worker.pipeline.defaults, score_threshold=0.25))[0]
    found = [box for box, label in zip(seen.boxes.tolist(), seen.labels.tolist(), strict=True) if label == 2]
    large = [(x1, y1, x2, y2) for x1, y1, x2, y2 in found if (x2 - x1) * (y2 - y1) > 100]
    assert large
    for x1, y1, x2, y2 in large:
        same = (stored == noisy[2]).all(axis=2)[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1]
        assert same.mean() < 0.1


def test_what_cannot_be_blurred_is_not_stored(small_model, monkeypatch, tmp_path: Path, caplog) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"random": 1.0}, blur={"classes": ["person"]})
    monkeypatch.setattr(capture_module, "unletterbox", lambda *_: 1 / 0)
    outcomes = Outcomes(worker)
    for body in pictures(2):
        assert ask(worker, (body, {}))[0][0] == 200
    wait_for(outcomes, {"failed": 2})
    assert not [*tmp_path.rglob("*.*")]
    # Once, not once a picture.
    assert caplog.text.count("a picture could not be kept: division by zero") == 1


def test_a_store_that_hangs_for_ever_costs_no_answer(small_model, monkeypatch, tmp_path: Path) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"random": 1.0})
    never = threading.Event()
    monkeypatch.setattr(Folder, "put", lambda *_: never.wait())
    outcomes = Outcomes(worker)
    monkeypatch.setattr(capture_module, "QUEUE_PICTURES", 4)
    first, *others = (encode(scene(32, 32, seed), "JPEG") for seed in range(10))
    assert ask(worker, (first, {}))[0][0] == 200
    wait_for(lambda: len(worker.capture._queue._waiting), 0)
    assert {status for body in others for status, _ in ask(worker, (body, {}))} == {200}
    assert outcomes() == {"queue_full": 5}
    assert len(worker.capture._queue._waiting) == 4
    never.set()


def test_no_failure_of_it_reaches_a_request(small_model, monkeypatch, tmp_path: Path, caplog) -> None:
    worker = start(small_model, monkeypatch, tmp_path, {"random": 1.0})
    monkeypatch.setattr(worker.capture, "_interest", None)
    assert ask(worker, (PICTURE, {}))[0][0] == 200
    assert "a batch is missing from the pictures kept" in caplog.text


def test_old_pictures_go_while_the_worker_runs(small_model, monkeypatch, tmp_path: Path) -> None:
    write_item(Folder(tmp_path), 1_700_000_000, b"old", ".jpg", {})
    start(small_model, monkeypatch, tmp_path, {"random": 1.0})
    wait_for(lambda: [*tmp_path.iterdir()], [])


def test_the_server_decides_where(small_model, monkeypatch, tmp_path: Path) -> None:
    folder, config = small_model
    handler = config["handler"] | {"capture": {"to": str(tmp_path / "recipe"), "keep": {"random": 1.0}}}
    config = config | {"maxWorkers": 1, "handler": handler}
    monkeypatch.setenv("MARINA_CAPTURE_TO", str(tmp_path / "server"))
    worker = Worker(folder, config, "small")
    ask(worker, (PICTURE, {"marina-capture-to": str(tmp_path / "client")}), (PICTURE, {}))
    wait_for(lambda: sum(Outcomes(worker)().values()), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["server"]
    monkeypatch.setenv("MARINA_CAPTURE_TO", "off")
    off = Worker(folder, config, "small")
    assert off.capture is None and off.pipeline.keep_above is None
    monkeypatch.setenv("MARINA_CAPTURE_TO", "kept")
    with pytest.raises(BadSettings, match="MARINA_CAPTURE_TO: to is 'kept', neither an absolute folder nor") as caught:
        Worker(folder, config, "small")
    assert_one_line(caught.value)
    monkeypatch.delenv("MARINA_CAPTURE_TO")
    handler["capture"] = {"keep": {"random": 1.0}, "to": None}
    assert Worker(folder, config, "small").capture is None


def test_an_archive_with_a_class_that_it_does_not_know_does_not_load(small_model, monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"capture\.keep\.classes has 'cow', which is no class of this model; it kno"):
        start(small_model, monkeypatch, tmp_path, {"classes": ["cow"]})


def test_a_section_is_checked_when_it_is_loaded(small_model) -> None:
    _, config = small_model
    with pytest.raises(BadSettings, match=r"handler\.capture: per_hour is 0, outside of 1 to"):
        parse_settings(config["handler"] | {"capture": {"keep": {"empty": True}, "per_hour": 0}})


def test_without_the_section_nothing_is_kept(small_pipeline) -> None:
    (item,) = small_pipeline.read({"body": PICTURE}, {}).items
    assert item.body is None
    assert set(CAPTURED) == {"stored", "duplicate", "budget", "queue_full", "failed"}
