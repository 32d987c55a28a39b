"""torchvision's detectors under the contract, against torchvision itself and its stored reference results."""

import json
import socket
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from model_folder import scene
from PIL import Image
from torchvision.models import detection

from handlers.boxes import select
from handlers.options import Options
from handlers.weights import load_state
from model_defs import DEFINITIONS, build
from model_defs.contract import Detections

TORCHVISION = [name for name in DEFINITIONS if name != "yolov5"]
REFERENCED = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]


def weights(state, conv_gain):
    """By the rule of real/README.md, so that they are the same everywhere."""
    made = {}
    for name, old in state.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        shape = tuple(old.shape)
        if not shape or name.endswith("num_batches_tracked"):
            made[name] = old
            continue
        if name.endswith("running_var"):
            made[name] = torch.from_numpy(0.5 + generator.random(shape, dtype=np.float32))
            continue
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 4:
            values *= np.sqrt(conv_gain / np.prod(shape[1:]), dtype=np.float32)
        elif len(shape) == 2:
            values *= np.sqrt(4 / shape[1], dtype=np.float32)
        else:
            values = values * np.float32(0.1) + (1 if name.endswith("weight") else 0)
        made[name] = torch.from_numpy(values)
    return made


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("building or loading a model must not reach for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def _no_random_start(monkeypatch):
    """Seconds a model, for numbers that are overwritten by those made by rule."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "normal_", "uniform_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


def own_limits(model):
    """Where torchvision keeps threshold, suppression and limit."""
    return model.roi_heads if hasattr(model, "roi_heads") else model


def options_of(limits):
    return Options(limits.score_thresh, limits.nms_thresh, limits.detections_per_img, False, None, "detections")


def photo(shared):
    with Image.open(shared / "real/photos/bus.jpg") as file:
        return torch.from_numpy(np.array(file)).permute(2, 0, 1).float() / 255


@cache
def references(path):
    return json.loads(path.read_text())["models"]


@pytest.mark.parametrize("definition", REFERENCED)
def test_reference_results(shared, definition):
    reference = references(shared / "real/numeric/torchvision_reference.json")[definition]
    detector = build(definition, 91).eval()
    assert len(detector.state_dict()) == reference["state_dict_tensors"]
    assert sum(parameter.numel() for parameter in detector.parameters()) == reference["parameters"]
    load_state(detector, weights(detector.state_dict(), reference["conv_gain"]))
    detector.optimise()
    seen = {}
    detector.model.transform.register_forward_hook(lambda *call: seen.update(resized=call[-1][0].tensors))
    detector.model.backbone.register_forward_hook(lambda *call: seen.update(features=call[-1]))
    with torch.device("meta"):
        original = options_of(own_limits(getattr(detection, definition)(weights=None, weights_backbone=None)))
    with torch.inference_mode():
        (found,) = detector.candidates(photo(shared)[None], original.score_threshold)

    assert list(seen["resized"].shape) == reference["resized_input_shape"]
    for feature, expected in zip(seen["features"].values(), reference["backbone"], strict=True):
        assert list(feature.shape) == expected["shape"]
        for statistic in ("mean", "std", "min", "max"):
            value = feature.double().std(correction=0) if statistic == "std" else getattr(feature, statistic)()
            assert value.item() == pytest.approx(expected[statistic], rel=1e-4, abs=1e-4 * expected["std"])
    # ssd300's weights saturate: hundreds of candidates score 1 and any of them may stand for its neighbours.
    chosen = found if definition == "ssd300_vgg16" else select(found, original)
    if definition != "ssd300_vgg16":
        assert len(chosen.scores) == reference["num_detections"]
    matched = [has(chosen, expected) for expected in reference["detections"]]
    assert sum(matched) >= 0.95 * len(matched)


def has(found: Detections, expected, pixels=0.5, score=0.001):
    near = (found.boxes - torch.as_tensor(expected["box"])).abs().amax(dim=1) <= pixels
    alike = (found.scores - expected["score"]).abs() <= score
    return bool((near & alike & (found.labels == expected["label"])).any())


# Small pictures and few proposals, for the sake of time.
SMALL = {"min_size": 128, "max_size": 192}
ARGUMENTS = {
    name: {} if name.startswith("ssd") else SMALL | ({"rpn_post_nms_top_n_test": 60} if "rcnn" in name else {})
    for name in TORCHVISION
}


@pytest.mark.parametrize("definition", TORCHVISION)
def test_answers_equal_torchvisions_own_model(definition):
    """Box for box, with a number of classes of our own, at two settings of threshold, suppression and limit."""
    detector = build(definition, 7, **ARGUMENTS[definition]).eval()
    own = getattr(detection, definition)(weights=None, weights_backbone=None, num_classes=7, **ARGUMENTS[definition])
    # Scores well apart: where two are equal, which of two neighbours stays is anyone's choice.
    state = weights(detector.state_dict(), conv_gain=1.3 if "mobilenet" in definition else 0.8)
    load_state(detector, dict(state))
    own.eval().load_state_dict(state, assign=True)
    picture = torch.from_numpy(scene(90, 130)).permute(2, 0, 1).float() / 255
    limits = own_limits(own)
    for iou, most in ((limits.nms_thresh, limits.detections_per_img), (0.2, 40)):
        limits.nms_thresh, limits.detections_per_img = iou, most
        with torch.inference_mode():
            (expected,) = own([picture])
            (candidates,) = detector.candidates(picture[None], limits.score_thresh)
        options = options_of(limits)
        found = select(candidates, options)
        assert 10 < len(found.scores) <= most
        assert (found.labels > 0).all()
        if definition.startswith("fasterrcnn"):
            for part, tensor in found._asdict().items():
                assert torch.equal(tensor, expected[part])
        else:
            ours, theirs = rows(*found), rows(*(expected[part][expected["labels"] > 0] for part in found._fields))
            assert sum(row in ours for row in theirs) >= 0.95 * len(theirs)
            # torchvision's limit counts the background, which we leave out.
            assert len(ours) == (most if len(expected["scores"]) == most else len(theirs))
        limits.score_thresh = expected["scores"].max().item() / 2
    with torch.inference_mode():
        (before,) = detector.candidates(picture[None], limits.score_thresh)
        detector.optimise()
        (after,) = detector.candidates(picture[None], limits.score_thresh)
    best = before.scores.argsort(descending=True)[:100].tolist()
    wanted = [{"box": before.boxes[i], "score": before.scores[i], "label": before.labels[i]} for i in best]
    assert (
        sum(has(after, row, 0.01, 1e-4) for row in wanted) >= 0.95 * len(wanted) > 5
    )  # made-up weights give near-ties


def rows(boxes, labels, scores):
    """As a set: among equal scores, the order is anyone's."""
    return sorted(zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True))


