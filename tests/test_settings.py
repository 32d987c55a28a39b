"""The handler's section of model-config.yaml: taken whole, or refused with the key's name."""

import copy
import json
from dataclasses import asdict

import pytest

from handlers.errors import BadSettings
from handlers.settings import Exported, Golden, Settings, parse_settings

SECTION = {
    "name": "pets",
    "version": "1.0",
    "model": {"definition": "yolov5", "args": {"size": "n"}},
    "weights": "model.safetensors",
    "labels": "index_to_name.json",
    "preprocess": {"size": 320, "shape": "square"},
    "postprocess": {"score_threshold": 0.3, "iou_threshold": 1, "max_detections": 10, "class_agnostic": True},
    "limits": {"max_bytes": 1000, "max_pixels": 2000},
    "response": {"format": "coco"},
    "runtime": {"backend": "torch", "precision": "fp32", "shape": "dynamic"},
    "device": "cpu",
    "golden": [{"image": "golden/a.jpg", "detections": "golden/a.json"}],
}


def changed(path, value):
    section = copy.deepcopy(SECTION)
    *way, last = path.split(".")
    place = section
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return section


def test_settings_are_taken_and_written_back():
    found = parse_settings(SECTION)
    assert isinstance(found, Settings)
    assert json.loads(json.dumps(asdict(found))) == SECTION | {"exported": None, "capture": None}
    assert found.golden == (Golden("golden/a.jpg", "golden/a.json"),)
    assert type(found.postprocess.iou_threshold) is float


def test_an_exported_network_brings_what_its_file_does_not_tell():
    exported = {
        "has_background": False, "letterbox": True, "stride": 32, "outputs": ["rows", "pictures"], "single": False,
        "machine": None, "sides": None,
    }  # fmt: skip
    section = SECTION | {"runtime": {"backend": "onnx", "precision": "fp32", "shape": "fixed"}, "exported": exported}
    found = parse_settings(section)
    assert found.exported == Exported(False, True, 32, ("rows", "pictures"), False)
    assert json.loads(json.dumps(asdict(found))) == section | {"capture": None}


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"backend": "onnx", "precision": "int8"}, "precision is int8, but onnx has fp32"),
        ({"backend": "torch", "shape": "fixed"}, "shape is fixed, but torch takes every shape"),
    ],
)
def test_an_engine_has_its_own_precisions_and_shapes(runtime, message):
    with pytest.raises(BadSettings, match=message):
        parse_settings(SECTION | {"runtime": runtime})


def test_parts_have_defaults():
    found = parse_settings(SECTION | {"preprocess": {}, "postprocess": {}, "limits": {}, "response": {}, "runtime": {}})
    assert (found.preprocess.size, found.preprocess.shape) == (640, "rect")
    assert asdict(found.postprocess) == {
        "score_threshold": 0.25, "iou_threshold": 0.45, "max_detections": 300, "class_agnostic": False
    }  # fmt: skip
    assert asdict(found.limits) == {"max_bytes": 20_000_000, "max_pixels": 50_000_000}
    assert found.response.format == "torchserve"


@pytest.mark.parametrize("key", SECTION)
def test_every_key_has_to_be_there(key):
    with pytest.raises(BadSettings, match=rf"^handler\.{key}: missing$"):
        parse_settings(changed(key, KeyError))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("treshold", 1, r"handler\.treshold: unknown setting; known here: name, version"),
        ("postprocess.nms", 1, r"handler\.postprocess\.nms: unknown setting; known here: score_threshold, "),
        ("model.definition", KeyError, r"handler\.model\.definition: missing"),
        ("golden.0.image", KeyError, r"handler\.golden\[0\]\.image: missing"),
        ("golden", {}, r"handler\.golden: {} is not a list"),
        ("golden", ["a.jpg"], r"handler\.golden\[0\]: 'a.jpg' is not a mapping"),
        ("version", 1.0, r"handler\.version: 1.0 is float, not str"),
        ("model.args", None, r"handler\.model\.args: None is NoneType, not dict"),
        ("preprocess", None, r"handler\.preprocess: None is not a mapping"),
        ("preprocess.size", "640", r"handler\.preprocess\.size: '640' is str, not int"),
        ("preprocess.size", True, r"handler\.preprocess\.size: True is bool, not int"),
        ("preprocess.size", 16, r"handler\.preprocess: size is 16, outside of 32 to 8192"),
        ("preprocess.shape", "stretch", r"handler\.preprocess\.shape: 'stretch' is not one of rect, square"),
        ("postprocess.score_threshold", 2, r"handler\.postprocess: score_threshold is 2.0, outside of 0 to 1"),
        ("postprocess.iou_threshold", float("nan"), r"handler\.postprocess: iou_threshold is nan, outside of 0 to 1"),
        ("postprocess.max_detections", 1001, r"handler\.postprocess: max_detections is 1001, outside of 1 to 1000"),
        ("postprocess.class_agnostic", "no", r"handler\.postprocess\.class_agnostic: 'no' is str, not bool"),
        ("limits.max_bytes", 0, r"handler\.limits: max_bytes is 0, outside of 1 to"),
        ("limits.max_pixels", -1, r"handler\.limits: max_pixels is -1, outside of 1 to"),
        ("response.format", ["coco"], r"handler\.response\.format: \['coco'\] is not one of torchserve, "),
        ("runtime.precision", "fp8", r"handler\.runtime\.precision: 'fp8' is not one of fp32"),
        ("device", "tpu", r"handler\.device: 'tpu' is not one of auto, cpu, gpu"),
    ],
)
def test_wrong_settings_are_named(path, value, message):
    with pytest.raises(BadSettings, match=f"^{message}") as caught:
        parse_settings(changed(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [None, [], "yolov5"])
def test_no_section(section):
    with pytest.raises(BadSettings, match="no `handler` section"):
        parse_settings(section)
