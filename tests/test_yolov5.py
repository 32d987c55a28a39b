"""YOLOv5 against the numbers of the original program; real/README.md has the rules and tolerances."""

import hashlib
import json
from functools import cache

import numpy as np
import pytest
import torch
from model_folder import yolov5_weights

from handlers.weights import load_state, read_safetensors
from model_defs import build
from model_defs.yolov5 import VARIANTS
from tools.checkpoint import open_checkpoint, write_safetensors


@cache
def read_json(path):
    return json.loads(path.read_text())


def build_on_meta(size):
    with torch.device("meta"):
        return build("yolov5", 80, size=size)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", VARIANTS)
def test_names_shapes_and_counts(shared, size):
    expected = read_json(shared / "real/numeric/yolov5_sizes.json")[size]
    model = build_on_meta(size)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected["state_dict"]
    assert list(model.state_dict()) == list(expected["state_dict"])
    assert parameters(model) == expected["parameters"]
    assert model.stride == max(expected["stride"]) and list(model.head.strides) == expected["stride"]
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(expected["bn_eps"], expected["bn_momentum"])}
    model.fuse()
    assert parameters(model) == expected["parameters_after_conv_bn_fusion"]


def close(found, reference):
    """Within 1e-4 of the map's standard deviation plus 1e-5, at 64 places and on the whole."""
    found = found.double()
    tolerance = 1e-4 * reference["std"] + 1e-5
    sample = found.flatten()[reference["sample_flat_index"]].numpy()
    assert found.numel() == reference["numel"]
    assert np.abs(sample - np.array(reference["sample"])).max() <= tolerance
    for statistic in ("mean", "std", "min", "max"):
        value = found.std(correction=0) if statistic == "std" else getattr(found, statistic)()
        assert abs(value.item() - reference[statistic]) <= tolerance


