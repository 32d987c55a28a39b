"""Every engine answers as torch does, whatever the shapes of a batch; and says in one line what it lacks."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folder import assert_one_line, encode
from numpy.random import default_rng
from torch import Tensor

from handlers.errors import BadArchive, BadSettings
from handlers.pipeline import Pipeline
from handlers.runtimes import load_network
from handlers.runtimes.exported import ExportedNetwork
from handlers.runtimes.torch import TorchNetwork
from handlers.settings import Exported, parse_settings
from tools.archive.build import settings_of
from tools.archive.recipe import load_recipe
from tools.data.draw import draw_scene
from tools.export.network import ROWS, export_network
from tools.export.parity import BOUNDS, Report, beyond, compare

PICTURES = [
    encode(draw_scene(default_rng(seed), *size, most_shapes=8)[0])
    for seed, size in enumerate([(320, 240), (240, 320), (500, 180), (320, 320)])
]
# Without one of these OpenVINO goes on in float32.
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}
# A score below it may be nothing in another engine.
LEAST = 0.001


class Reference:
    """The detector of drawn shapes in torch, and what it becomes in other engines, each made once."""

    def __init__(self, recipe: Path, folder: Path):
        self.folder = folder
        shutil.copy(recipe / "shapes.safetensors", folder / "model.safetensors")
        shutil.copy(recipe / "index_to_name.json", folder)
        self.handler = asdict(settings_of(load_recipe(recipe))) | {"golden": []}
        self._made: dict[str, dict[str, Any]] = {}
        self.pipeline = Pipeline.load(folder, {"maxWorkers": 64, "handler": self.handler})

    def config(self, backend: str, precision: str = "fp32", shape: str = "dynamic") -> dict[str, Any]:
        """The model-config.yaml of an archive; its network's files lie in the folder."""
        runtime = {"backend": backend, "shape": shape}
        preprocess = {"size": 320, "shape": "square" if shape == "fixed" else "rect"}
        handler = self.handler | {"runtime": runtime, "preprocess": preprocess}
        if backend != "torch":
            handler |= self._exported(handler, f"{backend}-{shape}")
        return {"maxWorkers": 64, "handler": handler | {"runtime": runtime | {"precision": precision}}}

    def _exported(self, handler: dict[str, Any], key: str) -> dict[str, Any]:
        if key not in self._made:
            self._made[key] = self._export(handler, key)
        return self._made[key]

    def _export(self, handler: dict[str, Any], key: str) -> dict[str, Any]:
        (self.folder / key).mkdir()
        network = self.pipeline.network
        assert isinstance(network, TorchNetwork)
        name, exported = export_network(network.detector, parse_settings(handler), self.folder / key, [])
        return {"weights": f"{key}/{name}", "exported": asdict(exported)}


