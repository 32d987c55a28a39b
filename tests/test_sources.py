"""Weights from a real S3 server: fetched once, by checksum, or not at all."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from handlers.errors import BadArchive, MarinaError
from tools.archive.sources import fetch

CONTENT = b"weights" * 1000


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    # It keeps connections by bucket, and each test has a server of its own.
    s3fs.S3FileSystem.clear_instance_cache()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="weights")
    client.put_object(Bucket="weights", Key="a.safetensors", Body=CONTENT)
    yield "s3://weights/a.safetensors"
    server.stop()


def test_fetches_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(bucket, digest)
    assert path.read_bytes() == CONTENT
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert fetch(bucket, digest) == path


def test_other_content_is_refused_and_not_kept(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="but the recipe wants"):
        fetch(bucket, "0" * 64)
    assert not list((tmp_path / "cache" / "marina").iterdir())


def test_missing_object_is_one_line(bucket: str) -> None:
    with pytest.raises(MarinaError, match="cannot be fetched"):
        fetch(bucket + ".nowhere", "0" * 64)
