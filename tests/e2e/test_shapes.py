"""`shapes` as `marina serve` serves it, on each engine: limits, figures, smoke; the demo."""

import base64
import json
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from e2e.conftest import as_instances
from PIL import Image

from tools.serve.base import ModelServer

pytestmark = pytest.mark.e2e

JPEG = {"Content-Type": "image/jpeg"}


def post(server: ModelServer, content: bytes, **headers: str) -> httpx.Response:
    url = server.prediction_url("shapes")
    return httpx.post(url, content=content, headers=server.headers | JPEG | headers, timeout=120)


def picture(server: ModelServer) -> bytes:
    return server.archives[0].image


def test_a_picture_of_twenty_megabytes_and_one_byte(shapes_engine: ModelServer) -> None:
    whole = picture(shapes_engine)
    allowed = whole + bytes(20_000_000 - len(whole))
    assert post(shapes_engine, allowed).status_code == 200
    refused = post(shapes_engine, allowed + b"\0")
    assert (refused.status_code, refused.json()["type"]) == (413, "ImageTooLarge")
    assert "20000001 bytes" in refused.json()["message"]
    as_json = as_instances(base64.b64encode(allowed + b"\0").decode())
    assert post(shapes_engine, as_json, **{"Content-Type": "application/json"}).status_code == 413


def test_a_bomb_costs_nothing(shapes_engine: ModelServer) -> None:
    size = (60_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + bytes(100)
    refused = post(shapes_engine, bomb)
    assert (refused.status_code, refused.json()["type"]) == (413, "ImageTooLarge")
    assert post(shapes_engine, picture(shapes_engine)).status_code == 200


def figures(server: ModelServer) -> Callable[..., float]:
    """What Prometheus would read: the sum of a counter over all series with the labels given."""
    host, transport = f"127.0.0.1:{server.metrics_port}", None
    if server.metrics_port is None:
        host, transport = "metrics", httpx.HTTPTransport(uds=str(server.folder / "metrics.sock"))
    with httpx.Client(transport=transport) as client:
        lines = re.findall(r"^(\w+)\{(.*)\} (\S+)$", client.get(f"http://{host}/metrics").text, re.MULTILINE)
    series = [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in lines]
    return lambda name, **wanted: sum(
        value for found, labels, value in series if found == name and wanted.items() <= labels.items()
    )


def test_figures_reach_prometheus(shapes_engine: ModelServer) -> None:
    """All of them, by themselves after the last request, though many lines are printed at once."""
    before = figures(shapes_engine)
    bodies = [picture(shapes_engine)] * 16 + [b"GIF89a"] * 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: post(shapes_engine, body, **{"Marina-Format": "detections"}), bodies))
    assert [answer.status_code for answer in answers] == [200] * 16 + [400] * 3
    rows = [row for answer in answers[:16] for row in answer.json()["detections"]]
    wanted = {("marina_answers", "type", "ok"): 16, ("marina_answers", "type", "InvalidImage"): 3}
    wanted |= {("marina_detections", "label", label): n for label, n in Counter(row["label"] for row in rows).items()}
    wanted |= {("marina_stage_seconds_count", "stage", stage): 16 for stage in ("decode", "inference", "postprocess")}
    deadline = time.monotonic() + 60
    while True:
        now = figures(shapes_engine)
        grown = all(now(name, **{key: of}) - before(name, **{key: of}) >= n for (name, key, of), n in wanted.items())
        scores = {now("marina_detections"), now("marina_score_count"), now("marina_score_bucket", le="+Inf")}
        stages = {now("marina_stage_seconds_count"), now("marina_stage_seconds_bucket", le="+Inf")}
        if grown and len(scores) == len(stages) == 1:
            break
        assert time.monotonic() < deadline, (scores, stages, wanted)
        time.sleep(0.1)
    assert now("marina_answers", model="shapes", version="1.0") == now("marina_answers")
    assert now("marina_stage_seconds_sum", stage="inference") > 0
    assert "metrics line" not in shapes_engine.log_file.read_text()


def test_smoke_by_command_and_by_script(shapes_engine: ModelServer, repository: Path, tmp_path: Path) -> None:
    token = str(shapes_engine.token_file)
    command = [sys.executable, "-m", "tools.cli", "smoke", shapes_engine.url, "--model", "shapes"]
    assert subprocess.run([*command, "--token-file", token], check=False).returncode == 0
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    (tmp_path / "a.jpg").write_bytes(picture(shapes_engine))
    script = ["sh", repository / "tools/smoke.sh", shapes_engine.url, "shapes", tmp_path / "a.jpg"]
    assert subprocess.run([*script, str(shapes_engine.token)], check=False).returncode == 0
    assert subprocess.run(script, check=False, capture_output=True).returncode != 0


def test_demo(tmp_path: Path) -> None:
    """What `make demo ONCE=1` runs: it prints the answer, saves the picture, and leaves nothing running."""
    command = [sys.executable, "-m", "tools.demo", "--once", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}\n") + 1])
    assert answer["model"] == "shapes"
    assert len(answer["detections"]) > 2
    assert Image.open(tmp_path / "demo-output/shapes.jpg").size == (answer["width"], answer["height"])
    token_file = re.search(r"(\S+)/token\b", done.stdout)
    assert token_file is not None
    assert not Path(token_file[1]).exists()
