"""From a data set in an S3 server to a live switch of a real TorchServe that is being asked all the time, and back.

The tests use one server, `marina serve`, in the order in which they stand here; the last one ends it.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import store_places
import tiny_archive
import yaml
from serve_command import Command

from tools.archive.reader import MANIFEST, PROVENANCE, open_archive
from tools.archive.verify import check_entries
from tools.archive.writer import write_archive
from tools.cli import main
from tools.errors import ToolError
from tools.pipeline.state import STATE
from tools.pipeline.steps import STEPS
from tools.serve import process
from tools.serve.java import find_java
from tools.serve.rollout import REPLACED, Address, alone, read_tokens
from tools.serve.server import TorchServe
from tools.serve.store import find_archives, gradient_jpeg
from tools.store import command as store_command
from tools.store.deploy import deploy
from tools.store.manifest import Manifest
from tools.store.promote import promote
from tools.store.store import Store

pytestmark = pytest.mark.e2e
CLIENTS = 4
DETECTIONS = {"Marina-Format": "detections"}
SECRET = "a-secret-key"
HOSTILE = """it's "q" $(touch pwned) `touch pwned`; touch pwned & * ${HOME} \\ -x"""
BIN = Path(sys.executable).parent


@dataclass
class Server:
    """`marina serve` that takes archives while it runs. deploy_line: what it prints for that."""

    command: Command
    address: Address
    store_dir: Path
    key_file: Path
    deploy_line: str

    def versions(self, name: str) -> set[str]:
        answer = self._get(f"/models/{name}/all")
        return {each["modelVersion"] for each in answer.json()} if answer.status_code == 200 else set()

    def default(self, name: str) -> str:
        return self._get(f"/models/{name}").json()[0]["modelVersion"]

    def files(self) -> list[str]:
        """What a restart would serve."""
        return [str(served) for served in find_archives(self.store_dir)]

    def _get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.address.tokens['management']}"}
        return httpx.get(f"{self.address.management}{path}", headers=headers)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """In a bucket of a server that keeps `If-None-Match`; the environment of this process leads to it."""
    with store_places.moto() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in store_places.credentials(endpoint, SECRET).items():
            patch.setenv(name, value)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        store_places.client(endpoint).create_bucket(Bucket=store_places.BUCKET)
        yield Store(f"s3://{store_places.BUCKET}/team")


@pytest.fixture(scope="module")
def server(repository: Path, shapes_server: TorchServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of shapes 1.0."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "store").mkdir()
    shutil.copy(shapes_server.archives[0].path, folder / "store" / "shapes.mar")
    command = Command(
        repository, folder / "tmp", "--store", str(folder / "store"), "--port", "0", "--management-port", "0"
    )
    try:
        command.await_line("^curl ")
        line = command.await_line("^deploy  (.*)")[1]
        parser = argparse.ArgumentParser()
        store_command.add_arguments(parser)
        args = parser.parse_args(shlex.split(line)[2:])
        address = Address(args.management, args.inference, read_tokens(args.token_file))
        yield Server(command, address, args.store_dir, args.token_file, line)
    finally:
        command.kill()


def wait_until(condition: Callable[[], bool], limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
        wait_until(lambda: self.answers[said] >= wanted, 120)

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


def other_golden(source: Path, target: Path, version: str) -> Path:
    """The same archive in every checksum, as another version, but it must answer what its network does not find."""
    digests: dict[str, dict[str, int | str]] = {}
    with open_archive(source) as archive, write_archive(target, digests) as writer:
        provenance = archive.provenance
        for name in archive.names():
            content = archive.read(name)
            if name == MANIFEST:
                content = content.replace(b'"modelVersion": "1.0"', f'"modelVersion": "{version}"'.encode())
            if name == "golden/scene.json":
                answer = json.loads(content)
                answer["detections"] = answer["detections"][1:]
                content = json.dumps(answer).encode()
            if name != PROVENANCE:
                writer.add(name, content)
        provenance["entries"] = dict(digests)
        writer.add(PROVENANCE, json.dumps(provenance).encode())
    check_entries(target)
    return target


def marina(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "marina"), *arguments], cwd=folder, capture_output=True, text=True)


