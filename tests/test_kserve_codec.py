"""KServe v2 on the wire, against the encoder and decoder of tritonclient, which nobody here wrote."""

import base64
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st

from tools.gateway.errors import GatewayError
from tools.gateway.kserve import codec
from tools.gateway.kserve.codec import (
    MAX_PICTURES,
    InferAnswer,
    InferRequest,
    Tensor,
    read_grpc,
    read_rest,
    write_grpc,
    write_rest,
)
from tools.proto import open_inference_pb2 as pb

PICTURE = b"\xff\xd8\xff\x00\x80 no text"
IMAGES = np.random.default_rng(1).random((2, 3, 4, 5), dtype=np.float32)


def refused(message: str):
    return pytest.raises(GatewayError, match=message)


def triton_body(binary: bool, array: np.ndarray, **more: object) -> tuple[bytes, str | None]:
    tensor = triton.InferInput("x", list(array.shape), "BYTES" if array.dtype == object else "FP32")
    tensor.set_data_from_numpy(array, binary_data=binary)
    body, size = triton.InferenceServerClient.generate_request_body([tensor], **more)
    return body, None if size is None else str(size)


def rest(inputs: object, behind: bytes = b"", **more: object) -> InferRequest:
    head = json.dumps({"inputs": inputs} | more).encode()
    return read_rest(head + behind, str(len(head)))


def one(**fields: object) -> list[dict]:
    return [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]} | fields]


def grpc_input(datatype: str = "FP32", shape: tuple[int, ...] = (2,), **contents: object) -> pb.ModelInferRequest:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "contents": contents}
    return pb.ModelInferRequest(inputs=[tensor])


@pytest.mark.parametrize("binary", [True, False])
def test_numbers_of_tritonclient_arrive_bit_by_bit(binary: bool):
    (tensor,) = read_rest(*triton_body(binary, IMAGES)).inputs

    assert tensor == Tensor("x", "FP32", (2, 3, 4, 5), IMAGES.tobytes())


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=MAX_PICTURES))
def test_pictures_of_tritonclient_arrive_bit_by_bit(pictures: list[bytes]):
    array = np.empty(len(pictures), dtype=object)
    array[:] = pictures

    assert read_rest(*triton_body(True, array)).inputs[0].data == pictures


def test_pictures_in_json_are_base64():
    elements = [base64.b64encode(PICTURE).decode()]

    assert rest(one(datatype="BYTES", shape=[1], data=elements)).inputs[0].data == [PICTURE]


def test_nested_and_flat_lists_of_numbers_are_the_same():
    flat = one(shape=IMAGES.shape, data=IMAGES.ravel().tolist())

    assert rest(flat).inputs[0].data == rest(one(shape=IMAGES.shape, data=IMAGES.tolist())).inputs[0].data


def test_request_of_tritonclient_is_read_whole():
    outputs = [triton.InferRequestedOutput("a", binary_data=True), triton.InferRequestedOutput("b", binary_data=False)]
    body = triton_body(True, IMAGES, outputs=outputs, request_id="seven", parameters={"score_threshold": "0.5"})

    read = read_rest(*body)

    assert (read.id, read.parameters, read.outputs) == ("seven", {"score_threshold": "0.5"}, ["a", "b"])
    assert (read.binary, read.binary_all) == ({"a": True, "b": False}, False)
    # tritonclient asks for bytes where no output is named.
    assert read_rest(*triton_body(True, IMAGES)).binary_all


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_reads_what_rest_writes(binary: bool):
    outputs = [
        Tensor("n", "INT64", (2,), np.array([1, -(2**60)], "<i8").tobytes()),
        Tensor("boxes", "FP32", (2, 3, 4, 5), IMAGES.tobytes()),
        Tensor("labels", "BYTES", (2,), ["café".encode(), b""]),
        Tensor("none", "FP32", (0, 4), b""),
    ]

    body, size = write_rest(InferAnswer("m", "1.0", "seven", outputs), InferRequest([], binary_all=binary))

    read = triton.InferenceServerClient.parse_response_body(body, header_length=size)
    assert (size is None) == (not binary)
    assert read.as_numpy("n").tolist() == [1, -(2**60)]
    assert (read.as_numpy("boxes") == IMAGES).all()
    assert [label if binary else label.encode() for label in read.as_numpy("labels")] == ["café".encode(), b""]
    assert read.as_numpy("none").shape == (0, 4)
    response = read.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("m", "1.0", "seven")


@pytest.mark.parametrize("piece", [1, 7, 120, 1000])
def test_many_numbers_are_written_piece_by_piece(piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codec, "PIECE", piece)
    outputs = [Tensor("x", "FP32", IMAGES.shape, IMAGES.tobytes()), Tensor("none", "FP32", (0,), b"")]

    body, _ = write_rest(InferAnswer("m", "1", "", outputs), InferRequest([]))

    assert [output["data"] for output in json.loads(body)["outputs"]] == [IMAGES.ravel().tolist(), []]


