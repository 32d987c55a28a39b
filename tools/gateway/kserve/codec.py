"""Requests and answers of ModelInfer between their forms on the wire and one form of ours.

REST: JSON, with tensors in it or, as bytes, behind it. gRPC: protobuf, with tensors in `contents` or
`raw_input_contents`. Tensors stay bytes from end to end, so nothing here costs time per number, save for
tensors in JSON.
"""

import base64
import binascii
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt, ValidationError
from pydantic_core import to_json

from tools.gateway.errors import GatewayError
from tools.proto import open_inference_pb2 as pb

NUMBERS: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
TAKEN = ("BYTES", "FP32")
LENGTH = struct.Struct("<I")  # before each element of BYTES
# Numbers that are written as JSON in one go; no other thread has its turn meanwhile.
PIECE = 1 << 15
# Of one request: bounds the work that one tensor of empty elements could make.
MAX_PICTURES = 64
MAX_SIDES = 4
MAX_SIDE = 2**31 - 1
SIZE = "binary_data_size"
BINARY = "binary_data"
BINARY_ALL = "binary_data_output"


@dataclass(frozen=True)
class Tensor:
    """data: of numbers the bytes, little endian and in C order; of BYTES the elements."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | list[bytes]


@dataclass(frozen=True)
class InferRequest:
    """binary: which of the outputs REST answers as bytes, by name; `binary_all` for those not named."""

    inputs: list[Tensor]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    binary: Mapping[str, bool] = field(default_factory=dict)
    binary_all: bool = False


@dataclass(frozen=True)
class InferAnswer:
    model: str
    version: str
    id: str
    outputs: list[Tensor]
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return sum(len(tensor.data) for tensor in self.outputs if isinstance(tensor.data, bytes))


def invalid(message: str) -> GatewayError:
    return GatewayError(400, "InvalidTensor", message)


def checked(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements the tensor must have. Raises GatewayError."""
    if datatype not in TAKEN:
        raise invalid(f"input {name[:80]!r} is of datatype {datatype[:20]!r}; taken: {', '.join(TAKEN)}")
    if len(shape) > MAX_SIDES or not all(0 <= side <= MAX_SIDE for side in shape):
        raise invalid(
            f"input {name[:80]!r} has the shape {_shown(shape)}; taken: {MAX_SIDES} sides, each from 0 to {MAX_SIDE}"
        )
    count = math.prod(shape)
    if datatype == "BYTES" and count > MAX_PICTURES:
        raise invalid(f"input {name[:80]!r} has {count} elements; {MAX_PICTURES} at most in one request")
    return count


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Tensor:
    """A tensor out of its bytes as both transports send them. Raises GatewayError."""
    count = checked(name, datatype, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, tuple(shape), list(_elements(name, count, memoryview(raw))))
    wanted = count * NUMBERS[datatype].itemsize
    if len(raw) != wanted:
        raise invalid(f"input {name[:80]!r} has {len(raw)} bytes, but {datatype} of shape {_shown(shape)} has {wanted}")
    return Tensor(name, datatype, tuple(shape), bytes(raw))


def to_raw(tensor: Tensor) -> bytes:
    if isinstance(tensor.data, bytes):
        return tensor.data
    return b"".join(part for element in tensor.data for part in (LENGTH.pack(len(element)), element))


def _elements(name: str, count: int, raw: memoryview) -> Iterator[bytes]:
    start = 0
    for index in range(count):
        if len(raw) - start < LENGTH.size:
            raise invalid(f"input {name[:80]!r} has {index} elements, but its shape says {count}")
        (size,) = LENGTH.unpack_from(raw, start)
        start += LENGTH.size
        if len(raw) - start < size:
            raise invalid(
                f"element {index} of input {name[:80]!r} should have {size} bytes, but only {len(raw) - start} are"
                " left; each goes behind its length, 4 bytes little endian"
            )
        yield bytes(raw[start : start + size])
        start += size
    if start != len(raw):
        raise invalid(f"input {name[:80]!r} has {len(raw) - start} bytes more than the {count} elements of its shape")


