"""The zip files that torch.save writes (torch 1.6 and later).

<root>/data.pkl      a pickle that refers to storages by key
<root>/data/<key>    the bytes of one storage, uncompressed
<root>/byteorder     "little" or "big"; absent before torch 2.1
"""

import math
import reprlib
import zipfile
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tools.checkpoint.tensors import DTYPES, LazyTensor
from tools.checkpoint.unpickle import STORAGES, Name, unpickle
from tools.errors import ToolError

# The pickle of the largest YOLOv5 checkpoint with its optimiser has less than 2 MB; tensors are not in it.
MAX_PICKLE_BYTES = 16_000_000
CHUNK_BYTES = 1 << 20
MAX_DIMENSIONS = 16
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError)


@dataclass(frozen=True)
class Storage:
    """numel: elements of `dtype`."""

    key: str
    dtype: str
    numel: int


class TorchFile:
    """Raises ToolError if `file` is not a zip of torch.save. The caller keeps `file` open."""

    def __init__(self, file: BinaryIO):
        try:
            self._zip = zipfile.ZipFile(file)
        except ZIP_ERRORS as error:
            raise ToolError(f"is cut short or damaged ({error}); copy or download it again") from error
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            if entry.filename in self._entries:
                raise ToolError(f"has two entries named {entry.filename!r}; it is damaged, or made to mislead")
            self._entries[entry.filename] = entry
        self._root = self._find_root()
        self._check_byte_order()
        self._storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """The pickled object, with `LazyTensor` in place of tensors and parameters."""
        builders = {
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_parameter": _rebuild_parameter,
        }
        pickled = self._entry("data.pkl")
        if pickled.file_size > MAX_PICKLE_BYTES:
            raise ToolError(f"its pickle has {pickled.file_size} bytes; checkpoints stay below {MAX_PICKLE_BYTES}")
        return unpickle(bytes(self._read("data.pkl", 0, pickled.file_size)), builders, self._load_storage)

    def _find_root(self) -> str:
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.count("/") == 1]
        roots = [root for root in roots if f"{root}data.pkl" in self._entries]
        if "MAR-INF/MANIFEST.json" in self._entries:
            raise ToolError("is a TorchServe archive, not a checkpoint; look into it with `marina archive inspect`")
        if len(roots) != 1:
            raise ToolError(
                "is a zip file, but not one of torch.save: it has no data.pkl; give a checkpoint or .safetensors"
            )
        (root,) = roots
        if f"{root}constants.pkl" in self._entries:
            raise ToolError(
                "is a TorchScript archive, which holds code; give the checkpoint that it was exported from, or save "
                "its weights with torch.save(torch.jit.load(FILE).state_dict(), ...)"
            )
        return root

    def _check_byte_order(self) -> None:
        if f"{self._root}byteorder" in self._entries:
            order = bytes(self._read("byteorder", 0, min(16, self._entry("byteorder").file_size)))
            if order != b"little":
                raise ToolError(f"was saved in byte order {order!r}; load and save it again on a little-endian machine")

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise ToolError(f"has no entry {self._root + name!r}; it is damaged: copy or download it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ToolError(f"its entry {entry.filename!r} is compressed, which torch.save never does; save it again")
        if entry.flag_bits & 1:
            raise ToolError(f"its entry {entry.filename!r} is encrypted; save it again without a password")
        return entry

    def _read(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes `start` to `stop` of an entry. The entry is read to its end, so that its checksum is compared."""
        entry = self._entry(name)
        window = bytearray(stop - start)
        position = 0
        try:
            with self._zip.open(entry) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    part = chunk[max(0, start - position) : max(0, stop - position)]
                    into = max(0, position - start)
                    window[into : into + len(part)] = part
                    position += len(chunk)
        except ZIP_ERRORS as error:
            raise ToolError(f"its entry {entry.filename!r} is damaged ({error}); copy or download it again") from error
        return window

    def _load_storage(self, reference: Any) -> Storage:
        """`reference` is what torch.save writes for a storage: ("storage", type, key, device, number of elements)."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise ToolError(f"its pickle refers to something other than a storage: {reprlib.repr(reference)}")
        _, kind, key, _, numel = reference
        if not (isinstance(kind, Name) and kind.path in STORAGES and isinstance(key, str) and _is_size(numel)):
            raise ToolError(f"its pickle refers to a storage that we cannot read: {reprlib.repr(reference)}")
        storage = Storage(key, STORAGES[kind.path], numel)
        if self._storages.setdefault(key, storage) != storage:
            raise ToolError(f"its storage {key!r} is used as {storage.dtype} and as {self._storages[key].dtype}")
        wanted, size = numel * DTYPES[storage.dtype].itemsize, self._entry(f"data/{key}").file_size
        if size != wanted:
            raise ToolError(f"its storage {key!r} has {size} bytes where {numel} x {storage.dtype} take {wanted}")
        return storage

    def _rebuild_tensor(self, path: str, arguments: tuple[Any, ...]) -> LazyTensor:
        """Arguments as torch.save writes them: storage, offset, shape, strides (in elements), and three of no use."""
        storage, offset, shape, strides, *_ = arguments
        sizes_fit = (
            isinstance(storage, Storage)
            and isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and len(shape) == len(strides) <= MAX_DIMENSIONS
            and all(map(_is_size, (offset, *shape, *strides)))
            and math.prod(max(1, size) for size in shape) < 2**62
        )
        if not sizes_fit:
            raise ToolError(f"its pickle describes a tensor that cannot be: {reprlib.repr(arguments[:4])}")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.numel:
            raise ToolError(
                f"a tensor of shape {shape}, strides {strides} at offset {offset} reaches out of its storage "
                f"{storage.key!r} of {storage.numel} elements; the file is damaged, or made to mislead"
            )
        return LazyTensor(storage.dtype, shape, partial(self._fetch, storage, offset, shape, strides))

    def _fetch(
        self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> bytes | bytearray:
        numel = math.prod(shape)
        if numel == 0:
            return b""
        itemsize = DTYPES[storage.dtype].itemsize
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        window = self._read(f"data/{storage.key}", offset * itemsize, (offset + span) * itemsize)
        if _is_contiguous(shape, strides):
            return window
        elements = np.frombuffer(window, f"<u{itemsize}")
        return as_strided(elements, shape, [stride * itemsize for stride in strides], writeable=False).tobytes()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _rebuild_parameter(path: str, arguments: tuple[Any, ...]) -> LazyTensor:
    tensor = arguments[0]
    if not isinstance(tensor, LazyTensor):
        raise TypeError(f"a parameter made of a {type(tensor).__name__}")
    return tensor