def write_parameters(path: Path, store: Store, server: Server) -> list[str]:
    """Of a training that goes on from the weights of shapes; what is given besides on the command line."""
    content = {"store": store.url, "dataset": "drawn", "model_name": "shapes", "model_version": "2.0"}
    content |= {"weights": "base", "model_size": "n", "epochs": 1, "size": 320, "batch": 8, "max_side": 320}
    content |= {"device": "auto", "gpu_timeout": "1s", "require": "map50=0.5", "license": HOSTILE}
    content |= {"server_management": server.address.management, "server_inference": server.address.inference}
    content |= {"server_token_file": str(server.key_file), "server_store_dir": str(server.store_dir)}
    path.write_text(yaml.safe_dump(content))
    return ["--set", "demo_pictures=24", "--set", f"s3_endpoint={os.environ['AWS_ENDPOINT_URL']}"]


def tags(store: Store) -> dict[str, list[str]]:
    """Where the tags of shapes have pointed."""
    moves = store.tags("archives", "shapes")
    return {tag: [move.id for move in moves.history(tag)] for tag in ("latest", "production")}


def test_from_a_data_set_to_production_and_back_under_load(
    store: Store, server: Server, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = repository / "archives" / "shapes"
    picture = (source / "golden" / "scene.jpg").read_bytes()
    first = store.push(server.store_dir / "shapes.mar")
    promote(store, first, "production", None, "it was served before there were gates")
    store.push(source / "shapes.safetensors", "base")
    lines: list[str] = []
    deploy(store, first, server.address, server.store_dir, lines.append)
    assert lines == ["shapes 1.0 is served already"] and len(list(server.store_dir.glob("*.mar"))) == 1
    with pytest.raises(ToolError, match=r"shapes is being served from shapes\.mar, which does not lie in"):
        deploy(store, first, server.address, tmp_path, lines.append)
    assert not list(tmp_path.glob("*.mar"))

    path, folder = tmp_path / "shapes.yaml", tmp_path / "pipelines" / "shapes"
    more = write_parameters(path, store, server)
    with ThreadPoolExecutor() as pool:
        # The endpoint is a parameter, and the scripts' own.
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        running = pool.submit(marina, tmp_path, "pipeline", "run", str(path), *more)
        # It is pushed, and will be deployed. The clients come now: training wants the cores for itself.
        wait_until(lambda: running.done() or (folder / "archive.id").exists())
        with Load(server, "shapes", picture, **DETECTIONS) as load:
            load.wait_for("1.0", 4)
            done = running.result()
            assert done.returncode == 0, done.stdout + done.stderr
            load.wait_for("2.0")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert load.answers.keys() == {"1.0", "2.0"}, load.answers
    assert SECRET not in done.stdout + done.stderr and "THE CPU TRAINS" in done.stdout
    identifier = (folder / "archive.id").read_text().strip()
    assert tags(store) == {"latest": [identifier], "production": [first.id, identifier]}
    evidence = store.find("shapes@latest", "archives").evidence
    assert evidence and [gate.name for gate in evidence.gates] == ["map50"] and not evidence.failed()
    recipe = yaml.safe_load((folder / "run" / "archive.yaml").read_text())
    assert recipe["license"] == HOSTILE and len(recipe["golden"]) == 2
    assert not [*tmp_path.rglob("pwned")]
    assert server.versions("shapes") == {"2.0"} and server.files() == ["shapes 2.0"]
    assert (server.store_dir / f"shapes.mar{REPLACED}").is_file()

    check_that_the_gate_stops(tmp_path, path, folder, more)
    assert tags(store) == {"latest": [identifier], "production": [first.id, identifier]}
    assert [each.id for each in store.manifests(["archives"])] == [first.id, identifier]

    with Load(server, "shapes", picture, **DETECTIONS) as load:
        line = server.deploy_line.replace("NAME@TAG", "shapes@production")
        back = f"marina store rollback shapes production --why worse && {line}"
        environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "MARINA_STORE": store.url}
        subprocess.run(["sh", "-c", back], cwd=tmp_path, env=environment, check=True)
        load.wait_for("1.0")
        assert tags(store)["production"] == [first.id, identifier, first.id]
        assert server.versions("shapes") == {"1.0"} and server.files() == ["shapes 1.0"]

        bad = store.push(other_golden(server.store_dir / f"shapes.mar{REPLACED}", tmp_path / "bad.mar", "1.2"))
        with pytest.raises(ToolError, match=r"shapes 1.2 does not come up: .*Failed to start workers"):
            deploy(store, bad, server.address, server.store_dir, lines.append)
        assert server.default("shapes") == "1.0" and server.versions("shapes") == {"1.0"}
        assert server.files() == ["shapes 1.0"]
        load.wait_for("1.0")
        deploy(store, first, server.address, server.store_dir, lines.append)
        assert lines[-1] == "shapes 1.0 is served already"
        with pytest.raises(ToolError, match=r"shapes 1\.0 is served already, from another folder than"):
            deploy(store, first, server.address, folder, lines.append)
        assert not [*folder.glob("shapes-*.mar")]
    assert load.answers.keys() == {"1.0", "2.0"}, load.answers
    server.command.await_line(r"^worker \d+ of shapes_2\.0 died; .*, unless that version was removed$")