def test_parameters_of_an_answer_go_both_ways():
    answer = InferAnswer("m", "1", "", [], {"timing_ms": '[{"network": 7.5}]'})

    assert json.loads(write_rest(answer, InferRequest([]))[0])["parameters"] == {"timing_ms": '[{"network": 7.5}]'}
    assert write_grpc(answer).parameters["timing_ms"].string_param == '[{"network": 7.5}]'


def test_outputs_are_written_as_each_was_asked_for():
    outputs = [Tensor(name, "FP32", (1,), np.float32(7).tobytes()) for name in "ab"]

    body, size = write_rest(InferAnswer("m", "1", "", outputs), InferRequest([], binary={"a": True}))

    head = json.loads(body[:size])
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 4} and head["outputs"][1]["data"] == [7.0]
    assert body[size:] == np.float32(7).tobytes()
    assert "id" not in head and "parameters" not in head


@pytest.mark.parametrize("size", ["-1", "x", "99999", "9" * 30, "²"])
def test_length_of_the_json_must_be_true(size: str):
    with refused("Inference-Header-Content-Length"):
        read_rest(b'{"inputs": []}', size)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: Invalid JSON"),
        (b"\xff\xd8", "body: Invalid JSON"),
        (b"[1]", "body: Input should be an object"),
        (b"{}", "inputs: Field required"),
        (
            b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]}',
            "inputs.0.shape.0: Input should be greater",
        ),
        (b'{"inputs": [], "parameters": {"x": ' + b"9" * 5000 + b"}}", "body: Invalid JSON: number out of range"),
        (b'{"inputs": [], "id": 7}', "id: Input should be a valid string"),
        (b'{"inputs": ' + b"[" * 5000, "body: Invalid JSON"),
    ],
)
def test_json_that_is_none_of_ours_is_one_line(body: bytes, message: str):
    with refused(message) as caught:
        read_rest(body, None)

    assert caught.value.status == 400 and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datatype": "INT8"}, "datatype 'INT8'; taken: BYTES, FP32"),
        ({"data": None}, "neither data"),
        ({"data": 7}, "neither data"),
        ({"data": [1, 2, 3]}, r"of shape \[3\], but its shape says \[2\]"),
        ({"data": [[1], [2]]}, r"of shape \[2, 1\]"),
        ({"data": [[1], [2, 3]]}, "not numbers in lists of equal lengths"),
        ({"data": [1, "x" * 1000]}, "not numbers"),
        ({"data": [1, {}]}, "not numbers"),
        ({"data": [1, 10**400]}, "not numbers"),
        ({"data": json.loads("[" * 100 + "]" * 100)}, "not numbers"),
        ({"shape": [10**18, 10**18]}, "taken: 4 sides, each from 0 to 2147483647"),
        ({"shape": [10**4000]}, "taken: 4 sides"),
        ({"shape": [2**31 - 1] * 4}, "of shape"),
        ({"shape": [1] * 100_000}, "taken: 4 sides"),
        ({"parameters": {"binary_data_size": 8}}, "both data and binary_data_size"),
        ({"data": None, "parameters": {"binary_data_size": 8}}, "but 0 bytes follow"),
        ({"data": None, "parameters": {"binary_data_size": "8"}}, "binary_data_size of input 'x' is 8"),
        ({"datatype": "BYTES", "data": ["AAAA"]}, "has 1 elements, but its shape says 2"),
        ({"datatype": "BYTES", "data": ["no base64!", "AAAA"]}, "base64"),
        ({"datatype": "BYTES", "data": [1, 2]}, "base64"),
        ({"datatype": "BYTES", "data": ["é", "é"]}, "base64"),
        ({"datatype": "BYTES", "shape": [MAX_PICTURES + 1]}, "64 at most"),
    ],
)
def test_input_in_json_that_does_not_fit_is_refused(change: dict, message: str):
    with refused(message):
        rest(one(**change))


@pytest.mark.parametrize(
    ("datatype", "sent", "message"),
    [
        ("FP32", b"1234567", "has 7 bytes, but FP32 of shape .2. has 8"),
        ("FP32", b"123456789", "has 9 bytes"),
        ("BYTES", b"\x00\x00\x00\x00", "has 1 elements, but its shape says 2"),
        ("BYTES", b"\x00\x00\x00\x00\x00\x00", "has 1 elements, but its shape says 2"),
        ("BYTES", struct.pack("<I", 9) + b"short", "element 0 of input 'x' should have 9 bytes, but only 5 are left"),
        ("BYTES", bytes(8) + b"more", "has 4 bytes more than the 2 elements"),
        ("FP16", b"1234", "datatype 'FP16'"),
    ],
)
def test_bytes_of_a_wrong_length_are_refused_by_both_transports(datatype: str, sent: bytes, message: str):
    with refused(message):
        rest(one(datatype=datatype, data=None, parameters={"binary_data_size": len(sent)}), sent)
    with refused(message):
        read_grpc(
            pb.ModelInferRequest(inputs=[{"name": "x", "datatype": datatype, "shape": [2]}], raw_input_contents=[sent])
        )


