"""Checkpoints come in whole: every name, shape and byte, and what they say about themselves."""

import argparse
import dataclasses
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from model_defs import build
from model_defs.yolov5 import VARIANTS
from tools.checkpoint import LazyTensor, open_checkpoint, write_safetensors
from tools.checkpoint.command import add_arguments, run
from tools.checkpoint.tensors import DTYPES
from tools.checkpoint.unpickle import Module
from tools.checkpoint.yolov5 import MULTIPLES, geometry_of, state_dict_of
from tools.errors import ToolError

REAL_FILES = ("yolov5n.pt", "bccd_yolov5n.pt")


def save(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def small_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "backbone.weight": torch.randn(3, 4, generator=generator),
        "backbone.bias": torch.randn(3, generator=generator),
    }


def repack(source: Path, target: Path, entries: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy a zip file with some entries (named without the root folder) replaced, or removed by None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = entries.get(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
    return target


def edit_pickle(source: Path, target: Path, *edits: tuple[bytes, bytes]) -> Path:
    with zipfile.ZipFile(source) as file:
        data = file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))
    for old, new in edits:
        assert old in data
        data = data.replace(old, new)
    return repack(source, target, {"data.pkl": data})


def command(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="session")
def real(shared: Path) -> Path:
    return shared / "real"


@pytest.fixture(scope="session")
def yolov5n(real: Path) -> Path:
    return real / "agpl" / "yolov5n.pt"


@pytest.fixture(scope="session")
def bccd(real: Path) -> Path:
    return real / "agpl" / "bccd_yolov5n.pt"


# Official YOLOv5 checkpoints


@pytest.mark.real
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_checkpoint_has_every_tensor_of_the_reference(real: Path, name: str) -> None:
    contents = json.loads((real / "numeric" / "checkpoint_contents.json").read_text())["checkpoints"]
    (expected,) = (entry for entry in contents if entry["file"] == name)
    with open_checkpoint(real / "agpl" / name) as checkpoint:
        seen = {
            name: {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "sha256": hashlib.sha256(tensor.read()).hexdigest(),
            }
            for name, tensor in checkpoint.tensors.items()
        }
    assert seen == expected["state_dict"]
    assert list(seen) == list(expected["state_dict"])
    assert checkpoint.kind == "yolov5"
    assert checkpoint.strides == expected["stride"]
    assert checkpoint.size == "n"


@pytest.mark.real
def test_real_names_and_anchors(yolov5n: Path, bccd: Path) -> None:
    with open_checkpoint(yolov5n) as older, open_checkpoint(bccd) as newer:
        assert len(older.names or []) == 80
        assert (older.names or [])[:3] == ["person", "bicycle", "car"]
        assert newer.names == ["RBC", "WBC", "Platelets"]
        assert (older.anchors or [])[0] == [(10, 13), (16, 30), (33, 23)]
        assert (older.anchors or [])[2] == [(116, 90), (156, 198), (373, 326)]


