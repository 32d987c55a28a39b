"""The gateway and the client over TLS, with the certificate of a private authority, before a real TorchServe."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from certificates import Files, write_certificates
from gateway_server import until

from tools.client.client import Client
from tools.client.errors import ServerError
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e
WAYS = ("https", "grpcs")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def urls(
    files: Files, shapes_server: TorchServe, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """What the gateway prints, on ports of its own choice."""
    folder = tmp_path_factory.mktemp("gateway")
    flags = ["--backend", shapes_server.url, "--token-file", str(shapes_server.token_file), "--models", "shapes"]
    flags += ["--no-auth", "--port", "0", "--grpc-port", "0"]
    flags += ["--tls-certificate", str(files.certificate), "--tls-key", str(files.key)]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "gateway", *flags],
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(repository)},
        )
    found: dict[str, str] = {}

    def printed() -> bool:
        text = (folder / "said").read_text()
        assert process.poll() is None, text
        if ports := re.search(
            r"^gRPC  127\.0\.0\.1:([1-9]\d*), TLS\nhttps://127\.0\.0\.1:([1-9]\d*)/docs$", text, re.M
        ):
            found.update(grpcs=f"grpcs://127.0.0.1:{ports[1]}", https=f"https://127.0.0.1:{ports[2]}")
        return bool(found)

    try:
        until(printed, "the gateway prints where it listens")
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def picture(repository: Path) -> bytes:
    return (repository / "archives" / "shapes" / "golden" / "scene.jpg").read_bytes()


def ask(url: str, picture: bytes, **more: Any) -> int:
    with Client(url, "shapes", protocol="kserve", timeout=120, **more) as client:
        return len(client.predict(picture).detections)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_knows_the_authority_is_answered(
    urls: Mapping[str, str], files: Files, picture: bytes, way: str
) -> None:
    assert ask(urls[way], picture, ca=files.authority, retries=20) == 5


@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_does_not_trusts_nobody(urls: Mapping[str, str], files: Files, picture: bytes, way: str) -> None:
    ask(urls[way], picture, ca=files.authority, retries=20)
    with pytest.raises(ServerError, match="--ca"):
        ask(urls[way], picture, retries=0)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_said_without_tls(urls: Mapping[str, str], files: Files, picture: bytes, way: str) -> None:
    ask(urls[way], picture, ca=files.authority, retries=20)
    with pytest.raises(ServerError):
        ask(urls[way].replace("s://", "://"), picture, retries=0)
