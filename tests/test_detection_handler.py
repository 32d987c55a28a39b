"""The entry module under TorchServe's own loader, context and request decoding."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import ts
import yaml
from model_folder import LABELS, encode, scene
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
from ts.service import Service
from ts.torch_handler.vision_handler import VisionHandler
from ts.utils.util import list_classes_from_module

import handlers
from handlers import detection_handler
from handlers.errors import BadSettings

PICTURE = encode(scene(240, 320))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(folder, monkeypatch):
    """As a worker does: the entry module at the root of the extracted archive, found by its name."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "detection_handler", raising=False)
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs/metrics.yaml"))
    metrics.initialize_cache()
    loader = ModelLoaderFactory.get_model_loader()
    return loader.load("small", str(folder), "detection_handler.py", None, 8, None, True, metrics)


@pytest.fixture
def folder(small_model, tmp_path):
    source, config = small_model
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    shutil.copy(Path(handlers.__file__).with_name("detection_handler.py"), tmp_path)
    (tmp_path / "model-config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "MAR-INF").mkdir()
    manifest = {"model": {"modelName": "small", "handler": "detection_handler.py", "configFile": "model-config.yaml"}}
    (tmp_path / "MAR-INF/MANIFEST.json").write_text(json.dumps(manifest))
    yield tmp_path
    sys.modules.pop("detection_handler", None)


def request(body, name="body", **headers):
    """One request as the server's front end sends it to a worker."""
    return {
        "requestId": b"1",
        "headers": [
            {"name": key.replace("_", "-").encode(), "value": value.encode()} for key, value in headers.items()
        ],
        "parameters": [{"name": name, "contentType": headers.get("Content_Type", ""), "value": body}],
    }


def predict(service, *requests):
    """Body, content type and status of each request in one batch."""
    processors, rows, ids = Service.retrieve_data_for_inference(requests)
    context = service.context
    context.request_ids = context.metrics.request_ids = ids
    context.request_processor = processors
    bodies = service._entry_point(rows, context)
    assert len(bodies) == len(requests)
    indices = range(len(bodies))
    return [(bodies[i], context.get_response_content_type(i), context.get_response_status(i)) for i in indices]


def test_the_module_has_the_one_class_that_torchserve_looks_for():
    assert list_classes_from_module(detection_handler) == [detection_handler.DetectionHandler]
    assert issubclass(detection_handler.DetectionHandler, VisionHandler)
    assert not hasattr(detection_handler, "handle")
    # A built-in of the same name would hide our own import errors.
    with pytest.raises(ImportError):
        importlib.import_module("ts.torch_handler.detection_handler")


def test_every_item_has_its_own_answer_type_and_status(folder, monkeypatch):
    service = load(folder, monkeypatch)
    answers = predict(
        service,
        request(bytearray(PICTURE)),
        request(bytearray(b"text")),
        request(bytearray(PICTURE), Marina_Format="yolo"),
        request(bytearray(PICTURE[:500]), name="data"),
        request(bytearray(PICTURE), marina_format="image"),
        request(bytearray(PICTURE), MARINA_SCORE_THRESHOLD="2"),
        request(bytearray(b"")),
        request({"instances": [{"b64": "?"}]}, Content_Type="application/json"),
    )
    json_type, image, text = "application/json", "image/jpeg", "text/plain; charset=utf-8"
    assert [answer[1] for answer in answers] == [json_type, json_type, text, json_type, image, *[json_type] * 3]
    assert [answer[2][0] for answer in answers] == [200, 415, 200, 400, 200, 400, 400, 400]
    assert len(json.loads(answers[0][0])) == 300
    assert answers[4][0].startswith(b"\xff\xd8")
    kinds = {1: "UnsupportedMedia", 3: "InvalidImage", 5: "InvalidOption", 6: "EmptyBody", 7: "InvalidImage"}
    for index, kind in kinds.items():
        body, _, (status, phrase) = answers[index]
        error = json.loads(body)
        assert (error["code"], error["type"]) == (status, kind)
        # The wire counts the characters of a phrase where it means bytes.
        assert phrase.isascii() and re.fullmatch(r"[A-Za-z ]+", phrase)
    assert all(isinstance(answer[0], bytes) for answer in answers)


def test_describe_and_explain_concern_their_own_item(folder, monkeypatch):
    """TorchServe puts these headers on; its own handler lets the first item decide for all."""
    service = load(folder, monkeypatch)
    for order in ([0, 1, 2], [2, 1, 0]):
        requests = [
            request(bytearray(PICTURE)),
            request(bytearray(b""), describe="True"),
            request(bytearray(PICTURE), explain="True"),
        ]
        answers = predict(service, *(requests[index] for index in order))
        plain, described, explained = (answers[order.index(index)] for index in range(3))
        assert (plain[2][0], described[2][0], explained[2][0]) == (200, 200, 400)
        assert json.loads(described[0])["labels"] == LABELS
        assert json.loads(explained[0])["type"] == "InvalidOption"
        assert len(json.loads(plain[0])) == 300


def test_load_fails_with_the_cause(folder, monkeypatch):
    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    config["handler"]["postprocess"] = {"score_threshold": 2}
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(BadSettings, match=r"handler\.postprocess: score_threshold is 2\.0, outside of 0 to 1"):
        load(folder, monkeypatch)