def _shown(shape: Sequence[int]) -> str:
    return str(list(shape[: MAX_SIDES + 1]))[:80]


class InferInput(BaseModel):
    name: str
    datatype: str
    shape: list[NonNegativeInt]
    parameters: dict[str, Any] = {}
    data: Any = None


class InferOutput(BaseModel):
    name: str
    parameters: dict[str, Any] = {}


class InferBody(BaseModel):
    """The JSON of ModelInfer."""

    inputs: list[InferInput]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[InferOutput] = []


def read_rest(body: bytes, json_size: str | None) -> InferRequest:
    """json_size: the header Inference-Header-Content-Length. Raises GatewayError."""
    size = len(body)
    if json_size is not None:
        size = int(json_size) if json_size.isascii() and json_size.isdigit() and len(json_size) < 10 else -1
        if not 0 <= size <= len(body):
            raise invalid(
                f"Inference-Header-Content-Length is {json_size[:20]!r}; the JSON at the head of a body of"
                f" {len(body)} bytes cannot have that length"
            )
    try:
        read = InferBody.model_validate_json(body[:size])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise invalid(f"{where}: {first['msg']}") from error
    behind = memoryview(body)[size:]
    inputs = []
    for given in read.inputs:
        tensor, behind = _read_input(given, behind)
        inputs.append(tensor)
    if behind:
        raise invalid(f"{len(behind)} bytes follow the JSON and the tensors behind it; {SIZE} must name them all")
    return InferRequest(
        inputs,
        read.id,
        {name: value for name, value in read.parameters.items() if name != BINARY_ALL},
        [output.name for output in read.outputs],
        {output.name: output.parameters[BINARY] is True for output in read.outputs if BINARY in output.parameters},
        read.parameters.get(BINARY_ALL) is True,
    )


def _read_input(given: InferInput, behind: memoryview) -> tuple[Tensor, memoryview]:
    """The tensor, and what lies behind its bytes."""
    size = given.parameters.get(SIZE)
    if size is None:
        return _from_json(given), behind
    if given.data is not None:
        raise invalid(f"input {given.name[:80]!r} has both data and {SIZE}; send it once")
    if type(size) is not int or not 0 <= size <= len(behind):
        raise invalid(
            f"{SIZE} of input {given.name[:80]!r} is {str(size)[:20]}, but {len(behind)} bytes follow what is read"
        )
    return from_raw(given.name, given.datatype, given.shape, behind[:size]), behind[size:]


def _from_json(given: InferInput) -> Tensor:
    count = checked(given.name, given.datatype, given.shape)
    if not isinstance(given.data, list):
        raise invalid(f"input {given.name[:80]!r} has neither data, as a list, nor {SIZE}")
    if given.datatype == "BYTES":
        if len(given.data) != count:
            raise invalid(f"input {given.name[:80]!r} has {len(given.data)} elements, but its shape says {count}")
        elements = [_from_base64(given.name, element) for element in given.data]
        return Tensor(given.name, given.datatype, tuple(given.shape), elements)
    try:
        # Without the type, numpy would make room for the longest text in every place.
        with np.errstate(over="ignore"):
            array = np.array(given.data, NUMBERS[given.datatype])
    except (ValueError, TypeError, OverflowError):
        raise invalid(f"data of input {given.name[:80]!r} are not numbers in lists of equal lengths") from None
    if array.shape not in ((count,), tuple(given.shape)):
        raise invalid(
            f"data of input {given.name[:80]!r} are of shape {_shown(array.shape)}, but its shape says"
            f" {_shown(given.shape)}"
        )
    return Tensor(given.name, given.datatype, tuple(given.shape), array.tobytes())


def _from_base64(name: str, element: object) -> bytes:
    try:
        return base64.b64decode(element, validate=True)  # type: ignore[arg-type]  # the other types raise
    except (binascii.Error, TypeError, ValueError):
        raise invalid(
            f"data of input {name[:80]!r} must be pictures in base64, since JSON holds no bytes; or send the bytes"
            f" behind the JSON and {SIZE}"
        ) from None


