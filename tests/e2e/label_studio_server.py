"""A real Label Studio, started once, from the environment that tests/labelstudio.lock pins."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_S = 600
TOKEN = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Studio:
    """url, and a file with the user's legacy token."""

    url: str
    token_file: Path

    def call(self, method: str, path: str, **options: Any) -> Any:
        """As an annotator's browser or another program does it, beside Marina."""
        headers = {"Authorization": f"Token {TOKEN}"}
        answer = httpx.request(method, f"{self.url}{path}", headers=headers, timeout=120, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def project(self, title: str) -> dict[str, Any]:
        (project,) = self.call("GET", "/api/projects/", params={"title": title})["results"]
        return project

    def tasks(self, title: str) -> list[dict[str, Any]]:
        query = {"project": self.project(title)["id"], "fields": "all", "resolve_uri": "false", "page_size": 1000}
        return self.call("GET", "/api/tasks/", params=query)["tasks"]

    def annotate(self, task: int, result: list[dict[str, Any]], **more: Any) -> int:
        return self.call("POST", f"/api/tasks/{task}/annotations/", json={"result": result, **more})["id"]


@pytest.fixture(scope="session")
def label_studio(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    environment = repository / ".venv-labelstudio"
    if not (environment / ".installed").is_file():
        pytest.fail("no environment of Label Studio; `make test-e2e` makes it as .venv-labelstudio")
    folder = tmp_path_factory.mktemp("label-studio")
    (folder / "token").write_text(f"{TOKEN}\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    variables = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"),
        "LABEL_STUDIO_USERNAME": "marina@localhost",
        "LABEL_STUDIO_PASSWORD": "only-of-this-test",
        "LABEL_STUDIO_USER_TOKEN": TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
        "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
        # Its second for an ML backend's answer is too short where several tests share two cores.
        **dict.fromkeys(("ML_CONNECTION_TIMEOUT", "ML_TIMEOUT_HEALTH", "ML_TIMEOUT_SETUP"), "60"),
    }
    command = [environment / "bin" / "label-studio", "start", "--no-browser", "--internal-host", "127.0.0.1"]
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env=variables,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await(url, process, log)
        yield Studio(url, folder / "token")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"Label Studio does not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)
