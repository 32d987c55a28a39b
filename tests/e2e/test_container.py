"""The serving image, built and run by a real container engine: the one that runs, or a private one."""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tiny_archive import FAILS_TO_LOAD, write_archive

from tools.container.__main__ import main
from tools.container.bake import bake
from tools.container.engine import Engine, NoEngine, any_engine
from tools.container.smoke import LOOPBACK_ALONE, Container, build_image, run_image, size_of, smoke

# Where there is no engine yet, the first test waits for Debian, for the packages and for 5 GB of image.
pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

TAG = "marina/serve:tests"
BAKED = "marina/serve:tests-baked"
# What the image may weigh beyond torch and its CUDA wheels.
LIMIT_MB = 350
JPEG = {"Content-Type": "image/jpeg"}
BRIDGE = Path("/sys/class/net/docker0")

# Seen from inside: TCP sockets that listen on an address other than loopback, capabilities, what can be written.
LOOK_AROUND = """
import importlib.util, json, os, shutil
from pathlib import Path

def writable(path):
    try:
        Path(path, "probe").write_text("")
        return True
    except OSError:
        return False

def listening(table):
    rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
    local = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[1].split(":")[0] not in local]

runtime = Path("/tmp/torchserve")
print(json.dumps({
    "user": os.getuid(),
    "capabilities": [line.split()[1] for line in Path("/proc/1/status").read_text().splitlines() if "CapEff" in line],
    "command": Path("/proc/1/cmdline").read_text().split(chr(0))[:-1],
    "writable": [path for path in ("/", "/opt/torchserve", "/models", "/home", "/var/tmp") if writable(path)],
    "listening": listening("/proc/net/tcp") + listening("/proc/net/tcp6"),
    "modes": [oct(path.stat().st_mode & 0o777) for path in (runtime, runtime / "key_file.json")],
    "modules": [name for name in ("handlers", "model_defs", "tools", "marina", "safetensors", "pip")
                if importlib.util.find_spec(name)],
    "commands": [name for name in ("uv", "pip", "gcc", "curl", "javac") if shutil.which(name)],
    "secrets": os.path.exists("/run/secrets/ca_bundle"),
}))
"""


# Says that it was asked, and answers when it may, where the request says so.
GATED = """
import os
import time


def handle(data, context):
    if data is None:
        return None
    if any(bytes(row["body"]) == b"wait" for row in data):
        open("/tmp/asked", "w").close()
        while not os.path.exists("/tmp/go"):
            time.sleep(0.05)
    return [b"[]" for _ in data]
"""

# Leaves a grandchild behind, and looks what has become of it once it has ended.
LEAVE_AN_ORPHAN = """
import json, os, time
from pathlib import Path
reading, writing = os.pipe()
if not os.fork():
    if not os.fork():
        time.sleep(0.2)
        os.write(writing, f"{os.getpid()} {os.getppid()}".encode())
    os._exit(0)
os.wait()
orphan, parent = os.read(reading, 99).split()
deadline = time.monotonic() + 30
while Path("/proc", orphan.decode()).exists() and time.monotonic() < deadline:
    time.sleep(0.05)
zombies = [path.parent.name for path in Path("/proc").glob("[0-9]*/stat") if ") Z " in path.read_text()]
print(json.dumps({"parent": int(parent), "zombies": zombies}))
"""

KILL_THE_JVM = """
import os
from pathlib import Path
for path in Path("/proc").glob("[0-9]*/cmdline"):
    if path.read_bytes().startswith(b"/opt/java/bin/java"):
        os.kill(int(path.parent.name), 9)
"""


def mounts_of_engines() -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if "marina-engine-" in line]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    bridge_was_there = BRIDGE.exists()
    try:
        with any_engine() as engine:
            yield engine
    except NoEngine as error:
        if os.environ.get("MARINA_REQUIRE_CONTAINER") == "1":
            raise
        pytest.skip(f"NO CONTAINER WAS TESTED: {error}")
    assert BRIDGE.exists() == (bridge_was_there or not engine.private)
    assert not mounts_of_engines()


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    build_image(engine, TAG)
    return TAG


