"""Files of the gateway in a folder and in a bucket, and the uploads in them."""

import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from tools.errors import ToolError
from tools.gateway import uploads
from tools.gateway.errors import GatewayError
from tools.gateway.storage import Storage, StorageDown
from tools.gateway.uploads import Shelf

PNG = b"\x89PNG\r\n\x1a\nrest"
ANSWER = {
    "model": "m",
    "version": "1",
    "width": 4,
    "height": 3,
    "detections": [{"label": label, "index": 0, "score": 0.5, "box": [0, 0, 1, 1]} for label in ("cat", "dog", "cat")],
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket of a real S3 service on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="pictures")
        yield "s3://pictures/yard"
        server.stop()


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    url = str(tmp_path / "files") if request.param == "folder" else request.getfixturevalue("bucket")
    storage = Storage(url)
    yield storage
    for name in storage.list():
        storage.delete(name)


def test_what_is_put_is_got_listed_and_deleted(storage: Storage) -> None:
    assert storage.get("a/b/one") is None and storage.list("a") == [] and storage.list() == []
    storage.put("a/b/one", b"1")
    storage.put("a/b/two.json", b"2" * 100_000)
    storage.put("a/c/three", b"")
    storage.put("a/b/one", b"again")
    assert storage.get("a/b/one") == b"again" and storage.get("a/b/two.json") == b"2" * 100_000
    assert storage.get("a/c/three") == b""
    assert storage.list() == ["a"] and storage.list("a") == ["b", "c"] and storage.list("a/b") == ["one", "two.json"]
    storage.delete("a/b")
    storage.delete("a/b")
    assert storage.list("a") == ["c"] and storage.get("a/b/one") is None


@given(st.text())
def test_no_name_leads_out(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    check_stays_inside(tmp_path_factory.getbasetemp(), name)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\0b", ".x", "a//b", "a/", "", "A", "x\n"])
def test_no_known_trick_leads_out(tmp_path: Path, name: str) -> None:
    check_stays_inside(tmp_path, name)


def check_stays_inside(folder: Path, name: str) -> None:
    storage = Storage(str(folder / "inside"))
    try:
        path = Path(storage._path(name))
    except ValueError:
        return
    assert path.resolve().is_relative_to((folder / "inside").resolve()) and path != folder / "inside"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.put("a/one", b"old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        storage.put("a/one", b"new")
    with pytest.raises(OSError, match="No space"):
        storage.put("b/one", b"new")
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    assert storage.get("a/one") == b"old" and [path.name for path in (tmp_path / "a").iterdir()] == ["one"]


@pytest.mark.parametrize("url", ["/proc/nothing/here", "nonsense://x", "s3://", "s3:///x"])
def test_storage_that_cannot_be_used_is_one_line(url: str) -> None:
    with pytest.raises(ToolError, match="cannot be used"):
        Storage(url)


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    with pytest.raises(ToolError, match="cannot be used"):
        Storage("s3://no-such-bucket/x")


def test_a_bucket_that_cannot_be_reached_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(bucket)
    monkeypatch.setattr(storage._files, "cat_file", _unreachable)
    with pytest.raises(StorageDown, match="Could not connect"):
        storage.get("a/one")
    monkeypatch.setattr(storage._files, "ls", _unreachable)
    with pytest.raises(ToolError, match="cannot be used: Could not connect"):
        Storage(bucket)


def _unreachable(*_: object, **__: object) -> None:
    raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


def test_an_upload_belongs_to_its_owner(storage: Storage) -> None:
    shelf = Shelf(storage, 60)
    upload = shelf.add("me", PNG, "../../x\0\n.jpg" + "y" * 10_000, ANSWER)
    assert upload.counts == {"cat": 2, "dog": 1} and upload.content_type == "image/png"
    assert upload.filename.startswith("../../x.jpg") and len(upload.filename) == 200
    assert storage.list("uploads/me") == [upload.id]
    assert shelf.get("me", upload.id) == upload and shelf.picture("me", upload.id) == (upload, PNG)
    for ask in (shelf.get, shelf.picture, shelf.delete):
        with pytest.raises(GatewayError) as caught:
            ask("you", upload.id)
        assert caught.value.status == 404
    assert shelf.page("you", "", 10).uploads == []
    shelf.delete("me", upload.id)
    assert storage.list("uploads/me") == [] and shelf.page("me", "", 10).uploads == []


@pytest.mark.parametrize("name", ["../me", "x", "", "a" * 10_000, "0" * 31 + "\0", "G" * 32, "0" * 32])
def test_a_name_that_is_none_of_ours_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(GatewayError) as caught:
        Shelf(Storage(str(tmp_path)), 60).get("me", name)
    assert caught.value.status == 404


def test_pages_go_through_all_uploads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(Storage(str(tmp_path)), 60)
    now = time.time()
    wanted = []
    for index in range(5):
        monkeypatch.setattr(uploads.time, "time", lambda index=index: now + index)
        wanted.append(shelf.add("me", PNG, "", ANSWER).id)
    found, after = [], ""
    while after is not None:
        page = shelf.page("me", after, 2)
        found += [upload.id for upload in page.uploads]
        after = page.next
    assert found == wanted


def test_uploads_expire_with_what_a_crash_left(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(storage, 60)
    old = shelf.add("me", PNG, "", ANSWER).id
    storage.delete(f"uploads/me/{old}/record.json")
    now = time.time()
    monkeypatch.setattr(uploads.time, "time", lambda: now + 50)
    young = shelf.add("me", PNG, "", ANSWER).id
    with pytest.raises(GatewayError):
        shelf.get("me", old)
    monkeypatch.setattr(uploads.time, "time", lambda: now + 70)
    shelf.sweep()
    assert storage.list("uploads/me") == [young]
    monkeypatch.setattr(uploads.time, "time", lambda: now + 111)
    with pytest.raises(GatewayError):
        shelf.get("me", young)
    assert storage.list("uploads/me") == [young]
