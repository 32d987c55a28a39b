"""Requests of clients that letterbox and suppress by themselves: float32 in, the network's rows out."""

import json

import numpy as np
import pytest
import torch
from model_folder import ask, encode, scene
from numpy.random import default_rng

from handlers.pipeline import Pipeline
from handlers.request import SHAPE_HEADER, TENSOR
from handlers.runtimes.torch import TorchNetwork
from handlers.settings import ANSWER_VARIABLE


def request(pixels: np.ndarray, shape: str | None = None, **headers: str) -> tuple[dict, dict]:
    shape = shape or ",".join(map(str, pixels.shape))
    return {"body": pixels.astype("<f4").tobytes()}, {"content-type": TENSOR, SHAPE_HEADER: shape} | headers


def test_tensors_in_a_batch_get_the_rows_of_the_network(small_pipeline: Pipeline) -> None:
    """Beside a picture and tensors of other shapes, each its own."""
    tensors = [default_rng(seed).random((3, *size)) for seed, size in enumerate([(64, 96), (64, 64), (64, 96)])]
    *answers, picture = ask(small_pipeline, *map(request, tensors), encode(scene(60, 80)))
    network = small_pipeline.network
    assert isinstance(network, TorchNetwork)
    for tensor, answer in zip(tensors, answers, strict=True):
        assert (answer.status, answer.content_type) == (200, TENSOR)
        with torch.inference_mode():
            (expected,) = network.detector(torch.from_numpy(tensor[None].astype(np.float32))).numpy()
        found = np.frombuffer(answer.body, "<f4").reshape(-1, 5 + len(small_pipeline.labels))
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-2)
    assert picture.status == 200
    assert isinstance(json.loads(picture.body), list)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"shape": "640,640"}, 400, "Marina-Shape is '640,640'; send the shape as 3,H,W"),
        ({"shape": "3,-64,64"}, 400, "send the shape as 3,H,W"),
        ({"shape": "1,64,64"}, 400, "this model takes 3 channels, height and width multiples of 32"),
        ({"shape": "3,60,64"}, 400, "the tensor's shape is 3,60,64; this model takes"),
        ({"shape": "3,0,64"}, 400, "multiples of 32"),
        ({"shape": "3,64,96"}, 400, "has 49152 bytes, but float32 of 3,64,96 has 73728"),
        ({"shape": "3,320000,320000"}, 413, "more than the"),
        ({"Marina-Score-Threshold": "0.5"}, 400, "option score_threshold does not go with a tensor"),
    ],
)
def test_a_wrong_tensor_is_one_line(small_pipeline: Pipeline, change: dict, status: int, message: str) -> None:
    wrong, good = ask(small_pipeline, request(np.zeros((3, 64, 64)), **change), request(np.zeros((3, 64, 64))))
    assert (wrong.status, good.status) == (status, 200)
    assert message in json.loads(wrong.body)["message"]


def test_bytes_as_floats_are_refused_and_a_little_overshoot_is_not(small_pipeline: Pipeline) -> None:
    bright, good = ask(small_pipeline, request(scene(64, 64).transpose(2, 0, 1)), request(np.full((3, 64, 64), 1.2)))
    assert (bright.status, good.status) == (400, 200)
    assert "send RGB in 0..1" in json.loads(bright.body)["message"]


@pytest.mark.parametrize("body", [b"", np.full((3, 64, 64), np.nan, "<f4").tobytes(), "text", {"instances": []}])
def test_what_is_no_tensor_is_refused(small_pipeline: Pipeline, body: object) -> None:
    (answer,) = ask(small_pipeline, ({"body": body}, {"Content-Type": TENSOR, SHAPE_HEADER: "3,64,64"}))
    assert answer.status == 400
    assert "tensor" in json.loads(answer.body)["message"]


def test_a_shape_must_be_told(small_pipeline: Pipeline) -> None:
    (answer,) = ask(small_pipeline, ({"body": b"1234"}, {"Content-Type": TENSOR}))
    assert "send the shape as 3,H,W" in json.loads(answer.body)["message"]


def test_an_answer_that_the_server_would_not_send_is_refused(
    small_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ANSWER_VARIABLE, "1000")
    (answer,) = ask(small_pipeline, request(np.zeros((3, 64, 64))))
    assert answer.status == 400
    assert "more than the 1000 that this server sends" in json.loads(answer.body)["message"]