@pytest.fixture(scope="module")
def ssdlite():
    detector = build("ssdlite320_mobilenet_v3_large", 5).eval()
    load_state(detector, weights(detector.state_dict(), conv_gain=1.3))
    return detector


def test_candidates_keep_nothing_of_earlier_thresholds_and_neighbours(ssdlite):
    pictures = torch.rand(2, 3, 60, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        many = ssdlite.candidates(pictures, 0.0)
        middle = many[0].scores.median().item()
        few = ssdlite.candidates(pictures, middle)
        again = ssdlite.candidates(pictures[:1], 0.0)
    for all_of_them, best in zip(many, few, strict=True):
        assert len(best.scores) == (all_of_them.scores > middle).sum() < len(all_of_them.scores)
        assert (best.scores > middle).all()
    assert torch.allclose(again[0].scores, many[0].scores, atol=1e-5)


def test_classes_are_counted_in_the_weights():
    for definition in TORCHVISION:
        with torch.device("meta"):
            detector = build(definition, 13)
        assert detector.classes_in(detector.state_dict()) == 13
        assert detector.classes_in({}) is None
        assert detector.has_background and not detector.letterbox


def test_batch_norm_eps_is_set_where_it_is_asked_for():
    def found(**arguments):
        with torch.device("meta"):
            model = build("fasterrcnn_mobilenet_v3_large_320_fpn", 3, **arguments)
        return {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)}

    assert found(batch_norm_eps=0.0) == {0.0}
    assert found(batch_norm_eps=0.25) == {0.25}
    assert 0.0 not in found()


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights": "DEFAULT"},
        {"weights_backbone": "DEFAULT"},
        {"num_classes": 3},
        {"min_sise": 600},
        {"nms_thresh": 0.3},
    ],
)
def test_arguments_that_are_not_its_own_are_refused(arguments):
    with pytest.raises(ValueError, match="does not take these arguments"):
        build("ssdlite320_mobilenet_v3_large", 5, **arguments)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 160), (160, 1), (3, 480), (1, 161), (161, 1), (7, 1200), (49, 7840), (49, 7841)]
)
def test_check_size_refuses_exactly_what_cannot_be_resized(size):
    detector = thin_detector()
    height, width = size
    try:
        detector.check_size(height, width)
    except ValueError as error:
        message = str(error)
        assert f"{width}x{height} pixels is less than one pixel thin" in message
        assert 160 * min(size) <= max(size)
        return
    with torch.inference_mode():
        (found,) = detector.candidates(torch.zeros(1, 3, height, width), 0.05)
    assert found.boxes.shape[1] == 4


@cache
def thin_detector():
    detector = build("fasterrcnn_mobilenet_v3_large_320_fpn", 3, min_size=96, max_size=160).eval()
    load_state(detector, weights(detector.state_dict(), conv_gain=1.3))
    return detector


def test_check_size_takes_anything_where_the_size_is_fixed(ssdlite):
    for size in ((1, 1), (1, 5000), (5000, 1)):
        ssdlite.check_size(*size)
        with torch.inference_mode():
            ssdlite.candidates(torch.zeros(1, 3, *size), 0.5)


@pytest.mark.parametrize("definition", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_float32_whatever_the_layers_compute_in(definition, dtype):
    detector = build(definition, 3).eval()
    load_state(detector, weights(detector.state_dict(), conv_gain=1.3))
    anchors = []
    generator = detector.model.rpn.anchor_generator if "faster" in definition else detector.model.anchor_generator
    generator.register_forward_hook(lambda *call: anchors.append(call[-1][0]))
    image = torch.from_numpy(scene(320, 320)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        detector.candidates(image, 0.01)
        with torch.autocast("cpu", dtype):
            (found,) = detector.candidates(image, 0.01)
    assert len(found.scores) and found.boxes.dtype == found.scores.dtype == torch.float32
    assert torch.equal(*anchors)
    options = Options(0.01, 0.5, 100, class_agnostic=False, classes=None, format="detections")
    assert len(select(found, options).scores)
