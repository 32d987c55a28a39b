"""A container engine: the one that runs already, else a private one that lives as long as it is needed.

The private one needs root on Linux, Debian's `docker.io` and `debootstrap`, and no image registry: its base image is
made of Debian packages. It has its own folder and touches no firewall rule; afterwards nothing of it is left.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.errors import ToolError

BASE_IMAGE = "debian:bookworm-slim"
DEBIAN_PACKAGES = ("docker.io", "debootstrap")
# The image, the packages it is built from and the layers in between.
PRIVATE_ENGINE_BYTES = 16_000_000_000


class NoEngine(ToolError):
    """No container engine runs, and none can be started here."""


@dataclass(frozen=True)
class Engine:
    """A Docker client and the engine that it talks to; `private` is one that `private_engine` started."""

    client: str
    host: str | None = None
    private: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What a process of the client needs to find this engine."""
        return {**os.environ, "DOCKER_BUILDKIT": "1"} | ({"DOCKER_HOST": self.host} if self.host else {})

    def run(self, *arguments: str, check: bool = True, capture: bool = True) -> str:
        """Run `docker ARGUMENTS` and return its standard output and error, which `capture=False` lets through instead.

        Raises ToolError with the last lines of the client's output when it fails and `check` is set.
        """
        pipe = subprocess.PIPE if capture else None
        result = subprocess.run(
            [self.client, *arguments],
            env=self.environment,
            stdout=pipe,
            stderr=subprocess.STDOUT if capture else None,
            text=True,
        )
        if check and result.returncode:
            seen = " | ".join((result.stdout or "").strip().splitlines()[-3:])
            raise ToolError(f"docker {arguments[0]} failed with exit code {result.returncode}: {seen or 'see above'}")
        return result.stdout or ""


def find_client() -> str | None:
    """Debian's client where there are several: others on PATH may lack BuildKit."""
    debian = Path("/usr/bin/docker")
    return str(debian) if debian.exists() else shutil.which("docker")


def running_engine() -> Engine:
    """The engine at DOCKER_HOST, or at the client's default address. Raises NoEngine."""
    client = find_client()
    if client is None:
        raise NoEngine("no container engine: there is no docker client on PATH; install Docker 20.10 or later")
    engine = Engine(client)
    try:
        engine.run("version")
    except ToolError as error:
        where = os.environ.get("DOCKER_HOST", "the default address")
        raise NoEngine(f"no container engine: none answers at {where}; start one or set DOCKER_HOST") from error
    return engine


@contextlib.contextmanager
def any_engine() -> Iterator[Engine]:
    """The running engine, else a private one. Raises NoEngine where neither can be had."""
    try:
        engine = running_engine()
    except NoEngine as error:
        install_packages(str(error))
        with tempfile.TemporaryDirectory(prefix="marina-engine-") as folder, private_engine(Path(folder)) as engine:
            yield engine
    else:
        yield engine


def install_packages(why: str) -> None:
    """Make sure that this machine can start a private engine; `why` is the reason that it must. Raises NoEngine."""
    if os.geteuid() != 0:
        raise NoEngine(f"{why}; a private engine needs root")
    if shutil.disk_usage(tempfile.gettempdir()).free < PRIVATE_ENGINE_BYTES:
        raise NoEngine(f"{why}; a private engine needs {PRIVATE_ENGINE_BYTES // 10**9} GB in {tempfile.gettempdir()}")
    if shutil.which("dockerd") and shutil.which("debootstrap"):
        return
    if shutil.which("apt-get") is None:
        raise NoEngine(f"{why}; a private engine needs dockerd and debootstrap")
    print(f"installing {' '.join(DEBIAN_PACKAGES)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *DEBIAN_PACKAGES]):
        result = subprocess.run(["apt-get", "-q", *command], env=environment, capture_output=True, text=True)
        if result.returncode:
            raise NoEngine(f"{why}; apt-get {command[0]} failed: {' | '.join(result.stderr.strip().splitlines()[-2:])}")


@contextlib.contextmanager
def private_engine(folder: Path) -> Iterator[Engine]:
    """An engine with everything of its own in `folder`, and with BASE_IMAGE in it. Raises NoEngine."""
    client = find_client()
    if client is None:
        raise NoEngine("no container engine: there is no docker client on PATH; install docker.io")
    engine = Engine(client, host=f"unix://{folder}/docker.sock", private=True)
    bridge_was_there = Path("/sys/class/net/docker0").exists()
    own = {"host": engine.host, "data-root": folder / "data", "exec-root": folder / "exec", "pidfile": folder / "pid"}
    command = ["dockerd", *(f"--{name}={value}" for name, value in own.items())]
    command += ["--iptables=false", "--ip-forward=false", "--ip-masq=false"]
    with (folder / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for_daemon(engine, daemon, folder / "dockerd.log")
        make_base_image(engine, folder / "rootfs")
        yield engine
    finally:
        stop_daemon(engine, daemon)
        unmount_under(folder)
        if not bridge_was_there:
            subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True)


def wait_for_daemon(engine: Engine, daemon: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        with contextlib.suppress(ToolError):
            engine.run("version")
            return
        if daemon.poll() is not None:
            break
        time.sleep(0.5)
    raise NoEngine(f"no container engine: dockerd does not come up: {log.read_text().strip().splitlines()[-1:]}")


def make_base_image(engine: Engine, rootfs: Path) -> None:
    """Import Debian 12, made of its packages, as BASE_IMAGE: without what the image of that name leaves out."""
    result = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(rootfs)],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise NoEngine(f"no base image: debootstrap failed: {' | '.join(result.stdout.strip().splitlines()[-2:])}")
    texts = [f"usr/share/{name}" for name in ("doc", "man", "locale")]
    folders = ["proc", "sys", "dev", "var/cache/apt", "var/lib/apt/lists", *texts]
    left_out = [f"--exclude=./{folder}/*" for folder in folders]
    archive = rootfs.with_suffix(".tar")
    subprocess.run(["tar", "-C", str(rootfs), "--numeric-owner", *left_out, "-cf", str(archive), "."], check=True)
    engine.run("import", "--change", 'CMD ["bash"]', str(archive), BASE_IMAGE)
    archive.unlink()
    shutil.rmtree(rootfs)


def stop_daemon(engine: Engine, daemon: subprocess.Popen[bytes]) -> None:
    if daemon.poll() is None:
        containers = engine.run("ps", "--all", "--quiet", check=False).split()
        if containers:
            engine.run("rm", "--force", *containers, check=False)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def unmount_under(folder: Path) -> None:
    """Unmount what the engine left mounted, the deepest first, so that its folder can be removed."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", mount], check=True)