@pytest.fixture(scope="module")
def reference(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(repository / "archives/shapes", tmp_path_factory.mktemp("reference"))


@pytest.fixture(params=["onnx", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(
        {"onnx": "onnxruntime"}.get(request.param, request.param),
        reason=f"ENGINE MISSING: {request.param} is not installed, so nothing of it is checked",
    )
    return request.param


def by_torch(reference: Reference, config: dict[str, Any]) -> Pipeline:
    plain = config["handler"] | {"runtime": {}, "weights": "model.safetensors", "exported": None}
    return Pipeline.load(reference.folder, config | {"handler": plain})


@pytest.mark.parametrize("shape", ["dynamic", "fixed"])
def test_an_engine_answers_as_torch_does(reference: Reference, engine: str, shape: str) -> None:
    config = reference.config(engine, shape=shape)
    other = Pipeline.load(reference.folder, config)
    expected = by_torch(reference, config)
    pictures = [(str(number), body) for number, body in enumerate(PICTURES)]
    report = Report(compare(expected, other, pictures, len(pictures), BOUNDS["fp32"]), None)
    assert beyond(report, BOUNDS["fp32"]) is None
    assert report.detections > 10


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("shape", ["dynamic", "fixed"])
def test_a_batch_is_answered_as_each_alone(reference: Reference, engine: str, shape: str, multi_label: bool) -> None:
    """Also one larger than a fixed shape, and pictures whose channels lie together."""
    config = reference.config(engine, shape=shape)
    network = Pipeline.load(reference.folder, config).network
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 320, 320, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    with torch.inference_mode():
        together = network.candidates(images, 0.0, multi_label)
        expected = by_torch(reference, config).network.candidates(images, 0.0, multi_label)
        for index, found in enumerate(together):
            (alone,) = network.candidates(images[index : index + 1].contiguous(), 0.0, multi_label)
            assert len(found.scores) >= 3 * (40**2 + 20**2 + 10**2)
            for other in (alone, expected[index]):
                # Of two classes as good as each other, either may be the best.
                assert (found.labels == other.labels).float().mean() > 0.99
                assert torch.allclose(found.boxes, other.boxes, atol=0.01)
                assert torch.allclose(found.scores, other.scores, atol=1e-4)


@pytest.mark.parametrize("shape", ["dynamic", "fixed"])
def test_an_engine_gives_the_rows_that_torch_gives(reference: Reference, engine: str, shape: str) -> None:
    config = reference.config(engine, shape=shape)
    images = torch.rand(3, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = Pipeline.load(reference.folder, config).network.rows(images)
        expected = by_torch(reference, config).network.rows(images)
    assert found.shape == expected.shape == (3, 3 * (40**2 + 20**2 + 10**2), 11)
    assert torch.allclose(found, expected, rtol=1e-3, atol=0.01)


@pytest.mark.parametrize("shape", ["dynamic", "fixed"])
def test_levels_with_nothing_above_the_threshold(reference: Reference, engine: str, shape: str) -> None:
    """Also before any other picture: engines have kept the sizes of the one before, or none."""
    config = reference.config(engine, shape=shape)
    body = encode(draw_scene(default_rng(3), 320, 320, most_shapes=3)[0])
    expected = by_torch(reference, config)
    images = expected.read({"body": body}, {}).items[0].tensor
    assert images is not None
    with torch.inference_mode():
        (every,) = expected.network.candidates(images[None], 0.0)
        best = float(every.scores.max())
        for first in (1.0, best - 0.001, 0.25, LEAST):
            network = Pipeline.load(reference.folder, config).network
            for threshold in (first, LEAST, first, 1.0, first):
                (found,) = network.candidates(images[None], threshold)
                assert len(found.scores) == (every.scores > threshold).sum(), (first, threshold)


def test_openvino_in_bf16_is_near(reference: Reference) -> None:
    pytest.importorskip("openvino", reason="ENGINE MISSING: openvino is not installed, so bf16 is not checked")
    differences = apart(reference, reference.config("openvino", "bf16"))
    assert differences.median() < 0.03
    if BF16_INSTRUCTIONS & {name for name, there in torch.cpu.get_capabilities().items() if there}:
        assert differences.median() > 1e-3


def test_torch_in_bf16_is_near(reference: Reference) -> None:
    """Boxes are decoded in float32: eight bits would place one to several pixels."""
    assert 1e-3 < apart(reference, reference.config("torch", "bf16")).median() < 0.03
    network = reference.pipeline.network
    assert isinstance(network, TorchNetwork)
    raw = [level.bfloat16() for level in network.detector.raw(torch.rand(1, 3, 320, 320))]
    head = network.detector.head
    assert torch.equal(head.decode(raw), head.decode([level.float() for level in raw]))


def apart(reference: Reference, config: dict[str, Any]) -> Tensor:
    """How far each candidate's box is from that of torch in fp32, in units of its shorter side."""
    found = []
    expected, other = by_torch(reference, config), Pipeline.load(reference.folder, config)
    for body in PICTURES:
        images = expected.read({"body": body}, {}).items[0].tensor
        assert images is not None
        with torch.inference_mode():
            (full,), (rounded,) = (each.network.candidates(images[None], 0.0) for each in (expected, other))
        assert len(full.boxes) == len(rounded.boxes)
        size = (full.boxes[:, 2:] - full.boxes[:, :2]).amin(dim=1)
        found.append((full.boxes - rounded.boxes).abs().amax(dim=1) / size)
    return torch.cat(found)


def test_outputs_of_one_picture_at_a_time() -> None:
    """Boxes, labels and scores, as Faster R-CNN gives them."""
    seen = []

    def run(images: Tensor, threshold: Tensor) -> list[Tensor]:
        seen.append((tuple(images.shape), round(threshold.item(), 2)))
        return [torch.eye(4) * 9, torch.tensor([1, 2, 1, 2]), torch.tensor([0.9, 0.1, 0.5, 0.4])]

    network = ExportedNetwork(Exported(True, False, 1, ("boxes", "labels", "scores"), True), run)
    found = network.candidates(torch.zeros(2, 3, 8, 9, dtype=torch.uint8), 0.4)
    assert seen == [((1, 3, 8, 9), 0.4)] * 2
    assert [each.labels.tolist() for each in found] == [[1, 2, 1, 2]] * 2
    assert found[0].boxes.tolist() == [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]]


COME_AND_GO = """
import gc, json, signal, sys
from pathlib import Path
from handlers.pipeline import Pipeline

folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
signal.signal(signal.SIGUSR1, lambda number, frame: print("signal seen"))
networks = [Pipeline.load(folder, config), Pipeline.load(folder, config)]
while networks:
    del networks[0]
    gc.collect()
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_process_whose_networks_come_and_go_outlives_signals(reference: Reference, engine: str) -> None:
    config = json.dumps(reference.config(engine))
    command = [sys.executable, "-c", COME_AND_GO, str(reference.folder), config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "signal seen\n"), done.stderr


@pytest.mark.parametrize("backend", ["onnx", "openvino", "tensorrt"])
def test_an_engine_that_is_not_installed_is_one_line(
    reference: Reference, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "openvino" if backend == "openvino" else "onnxruntime"
    for name in (f"handlers.runtimes.{backend}", "handlers.runtimes.onnx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    settings = parse_settings(reference.handler | {"runtime": {"backend": backend}})
    with pytest.raises(BadSettings, match=f"runtime.backend is {backend}, but this server has no {package}") as caught:
        load_network(reference.folder, settings, 5, torch.device("cpu"))
    assert_one_line(caught.value)


def test_a_damaged_network_is_one_line(reference: Reference, engine: str, tmp_path: Path) -> None:
    config = reference.config(engine)
    name = config["handler"]["weights"]
    target = tmp_path / name
    target.parent.mkdir()
    target.write_bytes((reference.folder / name).read_bytes()[:1000])
    with pytest.raises(BadArchive, match=f"{name} cannot be loaded") as caught:
        load_network(tmp_path, parse_settings(config["handler"]), 5, torch.device("cpu"))
    assert_one_line(caught.value)


def test_code_for_another_machine_is_one_line(reference: Reference) -> None:
    exported = Exported(False, True, 32, ROWS, False, machine="torch 1.0, vax, DEFAULT")
    handler = reference.handler | {"runtime": {"backend": "aoti"}, "exported": asdict(exported)}
    with pytest.raises(BadArchive, match=r"compiled for torch 1\.0, vax, DEFAULT, but this is torch") as caught:
        load_network(reference.folder, parse_settings(handler), 5, torch.device("cpu"))
    assert_one_line(caught.value)


def test_tensorrt_needs_a_gpu(reference: Reference) -> None:
    pytest.importorskip("onnxruntime", reason="ENGINE MISSING: onnxruntime is not installed")
    settings = parse_settings(reference.handler | {"runtime": {"backend": "tensorrt"}})
    with pytest.raises(BadSettings, match="tensorrt, which runs on NVIDIA's GPUs alone") as caught:
        load_network(reference.folder, settings, 5, torch.device("cpu"))
    assert_one_line(caught.value)


def test_onnx_runtime_without_cuda_is_one_line(reference: Reference) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ENGINE MISSING: onnxruntime is not installed")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    settings = parse_settings(reference.config("onnx")["handler"])
    with pytest.raises(BadSettings, match="cannot run on cuda") as caught:
        load_network(reference.folder, settings, 5, torch.device("cuda", 0))
    assert_one_line(caught.value)


@pytest.mark.parametrize(("flags", "warned"), [({"avx2": True}, True), ({"avx512_vnni": True}, False)])
def test_int8_on_a_processor_without_its_instructions_says_so(
    reference: Reference,
    flags: dict[str, bool],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("openvino", reason="ENGINE MISSING: openvino is not installed, so int8 is not checked")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    with caplog.at_level(logging.WARNING):
        Pipeline.load(reference.folder, reference.config("openvino", "int8"))
    assert ("it works, slowly" in caplog.text) == warned
    assert len(caplog.messages) == warned
