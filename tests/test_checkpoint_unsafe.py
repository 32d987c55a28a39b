"""Hostile and damaged checkpoints: one clear line, and nothing of them is run."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.checkpoint import UnsafePickle, open_checkpoint, write_safetensors
from tools.errors import ToolError

# Damaged text in a pickle makes pickletools complain.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

# What reading a file has no reason to do. Executing code is not among them: a codec may be imported for the first time.
FORBIDDEN_EVENTS = frozenset({"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"})
_watching: list[str] | None = None


def _audit(event: str, _: object) -> None:
    if _watching is not None and event in FORBIDDEN_EVENTS:
        _watching.append(event)


sys.addaudithook(_audit)


def read_all(path: Path) -> str:
    """Convert a checkpoint; `read`, or the one line of the refusal. Whatever the file holds, nothing may be run."""
    global _watching
    _watching = []
    try:
        with open_checkpoint(path) as checkpoint:
            write_safetensors(io.BytesIO(), checkpoint.tensors, checkpoint.metadata)
        result = "read"
    except ToolError as error:
        result = str(error)
        assert "\n" not in result
        assert len(result) < 1000
    finally:
        seen, _watching = _watching, None
    assert seen == []
    return result


def torch_zip(path: Path, pickled: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            file.writestr(f"archive/data/{name}", data)
    return path


class Command:
    """Runs a shell command when a stock unpickler reads it."""

    def __init__(self, line: str):
        self.line = line

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.line,)


def in_the_state_of_a_layer(bomb: Command, protocol: int) -> bytes:
    class Model:
        pass

    Model.__module__, Model.__qualname__ = "models.yolo", "Model"
    package, module = types.ModuleType("models"), types.ModuleType("models.yolo")
    module.Model = Model
    sys.modules |= {"models": package, "models.yolo": module}
    try:
        model = Model()
        model.yaml = {"anchors": [bomb]}
        return pickle.dumps({"model": model}, protocol)
    finally:
        del sys.modules["models"], sys.modules["models.yolo"]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("where", ["bare", "beside the weights", "as a tensor", "in a layer"])
def test_command_in_a_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int, where: str) -> None:
    canary = tmp_path / "canary"
    bomb = Command(f"touch {canary}")
    pickled = {
        "bare": lambda: pickle.dumps(bomb, protocol),
        "beside the weights": lambda: pickle.dumps({"state_dict": {}, "hyper_parameters": {"x": (bomb,)}}, protocol),
        "as a tensor": lambda: pickle.dumps({"weight": bomb}, protocol),
        "in a layer": lambda: in_the_state_of_a_layer(bomb, protocol),
    }[where]()
    if where != "in a layer":  # the bomb is live: Python's own unpickler sets it off
        pickle.loads(pickled)
        canary.unlink()
    path = torch_zip(tmp_path / "evil.pt", pickled)
    with pytest.raises(UnsafePickle, match=r"evil\.pt: its pickle names 'posix\.system'"):
        open_checkpoint(path)
    assert not canary.exists()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


STACK_GLOBAL_TRICK = b"\x80\x04" + text("models.yolo") + text("Model.__init__.__globals__") + b"\x93."
EVIL_PICKLES = {
    "posix.system": b"cposix\nsystem\n(X\x04\x00\x00\x00truetR.",
    "builtins.eval": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    "__builtin__.getattr": b"\x80\x02c__builtin__\ngetattr\n.",
    "torch.hub.load": b"\x80\x02ctorch.hub\nload\n.",
    "torch.load": b"\x80\x02ctorch\nload\n.",
    "models.yolo.Model.__init__.__globals__": STACK_GLOBAL_TRICK,
    "torch._utils._rebuild_tensor_v2.__globals__": b"\x80\x04"
    + text("torch._utils")
    + text("_rebuild_tensor_v2.__globals__")
    + b"\x93.",
    "numpy.core.multiarray.fromfile": b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
    "models.common.Focus": b"\x80\x02cmodels.common\nFocus\n.",
    "ultralytics.nn.tasks.DetectionModel": b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n.",
    "operation INST": b"(X\x04\x00\x00\x00trueiposix\nsystem\n.",
    "operation OBJ": b"(cargparse\nNamespace\no.",
    "operation EXT1": b"\x80\x02\x82\x01.",
    "operation NEWOBJ_EX": b"\x80\x04cargparse\nNamespace\n)}\x92.",
    "operation PERSID": b"Pstorage\n.",
    "calls Name(path='torch.float32')": b"\x80\x02ctorch\nfloat32\n)R.",
    "calls 'os.system'": b"\x80\x02" + text("os.system") + b")R.",
    "calls Opaque": b"\x80\x02cargparse\nNamespace\n)R)R.",
    "sets attributes of Name": b"\x80\x02cmodels.yolo\nModel\n}" + text("__call__") + b"K\x01sb.",
    "refers to something other than a storage": b"\x80\x02" + text("/etc/passwd") + b"Q.",
}


@pytest.mark.parametrize("reason", EVIL_PICKLES)
def test_evil_pickle_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    assert reason in read_all(torch_zip(tmp_path / "evil.pt", EVIL_PICKLES[reason]))


def persistent(storage: str, key: str, numel: int) -> bytes:
    return (
        b"("
        + text("storage")
        + b"ctorch\n"
        + storage.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + b"\x8a\x08"
        + struct.pack("<q", numel)
        + b"tQ"
    )


def tensor(reference: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    parts = [pickle.dumps(part, 2)[2:-1] for part in (offset, shape, strides)]  # without PROTO and STOP
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"".join(parts) + b"\x89}tR"


def checkpoint_of(reference: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    return b"\x80\x02}" + text("weight") + tensor(reference, offset, shape, strides) + b"s."


FOUR = persistent("FloatStorage", "0", 4)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (checkpoint_of(FOUR, 0, (2, 2), (2, 1)), "read"),
        (checkpoint_of(FOUR, 1, (2, 2), (2, 1)), "reaches out of its storage '0' of 4 elements"),
        (checkpoint_of(FOUR, 0, (2, 2), (3, 1)), "reaches out"),
        (checkpoint_of(FOUR, 0, (5,), (1,)), "reaches out"),
        (checkpoint_of(FOUR, -1, (2,), (1,)), "a tensor that cannot be"),
        (checkpoint_of(FOUR, 0, (-2, -2), (2, 1)), "a tensor that cannot be"),
        (checkpoint_of(FOUR, 3, (4,), (-1,)), "a tensor that cannot be"),
        (checkpoint_of(FOUR, 0, (2, 2), (1,)), "a tensor that cannot be"),
        (checkpoint_of(FOUR, 0, (2**40, 2**40, 0), (0, 0, 0)), "a tensor that cannot be"),
        (checkpoint_of(FOUR, 0, (1,) * 17, (1,) * 17), "a tensor that cannot be"),
        (checkpoint_of(FOUR, 0, (2**50,), (0,)), "more than 8 times the file's"),
        (checkpoint_of(persistent("FloatStorage", "0", 5), 0, (2,), (1,)), "has 16 bytes where 5 x float32 take 20"),
        (checkpoint_of(persistent("FloatStorage", "0", -4), 0, (2,), (1,)), "storage that we cannot read"),
        (checkpoint_of(persistent("HalfStorage", "7", 4), 0, (2,), (1,)), "no entry 'archive/data/7'"),
        (checkpoint_of(persistent("FloatStorage", "../data.pkl", 4), 0, (2,), (1,)), "no entry"),
        (checkpoint_of(persistent("float32", "0", 4), 0, (2,), (1,)), "storage that we cannot read"),
        (b"\x80\x02}.", "no tensor at all"),
        (b"\x80\x02].", "holds a list"),
        (b"\x80\x02}" + text("a") + b"K\x01s.", "entry 'a' is a int, not a tensor"),
        (b"\x80\x02}K\x01K\x01s.", "the key 1"),
        (b"\x80\x02}" + text("a\nb") + tensor(FOUR, 0, (4,), (1,)) + b"s.", "which is no tensor's name"),
        (b"\x80\x02]q\x00h\x00h\x00\x86\x85.", "holds a tuple"),
        (b"\x80\x02}]K\x01s.", "a list as a key"),
        (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "a tuple as a key"),
        (b"\x80\x02\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6 + b".", "a number of"),
        (b"\x80\x02\x8e" + struct.pack("<Q", 2**60) + b".", "its pickle is damaged"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "its pickle is damaged"),
        (b"\x80\x09N.", "pickle protocol 9"),
        (b"", "its pickle is damaged"),
        (b"\x80\x02cmodels.yolo\nModel\n)\x81}q\x01" + text("_modules") + b"}" + text("a") + b"h\x00ssb.", "damaged"),
    ],
)
def test_impossible_content_is_refused(tmp_path: Path, pickled: bytes, message: str) -> None:
    assert message in read_all(torch_zip(tmp_path / "x.pt", pickled, **{"0": bytes(16)}))


def test_layer_inside_itself_is_refused(tmp_path: Path) -> None:
    empty = b"".join(text(name) + b"}" for name in ("_parameters", "_buffers"))
    loop = b"\x80\x02cmodels.yolo\nModel\n)\x81q\x00}(" + empty + text("_modules") + b"}" + text("a") + b"h\x00sub."
    assert "in a loop" in read_all(torch_zip(tmp_path / "loop.pt", loop))


def test_nested_lists_do_not_explode_in_the_message(tmp_path: Path) -> None:
    laughs = b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b"Q."
    assert "other than a storage" in read_all(torch_zip(tmp_path / "laughs.pt", laughs))


COUNT = 10_000
NUMBERS = b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(COUNT)) + b"eq\x00"
TABLE = b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(COUNT)) + b"uq\x00"
COPIES = {
    "set": NUMBERS + b"c__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R" * 300,
    "mapping": TABLE + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 300,
    "attributes": TABLE + b"cmodels.yolo\nModel\nq\x01" + b"h\x01)\x81h\x00b" * 300,
}


@pytest.mark.parametrize("kind", COPIES)
def test_small_pickle_does_not_fill_the_memory(tmp_path: Path, kind: str) -> None:
    path = torch_zip(tmp_path / "x.pt", b"\x80\x02(" + COPIES[kind] + b"t.")
    tracemalloc.start()
    try:
        assert "holds a tuple" in read_all(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def test_oversized_pickle_is_not_read(tmp_path: Path) -> None:
    assert "its pickle has 17000000 bytes" in read_all(torch_zip(tmp_path / "x.pt", b"]" * 17_000_000))


# Files that are something else


def other_file(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    state = {"weight": torch.ones(2)}
    if name == "legacy.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif name == "script.pt":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif name == "bare.pkl":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif name == "other.zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "hello")
    elif name == "model.mar":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("MAR-INF/MANIFEST.json", "{}")
    elif name == "files.tar":
        with tarfile.open(path, "w") as file:
            file.add(__file__, "x")
    elif name == "folder":
        path.mkdir()
    elif name != "missing.pt":
        contents = {
            "empty.pt": b"",
            "page.pt": b"\n<!DOCTYPE html><html>",
            "pointer.pt": b"version https://git-lfs.github.com/spec/v1\n",
            "network.onnx": b"\x08\x08\x12\x07pytorch",
            "packed.pt": b"\x1f\x8b\x08\x00",
        }
        path.write_bytes(contents[name])
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("legacy.pt", "torch wrote before 1.6"),
        ("script.pt", "TorchScript archive"),
        ("bare.pkl", "bare pickle"),
        ("other.zip", "not one of torch.save"),
        ("model.mar", "TorchServe archive"),
        ("files.tar", "no checkpoint that we know"),
        ("folder", "cannot be read: Is a directory"),
        ("missing.pt", "cannot be read: No such file"),
        ("empty.pt", "is empty"),
        ("page.pt", "web page"),
        ("pointer.pt", "git lfs pull"),
        ("network.onnx", "ONNX"),
        ("packed.pt", "gzip"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit announces its end
        path = other_file(tmp_path, name)
    result = read_all(path)
    assert result.startswith(f"{path}: ")
    assert message in result


def saved(**options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(
        {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4).half(), "c": torch.tensor(3)}, buffer, **options
    )
    return buffer.getvalue()


def rezip(data: bytes, path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes | None) -> Path:
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = changed.get(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def test_compressed_duplicate_missing_and_big_endian_entries(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    assert read_all(rezip(saved(), path)) == "read"
    assert "is compressed" in read_all(rezip(saved(), path, zipfile.ZIP_DEFLATED))
    assert "byte order b'big'" in read_all(rezip(saved(), path, byteorder=b"big"))
    assert "no entry 'archive/data/0'" in read_all(rezip(saved(), path, **{"data/0": None}))
    with warnings.catch_warnings(), zipfile.ZipFile(rezip(saved(), path), "a") as file:
        warnings.simplefilter("ignore", UserWarning)
        file.writestr("archive/data.pkl", b"N.")
    assert "two entries named" in read_all(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    data, path = saved(), tmp_path / "short.pt"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        assert read_all(path) != "read"
    buffer = io.BytesIO()
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        write_safetensors(buffer, checkpoint.tensors)
    for length in range(len(buffer.getvalue())):
        path.write_bytes(buffer.getvalue()[:length])
        assert read_all(path) != "read"


# Random damage

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "insert", "delete", "copy"]), st.binary(max_size=6)
    ),
    min_size=1,
    max_size=6,
)
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def mutate(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    changed = bytearray(data)
    for where, kind, new in edits:
        position = int(where * len(changed))
        if kind == "set":
            changed[position : position + len(new)] = new
        elif kind == "insert":
            changed[position:position] = new
        elif kind == "delete":
            del changed[position : position + len(new)]
        else:
            changed[position:position] = changed[position // 2 : position // 2 + 10 * len(new)]
    return bytes(changed)


def pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))


@settings(FUZZ, max_examples=300)
@given(edits=EDITS, protocol=st.sampled_from([2, 4]))
def test_damaged_pickle_is_read_or_refused(
    tmp_path: Path, edits: list[tuple[float, str, bytes]], protocol: int
) -> None:
    data = saved(pickle_protocol=protocol)
    read_all(rezip(data, tmp_path / "x.pt", **{"data.pkl": mutate(pickle_of(data), edits)}))


@settings(FUZZ, max_examples=300)
@given(operations=st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=4)), max_size=40))
def test_random_operations_are_read_or_refused(tmp_path: Path, operations: list[bytes]) -> None:
    pickled = checkpoint_of(FOUR, 0, (4,), (1,))[:-1] + b"".join(operations) + b"."
    read_all(torch_zip(tmp_path / "x.pt", pickled, **{"0": bytes(16)}))


@settings(FUZZ, max_examples=200)
@given(edits=EDITS)
def test_damaged_zip_is_read_or_refused(tmp_path: Path, edits: list[tuple[float, str, bytes]]) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(mutate(saved(), edits))
    read_all(path)


@settings(FUZZ, max_examples=200)
@given(edits=EDITS)
def test_damaged_safetensors_is_read_or_refused(tmp_path: Path, edits: list[tuple[float, str, bytes]]) -> None:
    path, buffer = tmp_path / "x.pt", io.BytesIO()
    path.write_bytes(saved())
    with open_checkpoint(path) as checkpoint:
        write_safetensors(buffer, checkpoint.tensors, {"marina.names": '["a"]'})
    path.write_bytes(mutate(buffer.getvalue(), edits))
    read_all(path)


@pytest.mark.real
@settings(FUZZ, max_examples=100)
@given(edits=EDITS)
def test_damaged_real_checkpoint_is_read_or_refused(
    shared: Path, tmp_path: Path, edits: list[tuple[float, str, bytes]]
) -> None:
    data = (shared / "real" / "agpl" / "bccd_yolov5n.pt").read_bytes()
    read_all(rezip(data, tmp_path / "x.pt", **{"data.pkl": mutate(pickle_of(data), edits)}))


def test_the_watch_sees_a_stock_unpickler() -> None:
    """The fuzz tests can fail: what they watch for does happen when Python's own unpickler reads a bomb."""
    script = (
        "import pickle, sys; seen = []; sys.addaudithook(lambda event, _: seen.append(event));"
        f"pickle.loads({EVIL_PICKLES['posix.system']!r}); print(*seen)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"pickle.find_class", "os.system"} <= set(done.stdout.split())
