"""Run the serving image under the strictest settings, ask it for a prediction, and stop it."""

import contextlib
import json
import os
import random
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
def run_image(engine: Engine, tag: str, store: Path) -> Iterator[Container]:
    """A container of the image as strict platforms run it: any user id, nothing writable but /tmp, no capability."""
    user = random.randint(100_000, 999_999)  # noqa: S311  # no secret
    identifier = engine.run(
        *("run", "--detach", "--publish", "127.0.0.1::8080", "--volume", f"{store.resolve()}:/models:ro"),
        *("--user", str(user), "--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL"),  # noqa: S108  # inside the container
        *("--security-opt", "no-new-privileges", "--memory", "3g", "--pids-limit", "300", "--health-interval", "2s"),
        tag,
    ).split()[-1]
    try:
        yield Container(engine, identifier)
    finally:
        engine.run("rm", "--force", "--volumes", identifier)


def smoke(engine: Engine, tag: str, store: Path, report: Callable[[str], None]) -> None:
    """Serve the archives of `store`, put the questions of `marina smoke` to each, stop.

    Reports one line for each finding; raises ToolError at the first thing that is not as it should be.
    """
    archives = find_archives(store)
    with run_image(engine, tag, store) as container:
        start = time.monotonic()
        container.wait_healthy()
        report(f"ok  healthy after {time.monotonic() - start:.1f} s")
        token = container.token()
        for archive in archives:
            server = Server(container.url(), f"{archive.name}/{archive.version}", token, timeout=60)
            check_answers(server, archive.image, archive.content_type, report)
        if token in container.logs():
            raise ToolError("the token stands in the container's log")
        code, seconds = container.stop()
        # 143 is 128 + SIGTERM, the JVM's way to say that it was asked to end; 137 would be killed.
        if code not in (0, 143):
            raise ToolError(f"the container ended with exit code {code} on SIGTERM: it should be 0 or 143")
        report(f"ok  stopped in {seconds:.1f} s with exit code {code}")
