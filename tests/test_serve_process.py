"""tools.serve.process: ports, folders and the group of processes."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_archive import write_archive

from handlers.settings import ANSWER_VARIABLE
from tools.errors import ToolError
from tools.serve import process
from tools.serve.command import curl_line, is_loopback
from tools.serve.java import Java
from tools.serve.server import TorchServe


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_port_in_use_says_which_and_what_to_do(taken_port: int) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ToolError, match=rf"port {taken_port} on {host} is in use; give another one .*ss -ltnp"):
            process.bindable_port(host, taken_port)


def test_server_on_a_port_in_use_leaves_nothing(
    taken_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    write_archive(tmp_path / "a.mar", "a")
    with pytest.raises(ToolError, match=f"port {taken_port}"):
        TorchServe(tmp_path, port=taken_port).start()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("host", "port", "told"), [("192.0.2.1", 0, "no IPv4 address"), ("127.0.0.1", 70000, "70000")])
def test_address_that_cannot_be(host: str, port: int, told: str) -> None:
    with pytest.raises(ToolError, match=told):
        process.bindable_port(host, port)


def test_zero_picks_a_free_port() -> None:
    assert process.bindable_port("127.0.0.1", 0) > 0


def test_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = process.private_folder()
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_private_folder_leaves_a_path_too_long_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = process.private_folder()
    try:
        (folder / "tmp").mkdir()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(folder / "tmp" / ".ts.sock.90000"))
    finally:
        shutil.rmtree(folder)
    assert list(deep.iterdir()) == []


def test_environment_keeps_what_could_overrule_the_settings_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_CONFIG_FILE", "/elsewhere")
    monkeypatch.setenv("KEPT", "1")
    environment = process.environment(tmp_path)
    assert "TS_CONFIG_FILE" not in environment
    assert environment["KEPT"] == "1"
    assert ANSWER_VARIABLE not in environment
    assert int(process.environment(tmp_path, 8_000_000)[ANSWER_VARIABLE]) < 8_000_000
    assert environment["TEMP"] == environment["TMPDIR"] == str(tmp_path / "tmp")


def test_command_line_runs_the_installed_torchserve(tmp_path: Path) -> None:
    command = process.command_line(Java(Path("/j/bin/java"), 17, "PATH"), tmp_path)
    assert command[0] == "/j/bin/java"
    assert Path(command[command.index("-cp") + 1].removesuffix("*"), "model-server.jar").is_file()
    assert command[command.index("--python") + 1] == sys.executable
    assert command[-1] == "-ncs"


def test_group_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    script = "sleep 60 & sleep 60 & echo up; wait"
    started = process.start(["sh", "-c", script], tmp_path)
    assert started.stdout is not None
    assert started.stdout.readline() == "up\n"
    family = [psutil.Process(started.pid), *psutil.Process(started.pid).children()]
    assert len(family) == 3
    process.kill_group(started)
    assert not any(_holds_something(member) for member in family)
    process.kill_group(started)


def _holds_something(member: psutil.Process) -> bool:
    """What has ended may be known until the system's first process looks after it."""
    try:
        return member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_child_ends_when_we_are_killed(tmp_path: Path, repository: Path) -> None:
    code = (
        "import os, pathlib, signal; from tools.serve import process;"
        "child = process.start(['sh', '-c', 'echo; exec sleep 60'], pathlib.Path.cwd()); print(child.pid, flush=True);"
        # It has become the command.
        "child.stdout.readline(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(repository)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=environment, check=False)
    child = int(ran.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)


@pytest.mark.parametrize("visible", [None, "", "0", "0,1", "-1", " 2 , 3"])
def test_cuda_devices_by_number(visible: str | None) -> None:
    process.check_cuda_devices(visible)


def test_cuda_devices_by_uuid() -> None:
    with pytest.raises(ToolError, match=r"names 'GPU-8f', and TorchServe takes numbers"):
        process.check_cuda_devices("0,GPU-8f")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_curl_line_survives_a_folder_with_spaces(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.mar", "a")
    server = TorchServe(tmp_path, port=8080)
    server._folder = Path("/tmp/a b")
    line = curl_line(server, server.archives[0])
    stand_ins = 'cat() { printf %s "$1"; }; curl() { printf \'%s\\n\' "$@"; }; '
    ran = subprocess.run(["sh", "-c", stand_ins + line], capture_output=True, text=True, check=True)
    words = ran.stdout.splitlines()
    assert words[1] == "Authorization: Bearer /tmp/a b/token"
    assert words[5] == "@/tmp/a b/images/a_1.0/gradient.jpg"
    assert words[6] == "http://127.0.0.1:8080/predictions/a"