def check_that_the_gate_stops(tmp_path: Path, path: Path, done: Path, more: list[str]) -> None:
    """The same model before a higher gate: as far as its evaluation nothing would be otherwise."""
    worse = tmp_path / "worse"
    shutil.copytree(done, worse)
    for name in ("archive.id", "run.id", "archive.mar", "gate.txt"):
        (worse / name).unlink()
    state = json.loads((worse / STATE).read_text())
    state["parameters"]["require"] = "map50_95=1"
    state["done"] = state["done"][: [step.name for step in STEPS].index("gate")]
    (worse / STATE).write_text(json.dumps(state))
    stopped = marina(
        tmp_path, "pipeline", "run", str(path), "--folder", "worse", "--resume", *more, "--set", "require=map50_95=1"
    )
    assert stopped.returncode == 1
    assert stopped.stderr.startswith("marina: step gate failed: marina: the gate is not passed: map50_95 ")
    assert "gate=Failed" in stopped.stdout and "export=None" in stopped.stdout
    assert "archive: none was pushed, and no tag was moved" in stopped.stdout


# Comes up, and then refuses every picture.
REFUSES = """
def handle(data, context):
    for index in range(len(data or [])):
        context.set_response_status(code=500, phrase="No", idx=index)
    return None if data is None else [b"{}" for _ in data]
"""


def test_what_does_not_come_up_leaves_no_trace_and_answers_under_way_are_waited_for(
    server: Server, tmp_path: Path
) -> None:
    """Requests that take longer than the switch: first with two workers, of which nobody knows what they do."""
    store = Store(str(tmp_path / "store"))

    def push(version: str, handler: str = tiny_archive.HANDLER, config: str = tiny_archive.CONFIG) -> Manifest:
        return store.push(
            tiny_archive.write_archive(tmp_path / "a.mar", "tiny", version=version, handler=handler, config=config)
        )

    def bring(manifest: Manifest) -> None:
        deploy(store, manifest, server.address, server.store_dir, print)

    with pytest.raises(ToolError, match=r"tiny 1.0 does not come up"):
        bring(push("1.0", tiny_archive.FAILS_TO_LOAD))
    assert server.versions("tiny") == set() and server.files() == ["shapes 1.0"]
    bring(
        push(
            "1.1",
            config=tiny_archive.CONFIG.replace("Workers: 1", "Workers: 2").replace("Timeout: 60", "Timeout: 6", 1),
        )
    )
    with Load(server, "tiny", gradient_jpeg(), sleep="1") as load:
        for version in ("1.2", "1.3"):
            load.wait_for("answered", CLIENTS)
            bring(push(version))
            assert server.versions("tiny") == {version}
    assert load.answers.keys() == {"answered"}, load.answers

    (file,) = server.store_dir.glob("tiny*.mar")
    with pytest.raises(ToolError, match=r"tiny 1.4 answers its picture with 500"):
        bring(push("1.4", REFUSES))
    with pytest.raises(ToolError, match=r"give the new archive another version|remove one, or give it another version"):
        bring(push("1.3", tiny_archive.HANDLER + "\n"))
    assert server.versions("tiny") == {"1.3"} and server.default("tiny") == "1.3"
    assert [file] == list(server.store_dir.glob("tiny*.mar"))


