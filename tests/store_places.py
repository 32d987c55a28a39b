"""S3 servers and things to push, for the tests of the store."""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import boto3

BUCKET = "models"
KEY, SECRET = "key", "secret"

# One request at a time: with threads, moto looks whether an object is there and writes it in two steps.
MOTO = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
print(server.port, flush=True)
server.serve_forever()
"""


def credentials(endpoint: str, secret: str = SECRET) -> dict[str, str]:
    """What a store finds its server by, for the environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def client(endpoint: str):
    return boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET)


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The endpoint of a server of its own that keeps `If-None-Match` and takes any credentials."""
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def rclone() -> str | None:
    """The program, where it is installed."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.is_file() else shutil.which("rclone")


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[str]:
    """The endpoint of a server that looks at credentials and does not keep `If-None-Match`, on a folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(folder)]
    environment = os.environ | {"RCLONE_CONFIG": os.devnull}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def line_that_breaks(endpoint: str, after: int) -> Iterator[str]:
    """An endpoint that leads to another and is dead once that many bytes went up."""
    host, port = endpoint.removeprefix("http://").split(":")
    left = [after]
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                left[0] -= len(data) if counted else 0
                if left[0] < 0:
                    # As a server that dies does it: a client may wait for ever on a line that is half closed.
                    source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    source.close()
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                if left[0] < 0:
                    near.close()
                    continue
                far = socket.create_connection((host, int(port)))
                for pair in ((near, far, True), (far, near, False)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def write_zip(path: Path, size: int, seed: int = 0) -> Path:
    """A zip of that many bytes, about, which no two seeds have the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        block = bytes((seed + index) % 251 for index in range(1 << 16))
        file.writestr("a.bin", block * (size // len(block) + 1))
    return path


def write_run(folder: Path) -> Path:
    """What a training run leaves, by name; with names of files that a shell would stumble over."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 1\n")
    (folder / "best.safetensors").write_bytes(b"weights")
    (folder / "pictures" / 'it\'s $(date) "é".jpg').write_bytes(b"picture")
    (folder / "empty").write_bytes(b"")
    return folder
