"""Which certificates the gateway and the client take; both over TLS stand among the end-to-end tests."""

from pathlib import Path

import pytest
from certificates import Files, write_certificates

from tools.cli import main
from tools.client.client import Client
from tools.errors import ToolError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_certificates(tmp_path_factory.mktemp("certificates"))


def failure(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["gateway", "--backend", "http://127.0.0.1:9", "--models", "m", "--no-auth", *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("flag", ["--tls-certificate", "--tls-key"])
def test_half_of_tls_is_refused(files: Files, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tls_certificate and tls_key go together" in failure(capsys, flag, str(files.key))


@pytest.mark.parametrize("wrong", ["missing", "swapped", "locked", "another"])
def test_what_does_not_fit_is_one_line(
    files: Files, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = {
        "missing": (files.certificate, tmp_path / "none.pem"),
        "swapped": (files.key, files.certificate),
        "locked": (files.certificate, files.locked),
        "another": (files.certificate, write_certificates(tmp_path).key),
    }[wrong]
    line = failure(capsys, "--tls-certificate", str(certificate), "--tls-key", str(key))
    assert line.startswith(f"marina: tls_certificate {certificate} and tls_key {key} cannot be used together (")


@pytest.mark.parametrize("protocol", ["rest", "grpc", "kserve"])
def test_an_authority_that_is_none_is_refused(protocol: str, files: Files, tmp_path: Path) -> None:
    url = "grpcs://127.0.0.1:1" if protocol == "grpc" else "https://127.0.0.1:1"
    (tmp_path / "empty.pem").touch()
    for path in (tmp_path / "none.pem", tmp_path / "empty.pem", files.key):
        with pytest.raises(ToolError, match=f"--ca {path} cannot be used"):
            Client(url, "m", protocol=protocol, ca=path)
    with pytest.raises(ToolError, match="--ca goes with https:// or grpcs://, but the server is http://127"):
        Client("http://127.0.0.1:1", "m", protocol=protocol, ca=files.authority)
