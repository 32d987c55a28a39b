"""Weights: the safetensors reader against the safetensors package, and what does not fit a network."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from handlers.errors import BadArchive
from handlers.weights import DTYPES, load_state, read_safetensors
from model_defs import build


def raw(header, data=b"\0" * 16, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build("yolov5", 3, size="n").state_dict()


def test_every_type_is_read_as_the_package_writes_it(tmp_path):
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.arange(6).reshape(2, 3)
        tensors[name] = (values % 2 == 0) if dtype is torch.bool else values.to(dtype)
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_changed_in_memory_stays_out_of_the_file(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    read_safetensors(tmp_path / "a.safetensors")["a"] += 1
    assert read_safetensors(tmp_path / "a.safetensors")["a"].sum() == 0


LYING = {
    "empty": b"",
    "short": b"\1\0\0",
    "no header": raw(b""),
    "header beyond the file": raw({}, length=10**12),
    "negative header": b"\xff" * 8 + b"{}",
    "no JSON": raw(b"{nope}"),
    "no text": raw(b"\xff\xfe\xfd"),
    "nested without end": raw(b'{"a":' + b"[" * 100_000),
    "a list": raw([]),
    "a number": raw(b"12345"),
    "tensor is a number": raw({"a": 5}),
    "tensor is a list": raw({"a": []}),
    "no dtype": raw({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "unknown dtype": raw(entry(dtype="F7")),
    "dtype is a list": raw(entry(dtype=["F32"])),
    "too few bytes": raw(entry(shape=[5])),
    "beyond the end": raw(entry(shape=[5], offsets=[0, 20])),
    "before the beginning": raw(entry(offsets=[-16, 0])),
    "backwards": raw(entry(shape=[0], offsets=[16, 0])),
    "one offset": raw(entry(offsets=[16])),
    "offsets are text": raw(entry(offsets="ab")),
    "offsets are fractions": raw(entry(offsets=[0.0, 16.0])),
    "negative sides": raw(entry(shape=[-2, -2])),
    "negative side of nothing": raw(entry(shape=[0, -1], offsets=[0, 0])),
    "sides are fractions": raw(entry(shape=[4.0])),
    "sides are text": raw(entry(shape=["4"])),
    "no sides": raw(entry(shape=None)),
}


@pytest.mark.parametrize("name", LYING)
def test_lying_file_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LYING[name])
    with pytest.raises(BadArchive, match=r"^weights model\.safetensors") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BadArchive, match=r"weights none\.safetensors cannot be read: No such file"):
        read_safetensors(tmp_path / "none.safetensors")


@given(data=st.data())
def test_truncated_or_changed_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    good = raw(entry() | {"b": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}})
    body = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    path.write_bytes(body)
    try:
        read_safetensors(path)
    except BadArchive:
        return
    assert len(body) == len(good)


def changed(state, **changes):
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


STEM, HEAD = "model.0.conv.weight", "model.24.m.0.bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STEM: None}, rf"do not fit the model: 1 missing \({STEM}\); check model.definition and model.args"),
        ({"model.99.x": torch.zeros(1)}, r"1 left over \(model.99.x\);"),
        ({STEM: torch.zeros(16, 3, 3, 3)}, rf"1 of another shape \({STEM} \[16, 3, 3, 3\] for \[16, 3, 6, 6\]\);"),
        ({STEM: torch.zeros(16, 3, 6, 6, dtype=torch.int8)}, r"1 of another type \(.* torch.int8 for torch.float32\)"),
        ({STEM: None, "x": torch.zeros(1)}, r"1 missing \(.*\); 1 left over \(x\);"),
        ({HEAD: None}, rf"1 missing \({HEAD}\);"),
        ({HEAD: torch.tensor(5.0)}, "the weights are for -5 classes, but the labels name 3"),
        (
            {HEAD: torch.zeros(3 * 85)},
            "the weights are for 80 classes, but the labels name 3; take the weights",
        ),
        ({"model.24.anchors": torch.zeros(3, 2, 2)}, r"1 of another shape \(model.24.anchors \[3, 2, 2\]"),
        ({"model.24.anchors": torch.tensor(0.0)}, r"1 of another shape \(model.24.anchors \[\] for"),
    ],
)
def test_weights_that_do_not_fit_are_named(state, changes, message):
    with pytest.raises(BadArchive, match=message) as caught:
        load_state(build("yolov5", 3, size="n"), changed(state, **changes))
    assert "\n" not in str(caught.value)


def test_many_problems_stay_one_short_line(state):
    other = {f"other.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(BadArchive, match=r"missing \(\S+, \S+, \S+, \.\.\.\); \d+ left over \(") as caught:
        load_state(build("yolov5", 3, size="n"), other)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_label_too_few_or_too_many(state, num_classes):
    with pytest.raises(BadArchive, match=f"for 3 classes, but the labels name {num_classes};"):
        load_state(build("yolov5", num_classes, size="n"), state)


def test_background_is_counted_in_the_message():
    detector = build("ssdlite320_mobilenet_v3_large", 4)
    with pytest.raises(BadArchive, match=r"for 4 classes \(background counted\), but the labels name 3;"):
        load_state(build("ssdlite320_mobilenet_v3_large", 3), detector.state_dict())


@pytest.mark.parametrize("definition", ["yolov5", "ssdlite320_mobilenet_v3_large"])
def test_frozen_and_half_precision_weights_are_taken(definition):
    arguments = {"size": "n"} if definition == "yolov5" else {}
    saved = build(definition, 3, **arguments).state_dict()
    frozen = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in saved.items()
        if not name.endswith("num_batches_tracked")
    }
    assert len(frozen) < len(saved)
    detector = build(definition, 3, **arguments)
    load_state(detector, frozen)
    found = detector.state_dict()
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.half().float() if tensor.is_floating_point() else tensor * 0)