@pytest.mark.real
def test_imported_checkpoint_fits_the_network_strictly(real: Path, yolov5n: Path, tmp_path: Path) -> None:
    assert command(yolov5n, "--output", tmp_path / "n.safetensors") == 0
    state = safetensors.torch.load_file(tmp_path / "n.safetensors")
    expected = json.loads((real / "numeric" / "yolov5_sizes.json").read_text())["n"]["state_dict"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected
    assert state["model.0.conv.weight"].dtype == torch.float16
    network = build("yolov5", 80, size="n")
    network.load_state_dict(state, strict=True)
    torch.testing.assert_close(network.state_dict()["model.0.conv.weight"].half(), state["model.0.conv.weight"])


@pytest.mark.real
def test_what_is_known_survives_the_conversion(yolov5n: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    command(yolov5n, "--output", first)
    command(first, "--output", second)
    assert first.read_bytes() == second.read_bytes()
    with open_checkpoint(yolov5n) as original, open_checkpoint(first) as imported:
        assert imported.kind == "safetensors"
        assert list(imported.tensors) == list(original.tensors)
        for field in ("names", "anchors", "strides", "size", "metadata"):
            assert getattr(imported, field) == getattr(original, field)


@pytest.mark.real
def test_import_does_without_torch(repository: Path, yolov5n: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tools.checkpoint.command import import_checkpoint;"
        "import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2])); print('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", script, str(yolov5n), str(tmp_path / "n.safetensors")]
    done = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert (tmp_path / "n.safetensors").exists()


@pytest.mark.real
def test_averaged_weights_are_preferred(bccd: Path, tmp_path: Path) -> None:
    """The file holds {"model": network, "ema": None}; it becomes {"ema": network, "model": something else}."""
    with zipfile.ZipFile(bccd) as file:
        data = file.read("best/data.pkl")
    no_average = rb"X\x03\x00\x00\x00ema(r....)N"
    other = b"X\x05\x00\x00\x00model" + rb"\1" + b"cmodels.common\nConcat\n)\x81"
    data, count = re.subn(no_average, other, data, flags=re.DOTALL)
    assert count == 1
    first = b"X\x05\x00\x00\x00modelq\x03"  # memoized, since a layer has this name too; popped, "ema" takes its place
    assert data.count(first) == 1
    data = data.replace(first, first + b"0" + b"X\x03\x00\x00\x00ema")
    with open_checkpoint(repack(bccd, tmp_path / "last.pt", {"data.pkl": data})) as checkpoint:
        assert checkpoint.kind == "yolov5"
        assert checkpoint.names == ["RBC", "WBC", "Platelets"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"activation\nSiLU\n", b"activation\nMish\n", "activation torch.nn.modules.activation.Mish"),
        (b"G" + struct.pack(">d", 0.001), b"G" + struct.pack(">d", 1e-5), "eps 1e-05"),
        (b"G" + struct.pack(">d", 0.33), b"G" + struct.pack(">d", 0.67), r"\(0.67, 0.25\)"),
        (b"K\x02X\x09\x00\x00\x00Platelets", b"K\x01X\x09\x00\x00\x00Platelets", "names 2 classes, but its head has 3"),
        (b"K\x02X\x09\x00\x00\x00Platelets", b"K\x07X\x09\x00\x00\x00Platelets", "not numbered 0, 1, 2"),
        (b"models.yolo\nDetectionModel\n", b"models.common\nConcat\n", "holds a models.common.Concat"),
    ],
)
def test_network_that_would_answer_differently_is_refused(
    bccd: Path, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    path = edit_pickle(bccd, tmp_path / "other.pt", (old, new))
    with pytest.raises(ToolError, match=message):
        open_checkpoint(path)


@pytest.mark.real
@pytest.mark.parametrize(
    ("storage", "values", "message"),
    [
        ("355", [8, 16, 64], r"strides are \[8.0, 16.0, 64.0\]"),
        ("342", [10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326], "stored in cells"),
        ("342", [3.6, 2.8, 4.8, 6.1, 11.6, 10.1] + [1.8, 3.8, 3.8, 2.8, 3.6, 7.4] + [0.1] * 6, "do not grow"),
        ("342", [float("nan")] * 18, "which cannot be"),
    ],
)
def test_implausible_geometry_is_refused(
    bccd: Path, tmp_path: Path, storage: str, values: list[float], message: str
) -> None:
    data = np.array(values, "<f2").tobytes()
    path = repack(bccd, tmp_path / "odd.pt", {f"data/{storage}": data})
    with pytest.raises(ToolError, match=message):
        open_checkpoint(path)


def test_all_ten_sizes_are_told_apart(shared: Path) -> None:
    sizes = json.loads((shared / "real" / "numeric" / "yolov5_sizes.json").read_text())
    assert len(sizes) == 10
    for size, expected in sizes.items():
        pixels = np.array(expected["anchors_pixels"]).reshape(len(expected["stride"]), -1, 2)
        cells = (pixels / np.array(expected["stride"])[:, None, None]).astype("<f4").tobytes()
        tensors = {
            name: LazyTensor("float32", tuple(s), partial(bytes, cells)) for name, s in expected["state_dict"].items()
        }
        geometry = geometry_of(tensors)
        assert geometry is not None
        assert (geometry.size, geometry.num_classes, geometry.strides) == (size, 80, expected["stride"])
        np.testing.assert_allclose(geometry.anchors, pixels, rtol=1e-6)


def test_table_of_multiples_is_that_of_the_network() -> None:
    for size, variant in VARIANTS.items():
        assert MULTIPLES[size[0]] == (variant.depth, variant.width)


def test_fused_state_dict_of_yolov5_is_recognised(tmp_path: Path) -> None:
    network = build("yolov5", 7, size="s6")
    network.optimise()
    with open_checkpoint(save(tmp_path / "fused.pth", network.state_dict())) as checkpoint:
        assert (checkpoint.kind, checkpoint.size, checkpoint.strides) == ("state_dict", "s6", [8, 16, 32, 64])
        assert checkpoint.names is None
        assert list(checkpoint.tensors) == list(network.state_dict())


def stand_in(module: torch.nn.Module | None) -> Module | None:
    if module is None:
        return None
    members = {name: stand_in(member) for name, member in module._modules.items()}
    return Module(type(module).__name__, {**vars(module), "_modules": members})


def test_state_dict_of_a_pickled_network_is_that_of_torch() -> None:
    network = torch.nn.Sequential(OrderedDict(first=torch.nn.BatchNorm2d(2), second=torch.nn.Linear(2, 2, bias=False)))
    network.register_buffer("kept", torch.ones(1))
    network.register_buffer("transient", torch.ones(1), persistent=False)
    network.register_buffer("absent", None)
    network.register_module("nothing", None)
    model = stand_in(network)
    assert model is not None
    assert list(state_dict_of(model)) == list(network.state_dict())


# Other checkpoints of torch.save


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_state_dict(tmp_path: Path, protocol: int) -> None:
    state = OrderedDict(small_state())
    with open_checkpoint(save(tmp_path / "plain.pth", state, pickle_protocol=protocol)) as checkpoint:
        assert checkpoint.kind == "state_dict"
        assert list(checkpoint.tensors) == list(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].numbers(), tensor.numpy())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("model.backbone.weight model.head.bias", "backbone.weight head.bias"),
        ("model.module.backbone.weight model.module.head.bias", "backbone.weight head.bias"),
        ("model.backbone.weight loss.weight", "model.backbone.weight loss.weight"),
        ("model.0.conv.weight model.24.anchors", "model.0.conv.weight model.24.anchors"),
        ("model.model.0.weight model.model.1.weight", "model.0.weight model.1.weight"),
        ("model.model.a model.model.b", "model.a model.b"),
    ],
)
def test_lightning_checkpoint_loses_its_prefix(tmp_path: Path, names: str, expected: str) -> None:
    content = {
        "epoch": 3,
        "global_step": 6299,
        "pytorch-lightning_version": "1.5.3",
        "state_dict": OrderedDict((name, torch.ones(2)) for name in names.split()),
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.7), "dirpath": Path("x")}
        },
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.001}]}],
        "lr_schedulers": [{"step_size": 30, "milestones": Counter([1, 2])}],
        "hyper_parameters": argparse.Namespace(lr=np.float64(0.001), device=torch.device("cpu"), dtype=torch.float32),
    }
    with open_checkpoint(save(tmp_path / "last.ckpt", content)) as checkpoint:
        assert checkpoint.kind == "lightning"
        assert list(checkpoint.tensors) == expected.split()


