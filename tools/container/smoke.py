"""Run the serving image under the strictest settings, ask it for a prediction, and stop it."""

import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.container.engine import BASE_IMAGE, Engine
from tools.errors import ToolError
from tools.serve.store import find_archives
from tools.smoke.checks import Server
from tools.smoke.checks import smoke as check_answers

CONTEXT = Path(__file__).resolve().parent.parent.parent / "docker"
CERTIFICATES = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
KEY_FILE = "/tmp/torchserve/key_file.json"  # noqa: S108  # a path inside the container
GRACE_S = 30
# How a container is reached: from this machine, or from nowhere but inside.
PUBLISHED = ("--publish", "127.0.0.1::8080")
LOOPBACK_ALONE = ("--network", "none")

# Inside of a container: its standard input and output, and its public port.
BRIDGE = """
import socket, sys, threading
server = socket.create_connection(("127.0.0.1", 8080))
def send():
    while data := sys.stdin.buffer.raw.read(65536):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := server.recv(65536):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""

# Bytes of the files of torch and of the wheels of CUDA, everything beside them in their folders included.
TORCH_SIZE = """
import os, re
from importlib.metadata import distributions
wheels = [each for each in distributions() if re.fullmatch("torch|triton|(cuda|nvidia)-.*", each.metadata["Name"])]
tops = {each.locate_file(file.parts[0]) for each in wheels for file in each.files if file.parts[0] != ".."}
print(sum(os.lstat(os.path.join(folder, name)).st_size
          for top in tops for folder, _, names in os.walk(top) for name in names))
"""


def build_image(engine: Engine, tag: str, base_image: str | None = None, torch_index: str | None = None) -> None:
    """Build `docker/Dockerfile` as `tag`; `base_image` and `torch_index` are its arguments. Raises ToolError."""
    options = ["--tag", tag, "--build-arg", f"BASE_IMAGE={base_image or BASE_IMAGE}"]
    if torch_index:
        options += ["--build-arg", f"TORCH_INDEX={torch_index}"]
    if CERTIFICATES.is_file():
        options += ["--secret", f"id=ca_bundle,src={CERTIFICATES}"]
    if engine.private:
        options += ["--network", "host"]
    engine.run("build", "--progress", "plain", *options, str(CONTEXT), capture=False)


@dataclass(frozen=True)
class Size:
    """Of an image, unpacked. beyond_torch: without torch and the wheels of CUDA, the base image included. Bytes."""

    total: int
    beyond_torch: int

    def __str__(self) -> str:
        return f"{self.total / 1e9:.2f} GB, {self.beyond_torch / 1e6:.0f} MB of it beyond torch and its CUDA wheels"


def size_of(engine: Engine, tag: str) -> Size:
    total = int(engine.run("image", "inspect", "--format", "{{.Size}}", tag))
    torch = engine.run("run", "--rm", *LOOPBACK_ALONE, "--entrypoint", "python", tag, "-c", TORCH_SIZE)
    return Size(total, total - int(torch))


@dataclass(frozen=True)
class Container:
    """One run of the serving image."""

    engine: Engine
    id: str

    def state(self) -> dict[str, Any]:
        """Docker's `State`: Status, ExitCode, OOMKilled, Health."""
        return dict(json.loads(self.engine.run("inspect", "--format", "{{json .State}}", self.id)))

    def logs(self) -> str:
        return self.engine.run("logs", self.id)

    def url(self) -> str:
        return "http://" + self.engine.run("port", self.id, "8080").splitlines()[0]

    @contextlib.contextmanager
    def forwarded(self) -> Iterator[str]:
        """A URL of this machine for a container that has no network: each connection is a process inside of it."""
        command = [self.engine.client, "exec", "--interactive", self.id, "python", "-c", BRIDGE]
        bridges: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def accept() -> None:
                # Until the listener is shut down.
                with contextlib.suppress(OSError):
                    while True:
                        with listener.accept()[0] as client:
                            bridges.append(
                                subprocess.Popen(
                                    command, env=self.engine.environment, stdin=client.fileno(), stdout=client.fileno()
                                )
                            )

            thread = threading.Thread(target=accept)
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()
                for bridge in bridges:
                    bridge.kill()
                    bridge.wait()

    def token(self) -> str:
        """The inference token, read the way that an operator reads it."""
        return str(json.loads(self.engine.run("exec", self.id, "cat", KEY_FILE))["inference"]["key"])

    def wait_healthy(self, timeout_s: float = 180) -> None:
        """Wait for the health check to pass. Raises ToolError when the container stops, or is not healthy in time."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state())["Health"]["Status"] != "healthy":
            if state["Status"] != "running":
                last = " | ".join(self.logs().strip().splitlines()[-3:])
                raise ToolError(f"the container stopped with exit code {state['ExitCode']}: {last}")
            if time.monotonic() > deadline:
                said = [probe["Output"].strip() for probe in state["Health"]["Log"]][-1:]
                raise ToolError(f"the container is not healthy after {timeout_s:.0f} s; its health check says {said}")
            time.sleep(0.5)

    def stop(self) -> tuple[int, float]:
        """SIGTERM, as an orchestrator sends it. Returns the exit code and the seconds it took."""
        start = time.monotonic()
        self.engine.run("stop", "--time", str(GRACE_S), self.id)
        return self.state()["ExitCode"], time.monotonic() - start


@contextlib.contextmanager
def run_image(
    engine: Engine, tag: str, store: Path | None, network: tuple[str, str] = PUBLISHED, allow_cpu: bool = True
) -> Iterator[Container]:
    """A container of the image as strict platforms run it: any user id, nothing writable but /tmp, no capability.

    store: a folder of archives, None where they are baked in. network: PUBLISHED or LOOPBACK_ALONE.
    """
    user = random.randint(100_000, 999_999)  # noqa: S311  # no secret
    identifier = engine.run(
        *("run", "--detach", *network, *(("--volume", f"{store.resolve()}:/models:ro") if store else ())),
        *("--env", f"MARINA_ALLOW_CPU={allow_cpu:d}"),
        *("--user", str(user), "--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL"),  # noqa: S108  # inside the container
        *("--security-opt", "no-new-privileges", "--memory", "3g", "--pids-limit", "300", "--health-interval", "2s"),
        tag,
    ).split()[-1]
    try:
        yield Container(engine, identifier)
    finally:
        engine.run("rm", "--force", "--volumes", identifier)


def smoke(engine: Engine, tag: str, store: Path, report: Callable[[str], None]) -> None:
    """Serve the archives of `store` on loopback alone, put the questions of `marina smoke` to each, stop.

    Reports one line for each finding; raises ToolError at the first thing that is not as it should be.
    """
    archives = find_archives(store)
    with run_image(engine, tag, store, LOOPBACK_ALONE) as container:
        start = time.monotonic()
        container.wait_healthy()
        report(f"ok  healthy after {time.monotonic() - start:.1f} s")
        token = container.token()
        with container.forwarded() as url:
            for archive in archives:
                server = Server(url, f"{archive.name}/{archive.version}", token, timeout=60)
                check_answers(server, archive.image, archive.content_type, report)
        if token in container.logs():
            raise ToolError("the token stands in the container's log")
        code, seconds = container.stop()
        if code != 0:
            raise ToolError(f"the container ended with exit code {code} on SIGTERM: it should be 0")
        report(f"ok  stopped in {seconds:.1f} s with exit code 0")
