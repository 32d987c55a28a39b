"""Archives from a store onto a real TorchServe that is being asked all the time."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import tiny_archive
from e2e.conftest import recipe_with

from tools.archive.build import build_archive
from tools.archive.reader import MANIFEST, PROVENANCE, open_archive
from tools.archive.recipe import load_recipe
from tools.archive.verify import check_entries
from tools.archive.writer import write_archive
from tools.errors import ToolError
from tools.serve import config, process
from tools.serve.java import find_java
from tools.serve.rollout import REPLACED, Address, alone, read_tokens
from tools.serve.store import find_archives, gradient_jpeg
from tools.store.deploy import deploy
from tools.store.manifest import Manifest
from tools.store.store import Store

pytestmark = pytest.mark.e2e
CLIENTS = 4
DETECTIONS = {"Marina-Format": "detections"}


@dataclass
class Server:
    """A TorchServe that takes models while it runs."""

    address: Address
    store_dir: Path
    key_file: Path

    def versions(self, name: str) -> set[str]:
        answer = self._get(f"/models/{name}/all")
        return {each["modelVersion"] for each in answer.json()} if answer.status_code == 200 else set()

    def listens(self) -> bool:
        try:
            return httpx.get(f"{self.address.inference}/ping").status_code > 0
        except httpx.TransportError:
            return False

    def default(self, name: str) -> str:
        return self._get(f"/models/{name}").json()[0]["modelVersion"]

    def _get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.address.tokens['management']}"}
        return httpx.get(f"{self.address.management}{path}", headers=headers)


@contextmanager
def updatable_server(store_dir: Path, takes_models: bool = True) -> Iterator[Server]:
    folder = process.private_folder()
    for name in ("tmp", "logs"):
        (folder / name).mkdir()
    port, management, metrics = (process.bindable_port("127.0.0.1", 0) for _ in range(3))
    properties = config.server_properties(
        host="127.0.0.1",
        port=port,
        management_address=f"http://127.0.0.1:{management}",
        metrics_address=f"http://127.0.0.1:{metrics}",
        grpc_port=None,
        auth=True,
        store=str(store_dir),
        archives={each.path.name: each for each in find_archives(store_dir)} if any(store_dir.iterdir()) else {},
        worker_port=9000 if process.has_unix_sockets(folder) else process.bindable_port("127.0.0.1", 0),
    )
    text = config.properties_text(properties | {"enable_model_api": str(takes_models).lower()})
    (folder / "config.properties").write_text(text)
    (folder / "log4j2.xml").write_text(config.LOG4J)
    child = process.start(process.command_line(find_java(), folder), folder)
    log = folder / "torchserve.log"
    reader = threading.Thread(target=lambda: log.write_text("".join(child.stdout)), daemon=True)
    reader.start()
    try:
        keys = folder / "key_file.json"
        deadline = time.monotonic() + 240
        while not (keys.is_file() and keys.read_text().strip()):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        address = Address(f"http://127.0.0.1:{management}", f"http://127.0.0.1:{port}", read_tokens(keys))
        server = Server(address, store_dir, keys)
        while not server.listens():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield server
    finally:
        process.kill_group(child)


class Load:
    """Clients that ask for the default version again and again, each on connections of its own."""

    def __init__(self, server: Server, model: str, picture: bytes, **headers: str):
        self.answers: Counter[str] = Counter()
        self._server = server
        self._model = model
        self._picture = picture
        self._headers = headers
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)
            assert not thread.is_alive()

    def wait_for(self, said: str, more: int = 8) -> None:
        """Until that was the answer so many times more."""
        wanted = self.answers[said] + more
        deadline = time.monotonic() + 120
        while self.answers[said] < wanted:
            assert time.monotonic() < deadline, self.answers
            time.sleep(0.05)

    def _ask(self) -> None:
        token = {"Authorization": f"Bearer {self._server.address.tokens['inference']}", "Content-Type": "image/jpeg"}
        with httpx.Client(
            base_url=self._server.address.inference, headers=token | self._headers, timeout=120
        ) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"/predictions/{self._model}", content=self._picture)
                    said = f"{answer.status_code} {answer.text}"
                    if answer.status_code == 200:
                        said = answer.json()["version"] if "Marina-Format" in self._headers else "answered"
                except httpx.HTTPError as error:
                    said = repr(error)
                with self._lock:
                    self.answers[said] += 1
                # A worker that starts needs the cores too.
                time.sleep(0.2)


def other_golden(source: Path, target: Path) -> None:
    """The same archive in every checksum, but it must answer what its network does not find."""
    digests: dict[str, dict[str, int | str]] = {}
    with open_archive(source) as archive, write_archive(target, digests) as writer:
        provenance = archive.provenance
        for name in archive.names():
            content = archive.read(name)
            if name == MANIFEST:
                content = content.replace(b'"modelVersion": "1.1"', b'"modelVersion": "1.2"')
            if name == "golden/scene.json":
                answer = json.loads(content)
                answer["detections"] = answer["detections"][1:]
                content = json.dumps(answer).encode()
            if name != PROVENANCE:
                writer.add(name, content)
        provenance["entries"] = dict(digests)
        writer.add(PROVENANCE, json.dumps(provenance).encode())
    check_entries(target)


@pytest.fixture(scope="module")
def pushed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Manifest], Path]:
    """A store with three versions of shapes, 1.2 of which cannot give its golden answers; and where 1.0 was built."""
    root = tmp_path_factory.mktemp("deploy")
    source = repository / "archives" / "shapes"
    first, second, bad = root / "one" / "shapes.mar", root / "two" / "shapes.mar", root / "bad" / "shapes.mar"
    build_archive(load_recipe(source), first)
    build_archive(recipe_with(root / "recipe", source, version="1.1"), second)
    bad.parent.mkdir()
    other_golden(second, bad)
    store = Store(str(root / "store"))
    manifests = {manifest.version: manifest for manifest in map(store.push, (first, second, bad))}
    return store, manifests, first


def test_a_switch_and_a_rollback_under_load_lose_no_request(
    pushed: tuple[Store, dict[str, Manifest], Path], repository: Path, tmp_path: Path
) -> None:
    store, manifests, first = pushed
    picture = (repository / "archives" / "shapes" / "golden" / "scene.jpg").read_bytes()
    (tmp_path / "shapes.mar").write_bytes(first.read_bytes())
    lines: list[str] = []
    with updatable_server(tmp_path) as server, Load(server, "shapes", picture, **DETECTIONS) as load:
        load.wait_for("1.0")
        deploy(store, manifests["1.0"], server.address, tmp_path, lines.append)
        assert lines == ["shapes 1.0 is served already"] and len(list(tmp_path.glob("*.mar"))) == 1
        deploy(store, manifests["1.1"], server.address, tmp_path, lines.append)
        assert server.versions("shapes") == {"1.1"}
        load.wait_for("1.1")
        # What the folder holds is what a restart would serve.
        assert [each.version for each in find_archives(tmp_path)] == ["1.1"]
        assert (tmp_path / f"shapes.mar{REPLACED}").is_file()

        with pytest.raises(ToolError, match=r"shapes 1.2 does not come up: .*Failed to start workers"):
            deploy(store, manifests["1.2"], server.address, tmp_path, lines.append)
        assert server.default("shapes") == "1.1" and server.versions("shapes") == {"1.1"}
        assert [each.version for each in find_archives(tmp_path)] == ["1.1"]
        load.wait_for("1.1")

        deploy(store, manifests["1.0"], server.address, tmp_path, lines.append)
        assert server.versions("shapes") == {"1.0"}
        load.wait_for("1.0")
        assert [each.version for each in find_archives(tmp_path)] == ["1.0"]
        deploy(store, manifests["1.0"], server.address, tmp_path, lines.append)
        assert lines[-1] == "shapes 1.0 is served already"
    assert load.answers.keys() == {"1.0", "1.1"}, load.answers


# Comes up, and then refuses every picture.
REFUSES = """
def handle(data, context):
    for index in range(len(data or [])):
        context.set_response_status(code=500, phrase="No", idx=index)
    return None if data is None else [b"{}" for _ in data]