@pytest.fixture
def store(tmp_path: Path, repository: Path) -> Path:
    """An archive of a few lines, and the real `shapes` where it has been built."""
    folder = tmp_path / "store"
    folder.mkdir()
    write_archive(folder / "tiny.mar", "tiny")
    shapes = repository / "model-store" / "shapes.mar"
    if shapes.exists():
        shutil.copy(shapes, folder)
    return folder


def wait_for_end(container: Container) -> int:
    deadline = time.monotonic() + 60
    while container.state()["Status"] == "running":
        assert time.monotonic() < deadline, container.logs()
        time.sleep(0.5)
    return int(container.state()["ExitCode"])


def test_serves_and_refuses_and_stops(engine: Engine, image: str, store: Path) -> None:
    seen: list[str] = []
    smoke(engine, image, store, seen.append)
    assert len(seen) == 2 + 3 * len(list(store.glob("*.mar")))


def exists(container: Container, path: str) -> bool:
    look = f"import os; print(os.path.exists({path!r}))"
    return container.engine.run("exec", container.id, "python", "-c", look).strip() == "True"


def wait_until(condition: Callable[[], bool], container: Container) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, container.logs()
        time.sleep(0.2)


def test_stops_between_two_requests_and_starts_again_without_a_network(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    write_archive(store / "gated.mar", "gated", handler=GATED)
    with run_image(engine, image, store) as container, ThreadPoolExecutor() as pool:
        container.wait_healthy()
        headers = JPEG | {"Authorization": f"Bearer {container.token()}"}
        url = f"{container.url()}/predictions/gated"
        answer = pool.submit(httpx.post, url, content=b"wait", headers=headers, timeout=60)
        wait_until(lambda: exists(container, "/tmp/asked"), container)
        stopped = pool.submit(container.stop)
        wait_until(lambda: "serve: stopping" in container.logs(), container)
        # Docker's proxy may stand between, which accepts and hangs up.
        with pytest.raises((httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError)):
            httpx.post(url, content=b"", headers=headers)
        engine.run("exec", container.id, "touch", "/tmp/go")
        assert answer.result().status_code == 200
        assert stopped.result()[0] == 0
        assert "before every answer" not in container.logs()
        # What it has to begin with it has inside: where the network has gone, this is how it comes back.
        engine.run("network", "disconnect", "bridge", container.id)
        engine.run("start", container.id)
        container.wait_healthy()
        with container.forwarded() as url:
            headers = JPEG | {"Authorization": f"Bearer {container.token()}"}
            assert httpx.post(f"{url}/predictions/gated", content=b"", headers=headers).status_code == 200


def test_is_as_small_as_the_readme_says(engine: Engine, image: str) -> None:
    size = size_of(engine, image)
    assert size.beyond_torch <= LIMIT_MB * 1e6, str(size)


def test_ends_with_the_jvm(engine: Engine, image: str, store: Path) -> None:
    """So does an orphan, which process 1 inherits and waits for."""
    with run_image(engine, image, store, LOOPBACK_ALONE) as container:
        container.wait_healthy()
        inside = json.loads(engine.run("exec", container.id, "python", "-c", LEAVE_AN_ORPHAN))
        assert inside["parent"] == 1
        assert inside["zombies"] == []
        engine.run("exec", container.id, "python", "-c", KILL_THE_JVM, check=False)
        assert wait_for_end(container) == 137
        assert "serve: TorchServe ended by itself, by signal 9" in container.logs()


def test_refuses_an_archive_that_is_not_as_built(engine: Engine, image: str, store: Path) -> None:
    with zipfile.ZipFile(store / "tiny.mar", "a") as archive:
        archive.writestr("MAR-INF/PROVENANCE.json", json.dumps({"entries": {}}))
    with run_image(engine, image, store, LOOPBACK_ALONE) as container:
        assert wait_for_end(container) == 1
        assert container.logs().splitlines()[-1].endswith("do not use this archive")


def test_the_gpu_image_says_that_there_is_no_gpu(engine: Engine, image: str, store: Path) -> None:
    with run_image(engine, image, store, LOOPBACK_ALONE, allow_cpu=False) as container:
        assert wait_for_end(container) == 1
        assert "there is no GPU" in container.logs().splitlines()[-1]


def test_archives_can_be_baked_in(engine: Engine, image: str, store: Path) -> None:
    """Under a name with a blank, beside a file that is none, and unreadable for others."""
    (store / "tiny.mar").rename(store / "a tiny.mar")
    (store / "a tiny.mar").chmod(0o600)
    (store / "notes.txt").touch()
    archives = bake(engine, store, BAKED, image)
    with run_image(engine, BAKED, None, LOOPBACK_ALONE) as container:
        container.wait_healthy()
        files = engine.run("exec", container.id, "ls", "-1", "/models").splitlines()
        assert sorted(files) == sorted(archive.path.name for archive in archives)


def test_is_locked_down(engine: Engine, image: str, store: Path) -> None:
    with run_image(engine, image, store) as container:
        container.wait_healthy()
        inside = json.loads(engine.run("exec", container.id, "python", "-c", LOOK_AROUND))
        assert inside["user"] >= 100_000
        assert inside["capabilities"] == ["0000000000000000"]
        assert inside["command"] == ["python", "/opt/torchserve/serve.py"]
        assert inside["writable"] == []
        assert set(inside["listening"]) == {8080}
        assert inside["modes"] == ["0o700", "0o600"]
        assert inside["modules"] == inside["commands"] == []
        assert not inside["secrets"]
        refused = httpx.get(container.url() + "/ping")
        assert refused.status_code == 400
        assert refused.json()["type"] == "InvalidKeyException"


def test_is_not_healthy_while_one_of_its_archives_does_not_answer(engine: Engine, image: str, store: Path) -> None:
    write_archive(store / "broken.mar", "broken", handler=FAILS_TO_LOAD)
    with run_image(engine, image, store) as container:
        deadline = time.monotonic() + 120
        # The first probes come before the server is up: wait for one in which the sound archive answers.
        while True:
            probes = container.state()["Health"]["Log"]
            assert all(probe["ExitCode"] != 0 for probe in probes)
            if probes and "broken.mar" in probes[-1]["Output"] and "tiny.mar" not in probes[-1]["Output"]:
                break
            assert time.monotonic() < deadline, probes
            time.sleep(1)
        ping = httpx.get(container.url() + "/ping", headers={"Authorization": f"Bearer {container.token()}"})
        assert ping.json() == {"status": "Healthy"}
        assert "BadSettings: score_threshold is 2" in container.logs()


@pytest.mark.parametrize(
    ("name", "mode", "said"),
    [("notes.txt", 0o644, "no .mar archive in /models"), ("tiny.mar", 0o600, "cannot be read by user")],
    ids=["empty", "unreadable"],
)
def test_ends_at_once_without_archives(
    engine: Engine, image: str, tmp_path: Path, name: str, mode: int, said: str
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    write_archive(folder / name, "tiny").chmod(mode)
    with run_image(engine, image, folder) as container:
        assert wait_for_end(container) == 1
        assert said in container.logs()


def test_needs_a_writable_tmp(engine: Engine, image: str, store: Path) -> None:
    options = ["--rm", "--read-only", "--volume", f"{store}:/models:ro", "--env", "MARINA_ALLOW_CPU=1"]
    said = engine.run("run", *options, image, check=False)
    assert "no writable /tmp" in said


def test_says_loudly_that_there_is_no_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("MARINA_REQUIRE_CONTAINER", raising=False)
    assert main(["smoke"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("SKIPPED: no container engine")
    assert main(["image"]) == 1
    monkeypatch.setenv("MARINA_REQUIRE_CONTAINER", "1")
    assert main(["smoke"]) == 1
    assert capsys.readouterr().err.startswith("marina: no container engine")
