import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng

import model_defs
from handlers.weights import load_state, read_safetensors
from model_defs.contract import Detections
from tools.data.draw import CLASSES
from tools.train import shapes
from tools.train.shapes import average_precision, draw_batch, evaluate, hits, save_weights


def test_two_steps_leave_weights_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert shapes.main(f"--output {output} --steps 2 --batch 2 --threads 1 --pictures 3".split()) == 0
    assert sorted(path.name for path in output.iterdir()) == ["index_to_name.json", "shapes.safetensors"]
    labels = json.loads((output / "index_to_name.json").read_text())
    assert labels == {str(index): name for index, name in enumerate(CLASSES)}
    assert "mAP50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("--steps 0", "--steps is 0"), ("--steps 1 --start missing.safetensors", "missing.safetensors cannot be read")],
)
def test_bad_arguments_are_one_line(
    arguments: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shapes.main(f"--output {tmp_path} --threads 1 {arguments}".split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("marina: ")
    assert named in error
    assert error.count("\n") == 1


def test_loss_that_is_not_finite_stops_and_keeps_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shapes.safetensors").write_bytes(b"earlier")
    assert shapes.main(f"--output {tmp_path} --steps 30 --batch 1 --threads 1 --rate 1e30".split()) == 1
    assert "lower --rate" in capsys.readouterr().err
    assert (tmp_path / "shapes.safetensors").read_bytes() == b"earlier"


def test_saved_weights_load_and_go_on(tmp_path: Path) -> None:
    model = model_defs.build("yolov5", len(CLASSES), size="n")
    save_weights(model, tmp_path / "a.safetensors")
    other = model_defs.build("yolov5", len(CLASSES), size="n")
    load_state(other, read_safetensors(tmp_path / "a.safetensors"))
    for key, value in model.state_dict().items():
        assert torch.allclose(other.state_dict()[key], value, rtol=1e-3, atol=1e-6), key
    assert (tmp_path / "a.safetensors").stat().st_size < 8_000_000


def test_targets_of_a_batch_lie_on_their_shapes() -> None:
    """Inside its box a picture is not all padding, and boxes lie inside the canvas."""
    images, targets = draw_batch(default_rng(3), count=6, stride=32)
    count, _, height, width = images.shape
    assert count == 6
    assert height % 32 == 0
    assert width % 32 == 0
    assert set(targets[:, 0].tolist()) == set(range(6))
    low, high = targets[:, 2:4] - targets[:, 4:6] / 2, targets[:, 2:4] + targets[:, 4:6] / 2
    assert (low >= 0).all()
    assert (high <= torch.tensor((width, height)) + 1e-3).all()
    grey = shapes.PAD_VALUE / 255
    for index, _, x, y, _, _ in targets.tolist():
        assert (images[int(index), :, int(y), int(x)] - grey).abs().max() > 1e-3


def test_a_detection_hits_one_object_of_its_class() -> None:
    truth = torch.tensor([[0, 0, 0, 10, 10], [1, 20, 20, 40, 40.0]])
    boxes = torch.tensor([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 40, 41], [20, 20, 40, 40], [20, 20, 40, 29.0]])
    found = Detections(boxes, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    assert hits(found, truth) == [True, False, False, True, False]
    nothing = Detections(boxes[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert hits(nothing, truth) == []


def test_average_precision_of_known_rankings() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, np.array([1, 1, 1, 1]), 4) == 1
    assert average_precision(scores, np.array([1, 0, 1, 0]), 4) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(scores[::-1], np.array([0, 1, 0, 1]), 4) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(scores, np.array([1, 0, 1, 1]), 3) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
    assert average_precision(scores, np.array([0, 0, 0, 0]), 4) == 0
    assert average_precision(scores[:0], np.zeros(0), 4) == 0
    assert math.isnan(average_precision(scores, np.zeros(4), 0))


def test_committed_weights_find_shapes(repository: Path) -> None:
    archive = repository / "archives" / "shapes"
    model = model_defs.build("yolov5", len(CLASSES), size="n")
    load_state(model, read_safetensors(archive / "shapes.safetensors"))
    model.requires_grad_(False).eval()
    assert evaluate(model, 20)["mAP50"] > 0.9
    assert list(json.loads((archive / "index_to_name.json").read_text()).values()) == list(CLASSES)
