"""The safetensors format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header,
then the tensors' bytes, which follow one another without gap or overlap."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tools.checkpoint.tensors import DTYPES, LazyTensor
from tools.errors import ToolError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ALIGNMENT = 8
DTYPE_OF_CODE = {dtype.code: name for name, dtype in DTYPES.items()}


class Sink(Protocol):
    """Whatever takes bytes one after another."""

    def write(self, data: bytes | bytearray, /) -> object: ...


def read_safetensors(file: BinaryIO) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors in the order of the header, and the header's metadata. `file` stays open for the tensors.

    Raises ToolError if the file breaks the format's rules.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise ToolError(
            f"claims a header of {length} bytes in a file of {size}; it is cut short or no safetensors file"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"its safetensors header is damaged ({error}); copy or download it again") from error
    if not isinstance(header, dict):
        raise ToolError(f"its safetensors header is a {type(header).__name__} where an object belongs")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ToolError("its safetensors metadata is not a table of texts; write the file again")

    start = 8 + length
    spans = {name: _check_entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise ToolError(f"its tensor {name!r} begins at byte {begin} where {end} was due: a gap or an overlap")
        end = stop
    if start + end != size:
        raise ToolError(f"has {size} bytes where its header says {start + end}; it is cut short or damaged")
    tensors = {}
    for name, entry in header.items():
        fetch = partial(_fetch, file, start + spans[name][0], start + spans[name][1])
        tensors[name] = LazyTensor(DTYPE_OF_CODE[entry["dtype"]], tuple(entry["shape"]), fetch)
    return tensors, metadata


def _check_entry(name: str, entry: Any) -> tuple[int, int]:
    """The byte span of a tensor, counted from the end of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ToolError(f"its tensor {name!r} is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPE_OF_CODE:
        raise ToolError(f"its tensor {name!r} has dtype {code!r}; known are {', '.join(DTYPE_OF_CODE)}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ToolError(f"its tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, stop = offsets
    wanted = LazyTensor(DTYPE_OF_CODE[code], tuple(shape), bytes).nbytes
    if stop - begin != wanted:
        raise ToolError(f"its tensor {name!r} takes {stop - begin} bytes where {code} {shape} needs {wanted}")
    return begin, stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _fetch(file: BinaryIO, begin: int, stop: int) -> bytes:
    file.seek(begin)
    return file.read(stop - begin)


def write_safetensors(
    target: Sink | Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write `safetensors_parts` and return the sha256 of what was written.

    A path is written through a temporary file beside it.
    """
    if isinstance(target, Path):
        with replacing(target) as file:
            return write_safetensors(file, tensors, metadata)
    digest = hashlib.sha256()
    for part in safetensors_parts(tensors, metadata):
        target.write(part)
        digest.update(part)
    return digest.hexdigest()


def safetensors_parts(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | bytearray]:
    """The bytes of a file that holds `tensors`, piece by piece. Equal input gives equal bytes.

    The header lists the tensors in the order given; their bytes lie with wide elements first, so that each tensor
    is aligned to its element size, as readers that map the file expect.
    """
    if "__metadata__" in tensors:
        raise ToolError("a tensor named '__metadata__' cannot be stored in a safetensors file; rename it")
    by_width = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    offsets, end = {}, 0
    for name in by_width:
        offsets[name] = [end, end + tensors[name].nbytes]
        end += tensors[name].nbytes
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, tensor in tensors.items():
        code = DTYPES[tensor.dtype].code
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets[name]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    yield len(text).to_bytes(8, "little") + text
    for name in by_width:
        yield tensors[name].read()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