def test_data_parallel_prefix_is_taken_away(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in small_state().items()}
    with open_checkpoint(save(tmp_path / "parallel.pth", {"model": state, "epoch": 1})) as checkpoint:
        assert (checkpoint.kind, list(checkpoint.tensors)) == ("state_dict", list(small_state()))


def test_every_kind_of_tensor_keeps_its_bytes(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "bfloat16": torch.tensor([1.5, -2.0, 3e38]).bfloat16(),
        "transposed": base.view(2, 3, 4).permute(2, 0, 1),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": base[3:20:4],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "shared_a": base,
        "shared_b": base[8:].view(4, 4),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    state |= {name: torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in DTYPES if name != "bfloat16"}
    source, target = save(tmp_path / "mixed.pth", state), tmp_path / "mixed.safetensors"
    with open_checkpoint(source) as checkpoint:
        write_safetensors(target, checkpoint.tensors)
        np.testing.assert_array_equal(checkpoint.tensors["bfloat16"].numbers(), state["bfloat16"].double().numpy())
    loaded = safetensors.torch.load_file(target)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with open_checkpoint(source) as first, open_checkpoint(target) as again:
        assert list(again.tensors) == list(state)
        assert all(again.tensors[name].read() == first.tensors[name].read() for name in state)


# safetensors


def test_file_of_the_official_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    safetensors.torch.save_file(small_state(), path, metadata={"license": "MIT"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.metadata["license"] == "MIT"
        for name, tensor in small_state().items():
            np.testing.assert_array_equal(checkpoint.tensors[name].numbers(), tensor.numpy())


def test_written_file_is_aligned_deterministic_and_carries_metadata(tmp_path: Path) -> None:
    tensors = {"odd": LazyTensor("uint8", (3,), lambda: b"abc"), "wide": LazyTensor("int64", (1,), lambda: b"12345678")}
    buffers = [io.BytesIO(), io.BytesIO()]
    digests = [
        write_safetensors(buffers[0], tensors, {"b": "2", "a": "1"}),
        write_safetensors(buffers[1], tensors, {"a": "1", "b": "2"}),
    ]
    data = buffers[0].getvalue()
    assert data == buffers[1].getvalue()
    assert digests == [hashlib.sha256(data).hexdigest()] * 2
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["wide"]["data_offsets"] == [0, 8]
    assert list(header) == ["__metadata__", "odd", "wide"]
    (tmp_path / "x.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
        assert file.get_tensor("wide").numpy().tobytes() == b"12345678"


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "gap or an overlap"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "gap or an overlap"),
        ({"a": entry(0, 4)}, 3, "cut short"),
        ({"a": entry(0, 4)}, 5, "cut short or damaged"),
        ({"a": entry(0, 4, shape=[5])}, 4, "takes 4 bytes where U8"),
        ({"a": entry(0, 4, dtype="F4")}, 4, "dtype 'F4'"),
        ({"a": entry(0, 4, shape=[-4])}, 4, "shape"),
        ({"a": entry(0, 4, shape=[True, 4])}, 4, "shape"),
        ({"a": entry(0, 4, extra=1)}, 4, "not described by"),
        ({"a": [1]}, 0, "not described by"),
        ({"a": entry(0, 4), "__metadata__": {"x": 1}}, 4, "metadata is not a table"),
        ({"a": entry(0, 4), "__metadata__": {"marina.names": "{"}}, 4, "marina.names is not JSON"),
        (f'{{"a":{json.dumps(entry(0, 4))},"a":{json.dumps(entry(0, 4))}}}', 4, "a name occurs twice"),
        ("{}", 0, "no tensor at all"),
        ("{" + '"a":{' * 100_000, 0, "header is damaged"),
    ],
)
def test_broken_safetensors_is_refused(tmp_path: Path, header: object, size: int, message: str) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "broken.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ToolError, match=message):
        open_checkpoint(path)


def test_header_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{" + bytes(100))
    with pytest.raises(ToolError, match="claims a header of 100000001 bytes"):
        open_checkpoint(path)


# Streaming


def test_conversion_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    megabyte = 1 << 20
    state = {f"layer{i}.weight": torch.zeros(megabyte, dtype=torch.uint8) for i in range(32)}
    source = save(tmp_path / "large.pth", state)
    tracemalloc.start()
    try:
        with open_checkpoint(source) as checkpoint:
            write_safetensors(tmp_path / "large.safetensors", checkpoint.tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * megabyte


# The command


@pytest.mark.real
def test_command_reports_and_writes_labels(bccd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bccd.safetensors"
    assert command(bccd, "--output", output) == 0
    report = capsys.readouterr().out
    labels = json.loads((tmp_path / "index_to_name.json").read_text())
    assert labels == {"0": "RBC", "1": "WBC", "2": "Platelets"}
    assert "yolov5 (YOLOv5 size n)" in report
    assert "8, 16, 32" in report
    assert "1,767,976" in report  # the published 1,872,157 of 80 classes less 77 x 3 x (64 + 128 + 256 + 3)
    for path in (bccd, output):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bccd.safetensors", "index_to_name.json"]


@pytest.mark.real
def test_command_keeps_other_labels_unless_forced(bccd: Path, tmp_path: Path) -> None:
    labels = tmp_path / "index_to_name.json"
    labels.write_text('{"0": "red", "1": "white", "2": "platelets"}')
    before = labels.read_bytes()
    output = tmp_path / "bccd.safetensors"
    with pytest.raises(ToolError, match="other class names"):
        command(bccd, "--output", output)
    assert labels.read_bytes() == before
    assert not output.exists()
    assert command(bccd, "--output", output, "--force") == 0
    assert json.loads(labels.read_text())["0"] == "RBC"
    assert command(bccd, "--output", output) == 0


def test_command_writes_nothing_when_the_source_is_damaged(tmp_path: Path) -> None:
    source = save(tmp_path / "plain.pth", small_state())
    data = source.read_bytes()
    position = data.index(small_state()["backbone.bias"].numpy().tobytes())
    source.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    with pytest.raises(ToolError, match=r"plain.pth: its entry .*Bad CRC-32"):
        command(source)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pth"]


def test_command_does_not_replace_its_source(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(small_state(), path)
    with pytest.raises(ToolError, match="--output"):
        command(path)


def test_command_names_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    source = save(tmp_path / "plain.pth", small_state())
    with pytest.raises(ToolError, match=r"x\.safetensors: cannot be written: No such file"):
        command(source, "--output", tmp_path / "missing" / "x.safetensors")


def test_tensor_is_compared_by_what_it_is() -> None:
    tensor = LazyTensor("float32", (2, 3), lambda: bytes(24))
    assert (tensor.numel, tensor.nbytes) == (6, 24)
    with pytest.raises(ToolError, match="gave 24 bytes for a tensor of 48"):
        dataclasses.replace(tensor, shape=(4, 3)).read()