def write_rest(answer: InferAnswer, request: InferRequest) -> tuple[bytes, int | None]:
    """The body, and the length of the JSON at its head where tensors follow it."""
    outputs = []
    behind = []
    for tensor in answer.outputs:
        told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if request.binary.get(tensor.name, request.binary_all):
            behind.append(to_raw(tensor))
            outputs.append(to_json(told | {"parameters": {SIZE: len(behind[-1])}}))
        else:
            outputs.append(_extended(to_json(told), "data", _json_data(tensor)))
    head: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if answer.id:
        head["id"] = answer.id
    if answer.parameters:
        head["parameters"] = answer.parameters
    json = _extended(to_json(head), "outputs", b"[" + b",".join(outputs) + b"]")
    return b"".join([json, *behind]), len(json) if behind else None


def _json_data(tensor: Tensor) -> bytes:
    if not isinstance(tensor.data, bytes):
        return to_json([element.decode() for element in tensor.data])
    numbers = np.frombuffer(tensor.data, NUMBERS[tensor.datatype])
    pieces = (to_json(numbers[start : start + PIECE].tolist())[1:-1] for start in range(0, len(numbers), PIECE))
    return b"[" + b",".join(pieces) + b"]"


def _extended(object: bytes, name: str, value: bytes) -> bytes:
    """A JSON object, which is not empty, with one more member."""
    return object[:-1] + b"," + to_json(name) + b":" + value + b"}"


def read_grpc(message: pb.ModelInferRequest) -> InferRequest:
    """Raises GatewayError."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise invalid(f"raw_input_contents has {len(raw)} tensors for {len(message.inputs)} inputs; send one for each")
    inputs = []
    for index, given in enumerate(message.inputs):
        if not raw:
            inputs.append(_from_contents(given))
        elif given.contents.ByteSize():
            raise invalid(f"input {given.name[:80]!r} has contents beside raw_input_contents; send it once")
        else:
            inputs.append(from_raw(given.name, given.datatype, given.shape, raw[index]))
    return InferRequest(
        inputs,
        message.id,
        {name: _parameter(name, value) for name, value in message.parameters.items()},
        [output.name for output in message.outputs],
    )


def _from_contents(given: pb.ModelInferRequest.InferInputTensor) -> Tensor:
    count = checked(given.name, given.datatype, given.shape)
    used = "bytes_contents" if given.datatype == "BYTES" else "fp32_contents"
    values = getattr(given.contents, used)
    given.contents.DiscardUnknownFields()
    others = [descriptor.name for descriptor, _ in given.contents.ListFields() if descriptor.name != used]
    if others:
        raise invalid(f"input {given.name[:80]!r} of {given.datatype} has {others[0]}; send {used}")
    if len(values) != count:
        raise invalid(
            f"{used} of input {given.name[:80]!r} has {len(values)} elements, but shape {_shown(given.shape)} has"
            f" {count}"
        )
    if given.datatype == "BYTES":
        return Tensor(given.name, given.datatype, tuple(given.shape), list(values))
    # On the wire the numbers of the only field lie as we want them, behind a tag and their length.
    size = count * NUMBERS["FP32"].itemsize
    packed = given.contents.SerializeToString()
    return Tensor(given.name, given.datatype, tuple(given.shape), packed[len(packed) - size :])


def _parameter(name: str, value: pb.InferParameter) -> Any:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameter {name[:80]!r} has no value that is known here; send a boolean, number or string")
    return getattr(value, kind)


def write_grpc(answer: InferAnswer) -> pb.ModelInferResponse:
    """Tensors always go as `raw_output_contents`."""
    return pb.ModelInferResponse(
        model_name=answer.model,
        model_version=answer.version,
        id=answer.id,
        parameters={name: pb.InferParameter(string_param=value) for name, value in answer.parameters.items()},
        outputs=[{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in answer.outputs],
        raw_output_contents=[to_raw(tensor) for tensor in answer.outputs],
    )
