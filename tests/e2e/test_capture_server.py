"""A real TorchServe that keeps pictures: in a folder, and in a bucket whose server never answers."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2e.conftest import recipe_with
from numpy.random import default_rng
from PIL import Image

from tools.archive.build import build_archive
from tools.archive.inspect import as_table, inspect_archive
from tools.data.draw import draw_scene
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e

PATIENCE_S = 60
# More than wait in the queue, and the few that fail meanwhile.
MANY = 40


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def server(repository: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    root = tmp_path_factory.mktemp("capture")
    keep = {"near_threshold": 0.05, "classes": ["star"], "empty": True, "random": 1.0}
    for name, to in (("folder", str(kept)), ("hanging", "s3://bucket/prefix")):
        recipe = recipe_with(
            root / name,
            repository / "archives" / "shapes",
            name=name,
            response={"format": "detections"},
            capture={"to": to, "keep": keep, "blur": {"classes": ["circle"]}},
        )
        build_archive(recipe, root / "store" / f"{name}.mar")
    with socket.create_server(("127.0.0.1", 0)) as nobody, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
        environment.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        environment.delenv("MARINA_CAPTURE_TO", raising=False)
        with TorchServe(root / "store", port=0) as server:
            yield server


def outcomes(server: TorchServe, model: str) -> dict[str, float]:
    """As Prometheus reads them, those that are not zero."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(server.folder / "metrics.sock"))) as client:
        lines = re.findall(r"^marina_capture\{(.*)\} (\S+)$", client.get("http://metrics/metrics").text, re.MULTILINE)
    labels = [(dict(re.findall(r'(\w+)="(.*?)"', text)), float(value)) for text, value in lines]
    return {found["outcome"]: value for found, value in labels if found["model"] == model and value}


def post(client: httpx.Client, server: TorchServe, model: str, **request: object) -> dict:
    answer = client.post(server.prediction_url(model), headers=server.headers, timeout=120, **request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def jpeg(seed: int, shapes: int = 8, side: int = 160) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    draw_scene(default_rng(seed), side, side, shapes)[0].save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_pictures_and_what_was_found_in_them_lie_in_the_folder(server: TorchServe, kept: Path) -> None:
    nothing, *some = jpeg(0, shapes=0), jpeg(1), jpeg(2)
    with httpx.Client() as client:
        answers = [
            post(client, server, "folder", content=nothing),
            post(client, server, "folder", files={"data": ("../../name.jpg", some[0], "image/jpeg")}),
            *post(client, server, "folder", json={"instances": [{"b64": base64.b64encode(some[1]).decode()}]})[
                "predictions"
            ],
            post(client, server, "folder", content=nothing),
        ]
        refused = client.post(server.prediction_url("folder"), headers=server.headers, content=some[0][:300])
        assert refused.status_code == 400
    # Not the golden picture, which the server has asked for already.
    deadline = time.monotonic() + PATIENCE_S
    while (found := outcomes(server, "folder")) != {"stored": 3, "duplicate": 1}:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    records = [json.loads(path.read_text()) for path in sorted(kept.glob("*/*.json"))]
    files = {path.name for path in kept.glob("*/*")}
    assert files == {f"{record['id']}{suffix}" for record in records for suffix in (".jpg", ".json")}
    for record, answer in zip(records, answers, strict=False):
        assert record["detections"] == answer["detections"]
        found = {row["label"] for row in answer["detections"]}
        assert ("class:star" in record["reasons"]) == ("star" in found)
        assert ("empty" in record["reasons"]) == (not found)
        assert "random" in record["reasons"]
        assert record["blurred"] or "circle" not in found
        assert (record["model"], record["version"], record["score_threshold"]) == ("folder", "1.0", 0.4)
        assert re.fullmatch(r"[0-9a-f]{64}", record["checksum"])
        stored = (kept / record["time"][:10] / record["image"]).read_bytes()
        assert b"secret" not in stored
        assert Image.open(io.BytesIO(stored)).size == (record["width"], record["height"]) == (160, 160)
    assert records[0]["reasons"] == ["empty", "random"]


def test_inspect_tells_that_pictures_are_kept(server: TorchServe, kept: Path) -> None:
    line = f"capture     keeps up to 100 pictures an hour in {kept}: near_threshold 0.05, classes ['star'], empty True"
    assert line in as_table(inspect_archive(server.store / "folder.mar"))


def test_a_bucket_that_never_answers_costs_no_answer(server: TorchServe) -> None:
    with httpx.Client() as client:
        for seed in range(MANY):
            post(client, server, "hanging", content=jpeg(seed, side=64))
    deadline = time.monotonic() + PATIENCE_S
    while not outcomes(server, "hanging").get("queue_full"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert set(outcomes(server, "hanging")) <= {"queue_full", "failed"}
    assert "sesame" not in server.log_file.read_text()
