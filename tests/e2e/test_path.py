"""The whole path: drawn pictures, a short training, an archive, a server that answers."""

import subprocess
import sys
from pathlib import Path

import pytest
from serve_command import Command

pytestmark = pytest.mark.e2e


def marina(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "marina"), *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_drawn_pictures_to_a_server_that_answers(tmp_path: Path, repository: Path) -> None:
    marina(
        tmp_path, "data", "draw", "--output", "shapes", "--pictures", "48", "8", "8", "--width", "128", "--height", "96"
    )
    marina(tmp_path, "train", "--data", "shapes", "--output", "runs/first", "--epochs", "3", "--size", "128")
    printed = marina(tmp_path, "evaluate", "runs/first", "--data", "shapes")
    assert all(name in printed for name in ("circle", "triangle", "ap50"))
    marina(tmp_path, "archive", "build", "runs/first")
    (archive,) = (tmp_path / "model-store").glob("*.mar")
    server = Command(repository, tmp_path / "serve", "--store", str(archive.parent), "--port", "0")
    try:
        url = server.await_line(rf"^{archive.stem} \S+  (http://127\.0\.0\.1:\d+)/predictions/")[1]
        token = server.await_line("^token  (.*)")[1]
        marina(tmp_path, "smoke", url, "--model", archive.stem, "--token-file", token)
    finally:
        server.kill()
