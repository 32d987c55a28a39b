"""The entry point of the serving image before a real TorchServe, without a container."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tiny_archive import write_archive

from tools.serve.java import find_java
from tools.serve.process import bindable_port, private_folder

pytestmark = pytest.mark.e2e
JPEG = {"Content-Type": "image/jpeg"}
CLIENTS = 4

# serve.py, with what the image has at fixed places put elsewhere.
DRIVER = """
import sys
from pathlib import Path
docker, java, runtime, config, port = sys.argv[1:]
sys.path.insert(0, docker)
import serve
serve.JAVA, serve.RUNTIME, serve.CONFIG, serve.PORT = Path(java), Path(runtime), Path(config), int(port)
sys.exit(serve.main())
"""


class Entry:
    """serve.py and the TorchServe that it runs."""

    def __init__(self, repository: Path, folder: Path, log: Path):
        docker = repository / "docker"
        self.port, *ports = (bindable_port("127.0.0.1", 0) for _ in range(6))
        properties = (docker / "config.properties").read_text().replace("/opt/torchserve/", f"{docker}/")
        for old, new in zip((8083, 8081, 8082), ports, strict=False):
            properties = properties.replace(f":{old}\n", f":{new}\n")
        grpc = f"grpc_inference_port={ports[3]}\ngrpc_management_port={ports[4]}\n"
        (folder / "config.properties").write_text(properties + grpc)
        self.runtime, self.log = folder / "run", log
        arguments = [docker, find_java().path, self.runtime, folder / "config.properties", self.port]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, arguments)],
            env={**os.environ, "MODEL_STORE": str(folder / "store"), "MARINA_ALLOW_CPU": "1"},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predictions/tiny"

    def headers(self, **more: str) -> dict[str, str]:
        keys = json.loads((self.runtime / "key_file.json").read_text())
        return {**JPEG, "Authorization": f"Bearer {keys['inference']['key']}", **more}

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            try:
                if httpx.post(self.url, content=b"\xff\xd8", headers=self.headers(), timeout=60).status_code == 200:
                    return
            except (OSError, ValueError, httpx.TransportError):
                pass
            time.sleep(0.1)


@pytest.fixture
def entry(repository: Path, tmp_path: Path) -> Iterator[Entry]:
    folder = private_folder()
    (folder / "store").mkdir()
    write_archive(folder / "store" / "tiny.mar", "tiny")
    entry = Entry(repository, folder, tmp_path / "log")
    yield entry
    for process in (
        [*psutil.Process(entry.process.pid).children(recursive=True)] if entry.process.poll() is None else []
    ):
        process.kill()
    entry.process.kill()
    entry.process.wait()
    shutil.rmtree(folder)


def test_clients_that_ask_all_the_time_lose_nothing(entry: Entry) -> None:
    """Each has its answer, or is refused: by a server that takes no connection any more."""
    entry.wait_until_it_answers()
    children = psutil.Process(entry.process.pid).children(recursive=True)

    def ask_until_refused(number: int) -> list[Any]:
        seen: list[Any] = []
        with httpx.Client(headers=entry.headers(sleep="0.05"), timeout=60) as client:
            while True:
                try:
                    seen.append(client.post(entry.url, content=b"\xff\xd8" + bytes(100_000)).status_code)
                except httpx.TransportError as error:
                    return [*seen, type(error)]

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask_until_refused, number) for number in range(CLIENTS)]
        time.sleep(2)
        entry.process.send_signal(signal.SIGTERM)
        for client in clients:
            *answers, last = client.result()
            assert last is httpx.ConnectError
            assert set(answers) == {200}
    assert entry.process.wait(60) == 0
    assert "before every answer" not in entry.log.read_text()
    assert children and not any(child.is_running() for child in children)


def test_what_is_too_large_is_refused_as_by_torchserve_itself(entry: Entry) -> None:
    entry.wait_until_it_answers()
    answer = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--data-binary", "@-", entry.url]
        + [part for name, value in entry.headers().items() for part in ("-H", f"{name}: {value}")],
        input=bytes(40_000_000),
        capture_output=True,
    )
    assert answer.stdout == b"413"