"""


def test_what_does_not_come_up_or_answer_leaves_no_trace(tmp_path: Path) -> None:
    store, served = Store(str(tmp_path / "store")), tmp_path / "served"
    served.mkdir()

    def push(version: str, handler: str) -> Manifest:
        return store.push(tiny_archive.write_archive(tmp_path / "a.mar", "tiny", version=version, handler=handler))

    with updatable_server(served) as server:
        with pytest.raises(ToolError, match=r"tiny 1.0 does not come up"):
            deploy(store, push("1.0", tiny_archive.FAILS_TO_LOAD), server.address, served, print)
        assert server.versions("tiny") == set() and not list(served.glob("*.mar"))
        deploy(store, push("1.1", tiny_archive.HANDLER), server.address, served, print)
        with pytest.raises(ToolError, match=r"tiny 1.2 answers its picture with 500"):
            deploy(store, push("1.2", REFUSES), server.address, served, print)
        assert server.versions("tiny") == {"1.1"} and server.default("tiny") == "1.1"
        (file,) = served.glob("*.mar")
        with pytest.raises(
            ToolError, match=r"give the new archive another version|remove one, or give it another version"
        ):
            deploy(store, push("1.1", tiny_archive.HANDLER + "\n"), server.address, served, print)
        assert [file] == list(served.glob("*.mar")) and server.versions("tiny") == {"1.1"}


def test_answers_under_way_are_waited_for(tmp_path: Path) -> None:
    """Requests that take longer than the switch: first with two workers, of which nobody knows what they do."""
    store, served = Store(str(tmp_path / "store")), tmp_path / "served"
    served.mkdir()
    two_workers = tiny_archive.CONFIG.replace("Workers: 1", "Workers: 2").replace("Timeout: 60", "Timeout: 8", 1)
    first, *others = (
        store.push(tiny_archive.write_archive(tmp_path / "a.mar", "tiny", version=version, config=config))
        for version, config in (("1.0", two_workers), ("1.1", tiny_archive.CONFIG), ("1.2", tiny_archive.CONFIG))
    )
    with updatable_server(served) as server:
        deploy(store, first, server.address, served, print)
        with Load(server, "tiny", gradient_jpeg(), sleep="2") as load:
            for manifest in others:
                load.wait_for("answered", CLIENTS)
                deploy(store, manifest, server.address, served, print)
                assert server.versions("tiny") == {manifest.version}
    assert load.answers.keys() == {"answered"}, load.answers


def test_a_server_that_cannot_be_updated_is_one_line(tmp_path: Path) -> None:
    store, served = Store(str(tmp_path / "store")), tmp_path / "served"
    served.mkdir()
    manifest = store.push(tiny_archive.write_archive(tmp_path / "a.mar", "tiny"))
    with updatable_server(served, takes_models=False) as server:
        with pytest.raises(ToolError, match=r"start the server with enable_model_api=true"):
            deploy(store, manifest, server.address, served, print)
        with pytest.raises(ToolError, match=r"refuses the token; give its key_file.json"):
            deploy(store, manifest, replace(server.address, tokens={}), served, print)
        with pytest.raises(ToolError, match=r"another rollout on .* is under way"), alone(served):
            deploy(store, manifest, server.address, served, print)
        key_file = server.key_file
        address = server.address
        assert read_tokens(key_file).keys() == {"management", "inference"}
    for url, problem in ((address.management, "cannot be reached"), ("nowhere", "is no address of a server")):
        with pytest.raises(ToolError, match=problem):
            deploy(store, manifest, Address(url, url, {}), served, print)
    with pytest.raises(ToolError, match="give --store-dir"):
        deploy(store, manifest, address, tmp_path / "nowhere", print)
    (tmp_path / "token").write_text("abc")
    with pytest.raises(ToolError, match="has no key for management and inference"):
        read_tokens(tmp_path / "token")
    assert not list(served.glob("*.mar"))