@pytest.mark.parametrize("size", VARIANTS)
def test_rule_made_weights_give_the_reference_outputs(shared, size):
    reference = read_json(shared / "real/numeric/yolov5_formula_weights_outputs.json")
    expected = reference["sizes"][size]
    pattern = 2 * np.random.default_rng(7).standard_normal((1, 3, 32, 32), dtype=np.float32)
    pixels = pattern.repeat(8, axis=2).repeat(8, axis=3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == reference["input_sha256"]

    model = build_on_meta(size)
    state = yolov5_weights(model.state_dict(), reference["gain"][size])
    for name, tensor in build("yolov5", 80, size="n6" if size.endswith("6") else "n").state_dict().items():
        if name.endswith("anchors"):  # these stay, and are the same in all sizes of a kind
            state[name] = tensor
    model.load_state_dict(
        {name: torch.tensor(0) if tensor.is_meta else tensor for name, tensor in state.items()}, assign=True
    )
    model.eval()
    with torch.inference_mode():
        for step in (lambda: None, model.fuse):
            step()
            raw = model.raw(torch.from_numpy(pixels))
            decoded = model.head.decode(raw)
            assert [list(level.shape) for level in raw] == expected["raw_shapes"]
            assert list(decoded.shape) == expected["decoded_shape"]
            for found, wanted in zip([*raw, decoded], [*expected["raw"], expected["decoded"]], strict=True):
                close(found, wanted)


@pytest.fixture(scope="module")
def yolov5n(shared, tmp_path_factory):
    """The official weights, by way of the import tool and the handler's reader."""
    path = tmp_path_factory.mktemp("yolov5n") / "yolov5n.safetensors"
    with open_checkpoint(shared / "real/agpl/yolov5n.pt") as checkpoint:
        write_safetensors(path, checkpoint.tensors)
    return read_safetensors(path)


def load(state):
    model = build("yolov5", 80, size="n")
    load_state(model, state)
    return model.eval()


@pytest.mark.parametrize("size", ["640x640", "320x448"])
def test_yolov5n_gives_the_outputs_of_the_original(shared, yolov5n, size):
    folder = shared / "real/numeric"
    statistics = read_json(folder / "yolov5n_outputs.json")[size]
    height, width = map(int, size.split("x"))
    seed = int(statistics["unfused"]["input_recipe"].split("default_rng(")[1].split(")")[0])
    pixels = np.random.default_rng(seed).random((1, 3, height, width), dtype=np.float32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == statistics["unfused"]["input_sha256"]
    rows = np.load(folder / f"yolov5n_{size}_decoded_rows_step25_fp32.npy")
    model = load(yolov5n)
    with torch.inference_mode():
        for kind in ("unfused", "fused"):
            if kind == "fused":
                model.fuse()
            raw = model.raw(torch.from_numpy(pixels))
            decoded = model.head.decode(raw)
            found = decoded[0, ::25].numpy()
            assert np.abs(found[:, :4] - rows[:, :4]).max() <= 0.005
            assert np.abs(found[:, 4:] - rows[:, 4:]).max() <= 1e-5
            for level, (logits, step) in enumerate(zip(raw, (8, 4, 2), strict=True)):
                cells = np.load(folder / f"yolov5n_{size}_raw_p{level + 3}_cells_step{step}_fp16.npy")
                assert np.abs(logits[0, :, ::step, ::step].numpy() - cells).max() <= 0.01
            references = [*statistics[kind]["raw"], statistics[kind]["decoded"]]
            for tensor, reference in zip([*raw, decoded], references, strict=True):
                assert list(tensor.shape) == reference["shape"]
                assert tensor.double().sum().item() == pytest.approx(reference["sum"], rel=1e-5)


def test_fused_weights_load_and_answer_alike(yolov5n):
    model = load(yolov5n)
    model.fuse()
    fused = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not any(".bn." in name for name in fused)
    again = load(fused)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(pixels), again(pixels))
        again.optimise()  # a second time changes nothing
        assert torch.equal(model(pixels), again(pixels))


def by_score(boxes, labels, scores):
    order = scores.argsort()
    return boxes[order], labels[order], scores[order]


@pytest.mark.parametrize("threshold", [1e-3, 0.01, 1.0])
def test_candidates_are_the_best_class_of_each_row(yolov5n, threshold):
    """Of a batch, against the whole of what the head decodes; in cells where nothing may be, that is not computed."""
    model = load(yolov5n)
    pixels = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = model(pixels)
        found = model.candidates(pixels, threshold)
        computed, _ = model.rows_above(pixels, torch.tensor(0.01))
    assert len(found) == 3
    assert len(computed) < decoded[..., 0].numel() / 2
    for rows, each in zip(decoded, found, strict=True):
        best, classes = (rows[:, 5:] * rows[:, 4:5]).max(dim=1)
        keep = best > threshold
        boxes = torch.cat((rows[keep, :2] - rows[keep, 2:4] / 2, rows[keep, :2] + rows[keep, 2:4] / 2), dim=1)
        expected = by_score(boxes, classes[keep], best[keep])
        for one, other in zip(by_score(*each), expected, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-3 if one is each.boxes else 1e-5)


def test_with_multi_label_a_row_is_a_candidate_for_every_class_above_the_threshold(yolov5n):
    model = load(yolov5n)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = model(pixels)
        found = model.candidates(pixels, 1e-4, multi_label=True)
        best = model.candidates(pixels, 1e-4)
    for rows, many, one in zip(decoded, found, best, strict=True):
        expected = rows[:, 5:] * rows[:, 4:5]
        assert torch.allclose(many.scores.sort().values, expected[expected > 1e-4].sort().values, rtol=1e-4)
        assert len(many.scores) == len(many.labels) == len(many.boxes) > len(one.scores)
        kept = {(label, score) for label, score in zip(many.labels.tolist(), many.scores.tolist(), strict=True)}
        assert kept >= {(label, score) for label, score in zip(one.labels.tolist(), one.scores.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "q"}, "unknown YOLOv5 size 'q'; use one of n, s, m, l, x, n6"),
        ({}, "'yolov5' does not take these arguments"),
        ({"size": "n", "depth": 3}, "'yolov5' does not take these arguments"),
        ({"size": "n", "num_classes": 3}, "'yolov5' does not take these arguments"),
        ({"size": ["n"]}, "'yolov5' does not take these arguments"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("yolov5", 80, **arguments)


def test_unknown_definition_is_refused():
    with pytest.raises(ValueError, match="unknown model definition 'yolov9'; use one of yolov5, fasterrcnn_"):
        build("yolov9", 80)


@pytest.mark.parametrize("num_classes", [1, 2, 300])
def test_any_number_of_classes(num_classes):
    model = build("yolov5", num_classes, size="n").eval()
    assert model.classes_in(model.state_dict()) == num_classes
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 252, 5 + num_classes)
    assert all(bias.isfinite().all() for bias in model.state_dict().values())
