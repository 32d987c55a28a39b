"""Archives in a stock TorchServe: its own launcher, none of our code installed, other archives beside ours; and the
same requests to the same archives on the engine asgi."""

import base64
import concurrent.futures
import io
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from e2e.conftest import (
    Stock,
    as_instances,
    recipe_with,
    same_detections,
    start_stock,
    wait_until_answers,
)
from PIL import Image
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from tools.archive.build import build_archive
from tools.serve.asgi.server import AsgiServer

pytestmark = pytest.mark.e2e

JPEG = {"Content-Type": "image/jpeg"}
CLASSES = 5
MODEL_PY = f"""
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_320_fpn

class Detector(FasterRCNN):
    def __init__(self):
        built = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes={CLASSES})
        self.__dict__ = built.__dict__
"""


def rule_made_weights(path: Path) -> None:
    """A Faster R-CNN that finds something everywhere: weights drawn by a rule from the name of each."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=CLASSES)
    for name, value in model.state_dict().items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape), dtype=np.float32)
        if value.ndim == 4:
            draw = draw * np.sqrt(0.8 / value[0].numel())
        elif value.ndim == 2:
            confidence = 12 if "cls_score" in name else 2
            draw = draw * confidence / np.sqrt(value.shape[1])
        elif name.endswith("running_var"):
            draw = 0.5 + abs(draw)
        elif name.endswith("weight"):
            draw = 1 + 0.1 * draw
        else:
            draw = 0.1 * draw
        if not name.endswith("num_batches_tracked"):
            value.copy_(torch.from_numpy(np.asarray(draw)))
    torch.save(model.state_dict(), path)


@pytest.fixture(scope="module")
def picture(repository: Path) -> bytes:
    return (repository / "archives/shapes/golden/scene.jpg").read_bytes()


@pytest.fixture(scope="module")
def store(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    store = root / "store"
    shapes = recipe_with(
        root / "shapes", repository / "archives/shapes", serving={"batch_size": 8, "max_batch_delay_ms": 200}
    )
    build_archive(shapes, store / "shapes.mar")

    weights, labels = root / "weights.pth", {"0": "__background__"} | {str(i): f"thing{i}" for i in range(1, CLASSES)}
    rule_made_weights(weights)
    (root / "index_to_name.json").write_text(json.dumps(labels))
    ours = recipe_with(
        root / "ours",
        repository / "archives/fasterrcnn-aquarium",
        name="ours",
        model={"definition": "fasterrcnn_mobilenet_v3_large_320_fpn"},
        labels="../index_to_name.json",
    )
    build_archive(ours, store / "ours.mar", weights)
    (root / "model.py").write_text(MODEL_PY)
    command = [Path(sys.executable).with_name("torch-model-archiver"), "--model-name", "theirs", "--version", "1.0"]
    command += ["--model-file", root / "model.py", "--serialized-file", weights, "--handler", "object_detector"]
    command += ["--extra-files", root / "index_to_name.json", "--export-path", store]
    subprocess.run(command, check=True, env={"TMPDIR": str(tmp_path_factory.mktemp("archiver"))})
    return store


@pytest.fixture(scope="module")
def torchserve(
    stock_environment: Path, store: Path, picture: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stock]:
    for server in start_stock(stock_environment, store, tmp_path_factory.mktemp("run") / "run"):
        for model in ("shapes", "ours", "theirs"):
            wait_until_answers(server, model, picture)
        yield server


@pytest.fixture(scope="module")
def asgi(store: Path) -> Iterator[Stock]:
    with AsgiServer(store, ["shapes", "ours"], port=0, auth=False) as server:
        yield Stock(server.url, server.log_file, "asgi")


@pytest.fixture(scope="module", params=["torchserve", "asgi"])
def stock(request: pytest.FixtureRequest) -> Stock:
    return request.getfixturevalue(request.param)


def test_detects_without_our_code(stock: Stock, picture: bytes, repository: Path) -> None:
    answer = stock.post("shapes", content=picture, headers=JPEG)
    assert answer.headers["content-type"] == "application/json"
    expected = json.loads((repository / "archives/shapes/golden/scene.json").read_text())["detections"]
    found = [set(row) - {"score"} for row in answer.json()]
    assert found == [{row["label"]} for row in expected]


def test_drop_in_for_the_built_in_object_detector(stock: Stock, torchserve: Stock, picture: bytes) -> None:
    ours = stock.post("ours", content=picture, headers=JPEG).json()
    theirs = torchserve.post("theirs", content=picture, headers=JPEG).json()
    assert len(theirs) > 5
    assert same_detections(theirs, ours)


def test_options_by_every_way(stock: Stock, picture: bytes) -> None:
    url, b64 = f"{stock.url}/predictions/shapes", base64.b64encode(picture).decode()
    plain = stock.post("shapes", content=picture, headers=JPEG).json()
    assert len(plain) > 1
    ways = {
        "header": httpx.post(url, content=picture, headers=JPEG | {"mArInA-Max-Detections": "1"}),
        "multipart": httpx.post(url, files={"data": picture}, data={"max_detections": "1"}),
        "member": httpx.post(url, content=as_instances(b64, max_detections=1), headers=JSON),
        "bare member": httpx.post(url, json={"b64": b64, "max_detections": 1}),
        "query": httpx.post(
            f"{stock.url}/models/shapes/invoke?max_detections=1", files={"body": ("a.jpg", picture, "image/jpeg")}
        ),
        "raw query": httpx.post(
            f"{stock.url}/models/shapes/invoke", params={"max_detections": "1"}, content=picture, headers=JPEG
        ),
        "invocations": httpx.post(
            f"{stock.url}/invocations?model_name=shapes&max_detections=1", content=picture, headers=JPEG
        ),
    }
    for way, answer in ways.items():
        assert answer.status_code == 200, (way, answer.text)
        value = answer.json()["predictions"][0] if way == "member" else answer.json()
        assert same_detections(value, plain[:1]), way


JSON = {"Content-Type": "application/json"}


def test_refusals(stock: Stock, picture: bytes) -> None:
    wrong = {
        "empty": (400, "EmptyBody", {"content": b"", "headers": JPEG}),
        "text": (
            415,
            "UnsupportedMedia",
            {"content": b"not a picture, just text", "headers": {"Content-Type": "text/plain"}},
        ),
        "truncated": (400, "InvalidImage", {"content": picture[: len(picture) // 2], "headers": JPEG}),
        "wrong field": (400, "EmptyBody", {"files": {"image": picture}}),
        "bad base64": (400, "InvalidImage", {"content": as_instances("@@@"), "headers": JSON}),
        "bad JSON": (400, "InvalidImage", {"content": b'{"instances": [', "headers": JSON}),
        "unknown option": (400, "InvalidOption", {"content": picture, "headers": JPEG | {"Marina-Colour": "red"}}),
        "range": (400, "InvalidOption", {"content": picture, "headers": JPEG | {"Marina-Score-Threshold": "2"}}),
        "class": (400, "InvalidOption", {"content": picture, "headers": JPEG | {"Marina-Classes": "unicorn"}}),
        "explain": (400, "InvalidOption", {"content": picture, "headers": JPEG, "path": "explanations"}),
    }
    for name, (status, kind, request) in wrong.items():
        answer = stock.post("shapes", **request)
        assert (answer.status_code, answer.json()["type"]) == (status, kind), (name, answer.text)
        assert answer.json()["code"] == status
        assert "\n" not in answer.json()["message"]


def test_neighbours_in_a_batch_do_not_matter(stock: Stock, picture: bytes) -> None:
    """Eight at once, of which TorchServe makes a batch; each gets what it gets alone."""
    image = Image.open(io.BytesIO(picture))
    rgba, grey, rotated, huge = (io.BytesIO() for _ in range(4))
    image.convert("RGBA").save(rgba, "PNG")
    image.convert("L").save(grey, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(rotated, "JPEG", exif=exif)
    image.resize((6000, 4000)).save(huge, "JPEG")
    one = io.BytesIO()
    Image.new("RGB", (1, 1)).save(one, "PNG")
    bodies = [picture[:1000], b"GIF89a", grey.getvalue(), rgba.getvalue(), rotated.getvalue(), one.getvalue()]
    requests = [(body, JPEG) for body in [*bodies, huge.getvalue()]]
    requests.append((picture, JPEG | {"Marina-Score-Threshold": "0.9", "Marina-Format": "coco"}))

    def ask(request: tuple[bytes, dict[str, str]]) -> httpx.Response:
        return stock.post("shapes", content=request[0], headers=request[1])

    alone = [ask(request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, requests))
    assert [answer.status_code for answer in alone] == [400, 400, 200, 200, 200, 200, 200, 200]
    assert [answer.status_code for answer in together] == [answer.status_code for answer in alone]
    for one, other in zip(alone[:2] + alone[7:], together[:2] + together[7:], strict=True):
        assert one.json() == other.json()
    # Pictures of one shape share a forward pass, which may round the last digit otherwise.
    for one, other in zip(alone[2:7], together[2:7], strict=True):
        assert same_detections(one.json(), other.json(), 0.005)


def test_formats(stock: Stock, picture: bytes) -> None:
    answers = {
        name: stock.post("shapes", content=picture, headers=JPEG | {"Marina-Format": name})
        for name in ("torchserve", "detections", "coco", "yolo", "image")
    }
    assert all(answer.status_code == 200 for answer in answers.values())
    count = len(answers["torchserve"].json())
    assert len(answers["detections"].json()["detections"]) == len(answers["coco"].json()) == count
    assert len(answers["yolo"].text.splitlines()) == count
    assert answers["image"].headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answers["image"].content)).size == Image.open(io.BytesIO(picture)).size


def test_curl_lines_as_printed(stock: Stock, picture: bytes, tmp_path: Path) -> None:
    """The ways in which people post pictures from a shell."""
    (tmp_path / "dog.jpg").write_bytes(picture)
    expected = stock.post("shapes", content=picture, headers=JPEG).json()
    url = f"{stock.url}/predictions/shapes"

    def curl(*arguments: str) -> list | dict:
        done = subprocess.run(["curl", "-sS", *arguments], cwd=tmp_path, capture_output=True, check=True)
        return json.loads(done.stdout)

    assert same_detections(curl(url, "-T", "dog.jpg"), expected)
    assert same_detections(curl("-X", "POST", url + "/1.0", "-T", "dog.jpg"), expected)
    assert same_detections(curl(url, "-F", "data=@dog.jpg"), expected)
    assert same_detections(curl(url, "--data-binary", "@dog.jpg", "-H", "Content-Type: image/jpeg"), expected)
    # Bytes with a stray per cent sign are no form either: TorchServe refuses those before it asks the handler.
    assert b"%" in picture
    told = {"torchserve": "ErrorDataDecoderException", "asgi": "EmptyBody"}[stock.engine]
    assert curl(url, "--data-binary", "@dog.jpg")["type"] == told
    Image.new("RGB", (8, 8)).save(tmp_path / "dot.png")
    assert b"%" not in (tmp_path / "dot.png").read_bytes()
    refused = curl(url, "--data-binary", "@dot.png")
    assert refused["type"] == "EmptyBody"
    assert "-H 'Content-Type: image/jpeg'" in refused["message"]