@contextmanager
def as_in_the_container(repository: Path) -> Iterator[Address]:
    """A TorchServe with the settings of the image and no model."""
    folder = process.private_folder()
    for name in ("tmp", "logs", "store"):
        (folder / name).mkdir()
    docker = repository / "docker"
    text = (docker / "config.properties").read_text().replace("/opt/torchserve", str(docker))
    text += f"model_store={folder / 'store'}\n"
    text += "grpc_inference_port=0\ngrpc_management_port=0\n"
    inference, management, metrics = (process.bindable_port("127.0.0.1", 0) for _ in range(3))
    for old, new in ((8083, inference), (8081, management), (8082, metrics)):
        text = text.replace(f":{old}\n", f":{new}\n")
    (folder / "config.properties").write_text(text)
    shutil.copy(docker / "log4j2.xml", folder)
    child = process.start(process.command_line(find_java(), folder), folder)
    threading.Thread(target=child.stdout.read, daemon=True).start()
    keys = folder / "key_file.json"
    try:
        wait_until(lambda: child.poll() is not None or (keys.is_file() and keys.read_text().strip() != ""))
        address = Address(f"http://127.0.0.1:{management}", f"http://127.0.0.1:{inference}", read_tokens(keys))
        wait_until(lambda: child.poll() is not None or listens(address))
        yield address
    finally:
        process.kill_group(child)
        shutil.rmtree(folder)


def listens(address: Address) -> bool:
    try:
        return httpx.get(f"{address.management}/models").status_code > 0
    except httpx.TransportError:
        return False


def test_a_server_that_cannot_be_updated_is_one_line(
    server: Server, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, served = Store(str(tmp_path / "store")), tmp_path / "served"
    served.mkdir()
    manifest = store.push(tiny_archive.write_archive(tmp_path / "a.mar", "tiny"))
    with (
        as_in_the_container(repository) as address,
        pytest.raises(ToolError, match="start it by `marina serve --management-port`"),
    ):
        deploy(store, manifest, address, served, print)
    with pytest.raises(ToolError, match=r"refuses the token; give its key_file.json"):
        deploy(store, manifest, replace(server.address, tokens={}), served, print)
    with pytest.raises(ToolError, match=r"another rollout on .* is under way"), alone(served):
        deploy(store, manifest, server.address, served, print)
    for url, problem in ((address.management, "cannot be reached"), ("nowhere", "is no address of a server")):
        with pytest.raises(ToolError, match=problem):
            deploy(store, manifest, Address(url, url, {}), served, print)
    with pytest.raises(ToolError, match="give --store-dir"):
        deploy(store, manifest, address, tmp_path / "nowhere", print)
    (tmp_path / "token").write_text("abc")
    with pytest.raises(ToolError, match="has no key for management and inference"):
        read_tokens(tmp_path / "token")
    assert not list(served.glob("*.mar"))

    serve = ["serve", "--store", str(served), "--port", "0", "--management-port", "0"]
    shutil.copy(tmp_path / "a.mar", served / "a=b.mar")
    for more, problem in (["--no-auth"], "wants tokens"), ([], "no file name may hold ,="):
        assert main([*serve, *more]) == 1
        assert problem in capsys.readouterr().err.splitlines()[-1]


def test_it_ends_when_what_was_deployed_has_answered(server: Server) -> None:
    """The second request waits in TorchServe's queue while the first is with the worker."""
    headers = {"Authorization": f"Bearer {server.address.tokens['inference']}", "Content-Type": "image/jpeg"}
    url = f"{server.address.inference}/predictions/tiny"
    with ThreadPoolExecutor() as pool:
        answers = [
            pool.submit(httpx.post, url, headers=headers | {"sleep": "2"}, content=gradient_jpeg(), timeout=60)
            for _ in range(2)
        ]
        time.sleep(1)
        server.command.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert server.command.end() == 0
    assert "stopped before every answer under way was given" not in server.command.lines
