"""`marina smoke` and tools/smoke.sh against servers that misbehave in one way each; both must say the same."""

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.serve.store import gradient_jpeg

REFUSAL = (400, json.dumps({"code": 400, "type": "InvalidImage", "message": "no picture"}))
TOKEN = "s3cret_-"
NO_TOKEN = (400, json.dumps({"code": 400, "type": "InvalidKeyException", "message": "Token Authentication failed"}))


class Answers(BaseHTTPRequestHandler):
    """Answers as the class attributes say; resets the connection after an answer from 400 up, as TorchServe does."""

    health = (200, '{"status": "Healthy"}')
    prediction = (200, '[\n  {"dog": [1, 2, 3, 4], "score": 0.9}\n]')
    refusal = REFUSAL
    wants_token = False

    def do_GET(self) -> None:
        self.answer(self.health)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(self.prediction if body == gradient_jpeg() else self.refusal)

    def answer(self, answer: tuple[int, str]) -> None:
        if self.wants_token and self.headers["Authorization"] != f"Bearer {TOKEN}":
            answer = NO_TOKEN
        status, text = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        if status >= 400:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server with the given answers and returns its URL."""
    servers = []

    def start(**answers: object) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Changed", (Answers,), answers))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["python", "shell"])
def smoke(
    request: pytest.FixtureRequest, repository: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess]:
    picture, token_file = tmp_path / "picture.jpg", tmp_path / "token"
    picture.write_bytes(gradient_jpeg())

    def run(url: str, token: str | None = None) -> subprocess.CompletedProcess:
        if request.param == "python":
            token_file.write_text(f"{token}\n")
            options = ["--image", str(picture), *(["--token-file", str(token_file)] if token else [])]
            command = [sys.executable, "-m", "tools.cli", "smoke", url, "--model", "tiny", *options]
        else:
            command = [
                "sh",
                str(repository / "tools" / "smoke.sh"),
                url,
                "tiny",
                str(picture),
                *([token] if token else []),
            ]
        return subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)

    return run


def test_good_server(serve: Callable[..., str], smoke: Callable[..., subprocess.CompletedProcess]) -> None:
    ran = smoke(serve() + "/")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["ok  health", "ok  prediction", "ok  refusal"]


def test_token(serve: Callable[..., str], smoke: Callable[..., subprocess.CompletedProcess]) -> None:
    url = serve(wants_token=True)
    assert smoke(url, TOKEN).returncode == 0
    without = smoke(url)
    assert without.returncode == 1
    assert "Token Authentication failed" in without.stderr


@pytest.mark.parametrize(
    ("answers", "said", "lines"),
    [
        ({"health": (500, '{"status": "Unhealthy"}')}, "500", 0),
        ({"prediction": (404, '{"message": "Model not found: tiny"}')}, "Model not found: tiny", 1),
        ({"prediction": (200, '{"dog": 1}')}, "JSON list", 1),
        ({"prediction": (503, "")}, "503", 1),
        ({"refusal": (200, "[]")}, "200", 2),
        ({"refusal": (503, REFUSAL[1])}, "503", 2),
        ({"refusal": (400, "bad")}, "code", 2),
    ],
)
def test_first_wrong_answer_ends_it(
    answers: dict[str, object],
    said: str,
    lines: int,
    serve: Callable[..., str],
    smoke: Callable[..., subprocess.CompletedProcess],
) -> None:
    ran = smoke(serve(**answers))
    assert ran.returncode == 1
    assert said in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert len(ran.stdout.splitlines()) == lines


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:8080"])
def test_no_server(url: str, smoke: Callable[..., subprocess.CompletedProcess]) -> None:
    ran = smoke(url)
    assert ran.returncode == 1
    assert url in ran.stderr or "127.0.0.1" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_wrong_calls_of_the_script(repository: Path, tmp_path: Path) -> None:
    script = ["sh", str(repository / "tools" / "smoke.sh")]
    for arguments in ([], ["http://127.0.0.1:9", "tiny", str(tmp_path / "none.jpg")]):
        ran = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)
        assert ran.returncode == 2
        assert ran.stderr


def test_missing_token_file(repository: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.cli",
        "smoke",
        "http://127.0.0.1:9",
        "--model",
        "m",
        "--token-file",
        "/none",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert (ran.returncode, ran.stderr) == (1, "marina: /none cannot be read (No such file or directory)\n")
