"""Tensors that know their dtype and shape, and fetch their bytes on demand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.errors import ToolError


class DType(NamedTuple):
    code: str  # what safetensors calls it
    itemsize: int  # bytes an element


DTYPES = {
    "float64": DType("F64", 8),
    "float32": DType("F32", 4),
    "float16": DType("F16", 2),
    "bfloat16": DType("BF16", 2),
    "int64": DType("I64", 8),
    "int32": DType("I32", 4),
    "int16": DType("I16", 2),
    "int8": DType("I8", 1),
    "uint8": DType("U8", 1),
    "bool": DType("BOOL", 1),
}


@dataclass(frozen=True)
class LazyTensor:
    """dtype: a key of `DTYPES`. fetch: gives the elements, row-major, little-endian, without gaps."""

    dtype: str
    shape: tuple[int, ...]
    fetch: Callable[[], bytes | bytearray] = field(repr=False, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def read(self) -> bytes | bytearray:
        """`nbytes` bytes: the elements, row-major, little-endian, without gaps. Raises ToolError for a damaged file."""
        data = self.fetch()
        if len(data) != self.nbytes:
            raise ToolError(f"gave {len(data)} bytes for a tensor of {self.nbytes}; the file changed while it was read")
        return data

    def numbers(self) -> NDArray[np.float64]:
        """The elements as float64, in the tensor's shape."""
        data = self.read()
        if self.dtype == "bfloat16":  # the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, np.dtype(self.dtype).newbyteorder("<"))
        return values.astype(np.float64).reshape(self.shape)
