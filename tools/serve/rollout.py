"""Replaces an archive on a running TorchServe by way of its management API, without losing a request.

register the new version -> it answers its golden picture -> default -> the old one is drained -> unregistered

Until the new version answers, the old one is the default, and stays it if anything fails. A worker of an archive that
Marina built is ready once it has given all its golden answers, so that a version with other answers never is.

The server's own start must allow it: `enable_model_api=true`, and a management address that can be reached. TorchServe
unregisters a version with what its workers are about, and tells of nobody how many requests are under way, hence
`_drain`.
"""

import fcntl
import json
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tools.archive.companions import remove_with_companions
from tools.archive.reader import open_archive
from tools.errors import ToolError
from tools.serve.base import WORKER_IMPORT_S
from tools.serve.store import Served, find_archives

TIMEOUT_S = 30
# What of a model's description a queue is seen in, and how long one that is empty must stay so.
LOOK_S = 0.25
LOOKS = 2
# For requests that name the old version, and may never end.
DRAIN_S = 300
LOCK = ".marina-rollout.lock"
OURS = re.compile(r".+-[0-9a-f]{12}\.mar")
REPLACED = ".replaced"

Report = Callable[[str], object]


@dataclass(frozen=True)
class Address:
    """Where a server is asked. management, inference: URLs. tokens: by the name of the API, empty without any."""

    management: str
    inference: str
    tokens: dict[str, str]


def file_name(name: str, version: str, sha256: str) -> str:
    """Of an archive in a server's model store; another content has another one."""
    return f"{name}-{version}-{sha256[:12]}.mar"


