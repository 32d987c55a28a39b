"""The JVM as a child process: where it lives, how it is started, how it ends together with us."""

import contextlib
import errno
import importlib.util
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from handlers.settings import ANSWER_VARIABLE
from tools.errors import ToolError
from tools.serve.java import Java

# sockaddr_un.sun_path is 108 bytes on Linux, 104 on macOS, with the final NUL.
_LONGEST_SOCKET_PATH = 103
_LONGEST_FOLDER = _LONGEST_SOCKET_PATH - len(os.path.join("", "tmp", ".ts.sock.90000")) - 1
# Becomes the command that follows our process id. The signal is asked for in here, and not between fork and exec: what
# runs there runs the fork handlers of libraries too, of which gRPC's now and then abort the child.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
# What TorchServe's limit counts beside the answers themselves, for a whole batch.
_ANSWER_ENVELOPE = 1 << 16


def private_folder() -> Path:
    """A new folder (mode 0700) whose path is short enough for the unix sockets inside."""
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108  # mkdtemp makes a private folder in it
        try:
            folder = Path(tempfile.mkdtemp(prefix="marina-serve-", dir=parent)).resolve()
        except OSError:
            continue
        if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
            return folder
        folder.rmdir()
    raise ToolError(
        f"no folder for temporary files can be written with a path under {_LONGEST_FOLDER} characters "
        f"(tried {tempfile.gettempdir()} and /tmp); set TMPDIR to such a one"
    )


def has_unix_sockets(folder: Path) -> bool:
    """Whether TorchServe can use unix sockets: its jar brings Netty's native library for Linux on x86-64
    and ARM alone, and has to unpack it into `folder` to load it."""
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and not os.statvfs(folder).f_flag & os.ST_NOEXEC
    )


def torchserve_home() -> Path:
    """The folder that holds TorchServe's `ts` package. Raises ToolError when it is not installed."""
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        raise ToolError("TorchServe is not installed for this Python; `pip install torchserve==0.12.0`")
    home = Path(spec.submodule_search_locations[0]).resolve().parent
    if not (home / "ts" / "frontend" / "model-server.jar").is_file():
        raise ToolError(f"the `ts` package in {home} is not TorchServe (no frontend/model-server.jar in it)")
    return home


def torchserve_metrics() -> str:
    """TorchServe's own metrics.yaml."""
    return (torchserve_home() / "ts" / "configs" / "metrics.yaml").read_text(encoding="utf-8")


def command_line(java: Java, folder: Path) -> list[str]:
    """What TorchServe's launcher would run (ts/model_server.py), for the files in `folder`."""
    home = torchserve_home()
    return [
        str(java.path),
        # Its file in /tmp/hsperfdata_<user> would outlive a kill.
        "-XX:-UsePerfData",
        # It moves bytes, and its heap is small: the second compiler and a concurrent collector would for minutes take
        # the cores from the workers, in bursts that the slowest hundredth of the answers wait for.
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        f"-Dmodel_server_home={home}",
        f"-Dlog4j.configurationFile=file://{folder / 'log4j2.xml'}",
        f"-Djava.io.tmpdir={folder / 'tmp'}",
        "-cp",
        str(home / "ts" / "frontend" / "*"),
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(folder / "config.properties"),
        # Without it a snapshot of the settings is written, and a later start prefers that.
        "-ncs",
    ]


def environment(folder: Path, answer_bytes: int | None = None) -> dict[str, str]:
    """Ours, without the TS_* variables that would overrule config.properties. answer_bytes: TorchServe's limit on
    answers, where it is not its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TS_")}
    if answer_bytes:
        kept[ANSWER_VARIABLE] = str(answer_bytes - _ANSWER_ENVELOPE)
    return kept | {
        "TEMP": str(folder / "tmp"),
        "TMPDIR": str(folder / "tmp"),
        "LOG_LOCATION": str(folder / "logs"),
        "METRICS_LOCATION": str(folder / "logs"),
        # The last words of a worker that is killed must not wait in a buffer.
        "PYTHONUNBUFFERED": "1",
    }


def start(command: list[str], folder: Path, answer_bytes: int | None = None) -> subprocess.Popen[str]:
    """Run `command` in `folder`, its output in one pipe. answer_bytes: see `environment`.

    It leads a process group, so that Ctrl-C in a terminal reaches us alone and all its workers can be
    ended at once. On Linux it gets SIGTERM when the thread that started it ends, however it ends.
    """
    return subprocess.Popen(
        _dying_with_us(command),
        cwd=folder,
        env=environment(folder, answer_bytes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )


def _dying_with_us(command: list[str]) -> list[str]:
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process that leads a group and all others in it, and return when none of them runs."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            # As process 1 of a container we inherit its orphans.
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-process.pid, os.WNOHANG)[0]:
                    pass
            if not _runs(process.pid):
                break
            time.sleep(0.01)
    process.wait()


def _runs(group: int) -> bool:
    """Whether a process of the group holds anything still. One that has ended holds nothing, though it stays in the
    group until its parent looks after it, which a system's first process may do seconds later."""
    if sys.platform != "linux":
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):
        # Gone since it was listed.
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in ("Z", "X"):
                return True
    return False


def bindable_port(host: str, port: int) -> int:
    """`port` if it can be listened on, a free one for 0. Raises ToolError that says what to do instead."""
    if not 0 <= port <= 65535:
        raise ToolError(f"port {port} is none; take 1 to 65535, or 0 for a free one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise ToolError(_port_problem(host, port, error)) from error
        chosen: int = probe.getsockname()[1]
        return chosen


def _port_problem(host: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"host {host!r} is no IPv4 address of this machine; take 127.0.0.1, or 0.0.0.0 for all of them"
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use; give another one (0 picks a free one), "
            f"or stop the process that holds it (`ss -ltnp 'sport = :{port}'` names it)"
        )
    if error.errno == errno.EACCES:
        return f"port {port} on {host} is reserved for the administrator; take one from 1024 up"
    return f"port {port} on {host} cannot be listened on: {error.strerror or error}"


def check_cuda_devices(visible: str | None) -> None:
    """Raises ToolError for a value of CUDA_VISIBLE_DEVICES on which TorchServe would stop."""
    for entry in (visible or "").split(","):
        if entry.strip() and not entry.strip().lstrip("-").isdigit():
            raise ToolError(
                f"CUDA_VISIBLE_DEVICES={visible} names {entry.strip()!r}, and TorchServe takes numbers alone: "
                "set it to the indices that `nvidia-smi -L` shows, e.g. CUDA_VISIBLE_DEVICES=0"
            )
