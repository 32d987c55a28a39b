"""The official weights over HTTP against the official code's answers."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from handlers.request import SHAPE_HEADER, TENSOR
from tools.serve.base import ModelServer

pytestmark = [pytest.mark.e2e, pytest.mark.real]

SETTINGS = {
    "square640_conf0.25_iou0.45": "yolov5n-square",
    "rect640_conf0.25_iou0.45": "yolov5n-rect",
}


def photographs(shared: Path) -> dict[str, Path]:
    real = shared / "real"
    return {path.name: path for path in [*(real / "photos").glob("*.jpg"), *(real / "agpl").glob("*.jpg")]}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_photograph_has_the_reference_boxes(
    setting: str,
    coco_engine: ModelServer,
    ask_photograph: Callable[[ModelServer, str, Path], httpx.Response],
    shared: Path,
) -> None:
    reference = json.loads((shared / "real/reference/photos_detections.json").read_text())["detections"][setting]
    pictures = photographs(shared)
    problems = []
    assert len(reference) == 28
    for name, expected in reference.items():
        answer = ask_photograph(coco_engine, SETTINGS[setting], pictures[name])
        assert answer.status_code == 200, answer.text
        problems += [f"{name}: {problem}" for problem in compare(expected, answer.json())]
    assert not problems


def compare(expected: list[dict], answer: dict) -> list[str]:
    """What breaks the bounds: identical sets where nothing was resized, else every clear box close."""
    exact = max(answer["width"], answer["height"]) == 640
    found = answer["detections"]
    iou = box_iou(_boxes(expected), _boxes(found))
    same_class = torch.tensor([[e["class_id"] == f["index"] for f in found] for e in expected]).reshape(iou.shape)
    iou = torch.where(same_class.bool(), iou, 0.0)
    problems, used = [], set()
    for row, one in enumerate(expected):
        order = [column for column in iou[row].argsort(descending=True).tolist() if column not in used]
        match = order[0] if order and iou[row, order[0]] >= 0.5 else None
        if match is None:
            problems += [f"lost {one}"] if exact or one["score"] >= 0.35 else []
            continue
        used.add(match)
        other = found[match]
        shift = max(abs(a - b) for a, b in zip(one["box"], other["box"], strict=True))
        drift = abs(one["score"] - other["score"])
        if exact and (shift > 0.05 or drift > 0.001):
            problems.append(f"{one} became {other}")
        if one["score"] >= 0.35 and (iou[row, match] < 0.95 or drift > 0.02):
            problems.append(f"{one} became {other}")
    extra = [f for i, f in enumerate(found) if i not in used and (exact or f["score"] >= 0.35)]
    return problems + [f"gained {one}" for one in extra]


def _boxes(rows: list[dict]) -> torch.Tensor:
    return torch.tensor([row["box"] for row in rows], dtype=torch.float32).reshape(-1, 4)


def test_tensors_get_the_rows_of_the_original(coco_engine: ModelServer, shared: Path) -> None:
    """Eight at once, whose answers are together larger than TorchServe takes one for."""
    folder = shared / "real/numeric"
    recipe = json.loads((folder / "yolov5n_outputs.json").read_text())["640x640"]["unfused"]["input_recipe"]
    seed = int(recipe.split("default_rng(")[1].split(")")[0])
    pixels = np.random.default_rng(seed).random((1, 3, 640, 640), dtype=np.float32)
    expected = np.load(folder / "yolov5n_640x640_decoded_rows_step25_fp32.npy")
    headers = coco_engine.headers | {"Content-Type": TENSOR, SHAPE_HEADER: "3,640,640"}

    def ask(_: int) -> httpx.Response:
        return httpx.post(
            coco_engine.prediction_url("yolov5n-square"), content=pixels.tobytes(), headers=headers, timeout=300
        )

    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(ask, range(8)):
            assert (answer.status_code, answer.headers["content-type"]) == (200, TENSOR)
            rows = np.frombuffer(answer.content, "<f4").reshape(-1, 85)[::25]
            assert np.abs(rows[:, :4] - expected[:, :4]).max() <= 0.05
            assert np.abs(rows[:, 4:] - expected[:, 4:]).max() <= 1e-4