def test_bytes_that_no_input_names_are_refused():
    with refused("3 bytes follow"):
        rest(one(), b"abc")


def test_raw_contents_of_grpc_arrive_bit_by_bit():
    read = read_grpc(
        pb.ModelInferRequest(
            id="seven",
            inputs=[
                {"name": "images", "datatype": "FP32", "shape": IMAGES.shape},
                {"name": "pictures", "datatype": "BYTES", "shape": [1]},
            ],
            parameters={
                "score_threshold": {"string_param": "0.5"},
                "max_detections": {"int64_param": 3},
                "iou_threshold": {"double_param": 0.25},
                "priority": {"uint64_param": 7},
            },
            outputs=[{"name": "boxes"}],
            raw_input_contents=[IMAGES.tobytes(), struct.pack("<I", len(PICTURE)) + PICTURE],
        )
    )

    assert [tensor.data for tensor in read.inputs] == [IMAGES.tobytes(), [PICTURE]]
    assert read.parameters == {"score_threshold": "0.5", "max_detections": 3, "iou_threshold": 0.25, "priority": 7}
    assert (read.id, read.outputs) == ("seven", ["boxes"])


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=300))
def test_numbers_in_contents_arrive_bit_by_bit(values: list[float]):
    (tensor,) = read_grpc(grpc_input(shape=(len(values),), fp32_contents=values)).inputs

    assert tensor.data == np.array(values, "<f4").tobytes()


def test_pictures_in_contents_arrive():
    assert read_grpc(grpc_input("BYTES", (1,), bytes_contents=[PICTURE])).inputs[0].data == [PICTURE]


def test_fields_that_nobody_knows_do_not_shift_the_numbers():
    message = grpc_input(fp32_contents=[1, 2])
    # Field 99 of the tensor's contents, a varint, behind the numbers.
    contents = message.inputs[0].contents.SerializeToString() + b"\x98\x06\x07"
    message.inputs[0].contents.CopyFrom(pb.InferTensorContents.FromString(contents))

    assert read_grpc(message).inputs[0].data == np.array([1, 2], "<f4").tobytes()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (grpc_input(fp32_contents=[1, 2, 3]), "fp32_contents of input 'x' has 3 elements"),
        (grpc_input(), "fp32_contents of input 'x' has 0 elements"),
        (grpc_input(fp64_contents=[1, 2]), "has fp64_contents; send fp32_contents"),
        (grpc_input(fp32_contents=[1, 2], bytes_contents=[b"x"]), "has bytes_contents; send fp32_contents"),
        (grpc_input("BYTES", (2,), bytes_contents=[b""]), "bytes_contents of input 'x' has 1 elements"),
        (grpc_input("INT32", int_contents=[1, 2]), "datatype 'INT32'"),
        (grpc_input(shape=(-2, -1), fp32_contents=[1, 2]), "taken: 4 sides"),
        (pb.ModelInferRequest(parameters={"p": {}}), "parameter 'p' has no value"),
    ],
)
def test_contents_that_do_not_fit_are_refused(message: pb.ModelInferRequest, line: str):
    with refused(line):
        read_grpc(message)


def test_contents_beside_raw_contents_are_refused():
    message = grpc_input(fp32_contents=[1, 2])
    message.raw_input_contents.append(bytes(8))

    with refused("has contents beside raw_input_contents"):
        read_grpc(message)


def test_each_input_needs_its_raw_contents():
    with refused("raw_input_contents has 2 tensors for 1 inputs"):
        read_grpc(pb.ModelInferRequest(inputs=[{"name": "x"}], raw_input_contents=[b"", b""]))


def test_answers_over_grpc_are_raw():
    outputs = [Tensor("a", "FP32", (1,), np.float32(7).tobytes()), Tensor("b", "BYTES", (2,), [b"ab", b""])]

    written = write_grpc(InferAnswer("m", "1", "seven", outputs))

    assert [output.name for output in written.outputs] == ["a", "b"] and written.outputs[1].shape == [2]
    assert list(written.raw_output_contents) == [np.float32(7).tobytes(), b"\x02\x00\x00\x00ab\x00\x00\x00\x00"]
    assert (written.model_name, written.model_version, written.id) == ("m", "1", "seven")


@pytest.mark.parametrize("ours_first", [True, False])
def test_stubs_live_beside_those_of_tritonclient(ours_first: bool):
    imports = ["from tools.proto import inference_pb2_grpc, open_inference_pb2_grpc", "import tritonclient.grpc"]

    subprocess.run([sys.executable, "-c", "\n".join(imports if ours_first else imports[::-1])], check=True)


def test_long_text_among_numbers_takes_no_room():
    with refused("not numbers"):
        rest(one(shape=[100_001], data=["x" * 1_000_000] + [1] * 100_000))