def read_tokens(path: Path | None) -> dict[str, str]:
    """The keys in the key_file.json that TorchServe writes at its start. Raises ToolError for anything else."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {api: str(content[api]["key"]) for api in ("management", "inference")}
    except OSError as error:
        raise ToolError(f"token file {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ToolError(
            f"{path} has no key for management and inference; give the key_file.json of the server's working folder"
        ) from error


@contextmanager
def alone(store_dir: Path) -> Iterator[None]:
    """No other rollout on the same model store. Raises ToolError when there is one, or no such folder."""
    try:
        lock = (store_dir / LOCK).open("w")
    except OSError as error:
        raise ToolError(f"model store {store_dir} cannot be written ({error.strerror}); give --store-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolError(f"another rollout on {store_dir} is under way; wait for it") from None
        yield


def roll_out(address: Address, archive: Path, report: Report) -> bool:
    """Have the server serve `archive`, which lies in its model store, as the default version of its model.

    False when it does so already. report: called with a line for each step. Raises ToolError or BadArchive; the server
    then serves what it did.
    """
    with open_archive(archive) as opened:
        name, workers = opened.name, opened.config.get("minWorkers", 1)
    (served,) = (each for each in find_archives(archive.parent, [name]) if each.path == archive.absolute())
    with _Model(address, served, workers) as model:
        old = model.default()
        if old is not None and not (archive.parent / Path(old["modelUrl"]).name).is_file():
            raise ToolError(
                f"{served.name} is being served from {old['modelUrl']}, which does not lie in {archive.parent}; give"
                " the server's own model store with --store-dir"
            )
        if old is not None and old["modelVersion"] == served.version:
            if Path(old["modelUrl"]).name != archive.name:
                raise ToolError(
                    f"{served} is being served from {old['modelUrl']}, with other content; give the new archive another"
                    " version in its recipe"
                )
            return False
        try:
            model.register(archive.name)
            report(f"{served}: registered, its workers are up")
            model.ask(served.version)
            report(f"{served}: answers {'its golden picture' if served.is_golden else 'a picture'}")
            model.set_default(served.version)
            model.ask(None)
            report(f"{served}: is the default")
        except BaseException:
            model.undo(old)
            raise
        if old is not None:
            _remove(model, old, archive.parent, report)
        return True


def _remove(model: "_Model", old: dict[str, Any], store_dir: Path, report: Report) -> None:
    """Take the old version away, and out of the folder, from which a restart would serve it again."""
    version = old["modelVersion"]
    if not model.drain(version, old):
        report(f"{model.served.name} {version}: is still asked for by its version, and stays beside the new one")
        return
    model.unregister(version)
    file = store_dir / Path(old["modelUrl"]).name
    with suppress(FileNotFoundError):
        if OURS.fullmatch(file.name):
            remove_with_companions(file)
        else:
            file.rename(file.with_name(file.name + REPLACED))
    report(f"{model.served.name} {version}: drained and removed")


class _Model:
    """The versions of one model on a server; `served` is the new one, which starts with that many workers."""

    def __init__(self, address: Address, served: Served, workers: int):
        self.served = served
        self._workers = workers
        self._address = address
        self._name = urllib.parse.quote(served.name, safe="")
        self._management, self._inference = (
            httpx.Client(base_url=url.rstrip("/"), headers=_headers(address.tokens.get(api)), trust_env=False)
            for api, url in (("management", address.management), ("inference", address.inference))
        )

    def __enter__(self) -> "_Model":
        return self

    def __exit__(self, *error: object) -> None:
        self._management.close()
        self._inference.close()

    def default(self) -> dict[str, Any] | None:
        """TorchServe's description of the default version; None when the server has no such model."""
        answer = self._manage("GET", f"/models/{self._name}", accept=(200, 404))
        return self._description(answer) if answer.status_code == 200 else None

    def register(self, file: str) -> None:
        """Returns when the workers are up. A version that a rollout has left that was cut off is taken as it is."""
        versions = self._manage("GET", f"/models/{self._name}/all", accept=(200, 404))
        if versions.status_code == 200:
            for version in versions.json():
                if version["modelVersion"] == self.served.version:
                    if Path(version["modelUrl"]).name == file and version["workers"]:
                        return
                    self.unregister(self.served.version)
        wait = WORKER_IMPORT_S + self.served.startup_timeout
        options = {"url": file, "initial_workers": str(self._workers), "synchronous": "true"}
        try:
            self._manage("POST", "/models", params=options, timeout=wait)
        except ToolError as error:
            raise ToolError(f"{self.served} does not come up: {error}") from error

    def ask(self, version: str | None) -> None:
        """Raises ToolError unless the version (None: the default) answers the new archive's picture with 200."""
        answer = self._picture(version)
        if answer.status_code != 200:
            raise ToolError(f"{self.served} answers its picture with {answer.status_code} {_short(answer)}")

    def set_default(self, version: str) -> None:
        self._manage("PUT", f"/models/{self._name}/{_quoted(version)}/set-default")

    def unregister(self, version: str) -> None:
        self._manage("DELETE", f"/models/{self._name}/{_quoted(version)}", accept=(200, 404))

    def undo(self, old: dict[str, Any] | None) -> None:
        """As it was before, as far as the server still answers: the error under way is the one to be told."""
        with suppress(ToolError):
            if old is not None:
                self.set_default(old["modelVersion"])
        with suppress(ToolError):
            self.unregister(self.served.version)

    def drain(self, version: str, old: dict[str, Any]) -> bool:
        """Wait until no request for this version is under way; False when they do not end.

        The queue can be seen. What has left it is with a worker: a single one answers in order, so a picture that is
        sent now is answered after all others; of several nobody can tell, but none takes longer than its timeout.
        """
        deadline = time.monotonic() + DRAIN_S
        looks = 0
        while looks < LOOKS:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
            answer = self._manage("GET", f"/models/{self._name}/{_quoted(version)}")
            queued = self._description(answer)["jobQueueStatus"]["pendingRequests"]
            looks = 0 if queued else looks + 1
        if len(old["workers"]) == 1:
            self._picture(version)
        else:
            time.sleep(old["responseTimeout"])
        return True

    def _picture(self, version: str | None) -> httpx.Response:
        served = self.served
        path = f"/predictions/{self._name}" + (f"/{_quoted(version)}" if version else "")
        wait = served.startup_timeout + served.response_timeout
        return self._send(
            self._inference,
            "POST",
            path,
            content=served.image,
            headers={"Content-Type": served.content_type},
            timeout=wait,
        )

    def _manage(self, method: str, path: str, accept: tuple[int, ...] = (200,), **options: Any) -> httpx.Response:
        answer = self._send(self._management, method, path, **{"timeout": TIMEOUT_S, **options})
        if answer.status_code in accept:
            return answer
        if answer.status_code == 405:
            raise ToolError(
                f"{self._address.management} takes no models while it runs; start it by `marina serve"
                " --management-port`, or a TorchServe of your own with enable_model_api=true"
            )
        if "InvalidKeyException" in answer.text:
            raise ToolError(f"{self._address.management} refuses the token; give its key_file.json with --token-file")
        raise ToolError(
            f"{self._address.management} answers {method} {path} with {answer.status_code} {_short(answer)}; the"
            " server's log tells why"
        )

    def _send(self, client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return client.request(method, path, **options)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ToolError(
                f"{client.base_url} is no address of a server ({error}); give one such as http://127.0.0.1:8081"
            ) from error
        except httpx.TimeoutException as error:
            raise ToolError(f"{client.base_url} does not answer {method} {path}; see the server's log") from error
        except httpx.TransportError as error:
            raise ToolError(
                f"{client.base_url} cannot be reached ({error}); is the server up, the port right?"
            ) from error

    def _description(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            (description,) = answer.json()
            return dict(description)
        except (ValueError, TypeError) as error:
            raise ToolError(
                f"{self._address.management} is no management API of TorchServe ({_short(answer)})"
            ) from error


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")


def _short(answer: httpx.Response) -> str:
    return " ".join(answer.text.split())[:300] or "(empty)"
