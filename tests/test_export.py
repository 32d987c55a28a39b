"""Networks to files of other engines, packed into archives that are proven to answer as torch does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from model_folder import assert_one_line, encode, scene
from test_archive import rebuilt
from test_torchvision_detector import weights
from torch import Tensor, nn
from train_set import write_set

from handlers.errors import BadSettings, MarinaError
from handlers.pipeline import Pipeline
from handlers.runtimes import load_network
from handlers.runtimes.torch import TorchNetwork
from handlers.settings import Postprocess, Runtime, Settings
from handlers.weights import load_state
from model_defs import build
from model_defs.yolov5 import YOLOv5
from tools.archive.build import build_archive, check_recipe, settings_of
from tools.archive.diff import diff_archives
from tools.archive.inspect import as_table, inspect_archive
from tools.archive.reader import open_archive
from tools.archive.recipe import Recipe, load_recipe
from tools.archive.verify import verify_archive
from tools.cli import main
from tools.doctor.checks import check_target
from tools.errors import ToolError
from tools.export.network import export_network
from tools.export.parity import BOUNDS, Report, beyond, compare
from tools.export.quantise import behind_convolutions

MISSING = "ENGINE MISSING: {} is not installed, so nothing of it is checked"


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=MISSING.format(package))


@pytest.fixture
def recipe_folder(repository: Path, tmp_path: Path) -> Path:
    """A copy of the recipe `shapes` to change."""
    return Path(shutil.copytree(repository / "archives/shapes", tmp_path / "recipe"))


def recipe(folder: Path, **values: object) -> Recipe:
    path = folder / "archive.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    return load_recipe(path)


@pytest.fixture(scope="module")
def onnx_archive(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive `shapes` for ONNX Runtime, built once."""
    needs("onnx", "onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    given = recipe(
        Path(shutil.copytree(repository / "archives/shapes", folder / "recipe")), runtime={"backend": "onnx"}
    )
    return build_archive(given, folder / "shapes.mar").path


def test_an_onnx_archive_is_the_same_again(
    onnx_archive: Path, recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(recipe_folder, runtime={"backend": "onnx"}).path
    assert main(["archive", "build", str(path), "--output", str(tmp_path / "a.mar")]) == 0
    assert "note: parity with torch in fp32 on 2 pictures, 10 detections" in capsys.readouterr().out
    assert (tmp_path / "a.mar").read_bytes() == onnx_archive.read_bytes()


def test_an_onnx_archive_holds_the_network_and_its_report(onnx_archive: Path, repository: Path) -> None:
    with open_archive(onnx_archive) as archive:
        names = archive.names()
        assert archive.manifest["model"]["serializedFile"] == "model.onnx"
        assert json.loads(archive.read("golden/scene.json")) == json.loads(
            (repository / "archives/shapes/golden/scene.json").read_text()
        )
    assert "model.onnx" in names
    assert "model.safetensors" not in names
    assert not any(name.startswith("model_defs/yolov5") or "runtimes/torch" in name for name in names)
    provenance = inspect_archive(onnx_archive)["provenance"]
    assert {"torch", "onnxruntime"} <= set(provenance["verified_with"])
    parity = provenance["parity"]
    assert parity["pictures"] == 2
    assert parity["detections"] == 10
    assert parity["min_iou"] > 0.999
    told = as_table(inspect_archive(onnx_archive))
    assert "runtime     onnx fp32 dynamic\n" in told
    assert (
        "parity      2 pictures, 10 detections: lowest IoU 1.0, largest score difference 0.0, 0 gained, 0 lost" in told
    )
    assert "golden pictures answered" in verify_archive(onnx_archive).known[-1]
    assert check_target(onnx_archive).level == "ok"


def test_an_int8_archive_is_fitted_compared_and_measured(recipe_folder: Path, tmp_path: Path) -> None:
    """Its own answers are what it has to keep giving; those of the recipe are of torch in fp32."""
    needs("nncf", "openvino")
    pictures = write_set(tmp_path / "set", train=12, valid=6, width=320, height=320)
    runtime = {"backend": "openvino", "precision": "int8", "shape": "fixed"}
    parity = {"min_iou": 0.5, "max_score_difference": 0.5, "max_gained": 20, "max_lost": 20, "max_map_drop": 0.5}
    given = recipe(recipe_folder, runtime=runtime, parity=parity, preprocess={"size": 320, "shape": "square"})
    built = build_archive(given, tmp_path / "a.mar", calibration=pictures)
    (note,) = built.notes
    assert "on 20 pictures" in note
    assert "mAP50-95 0." in note
    with open_archive(built.path) as archive:
        assert {"model.xml", "model.bin"} <= set(archive.names())
        assert archive.size("model.bin") < 3_000_000
        own = json.loads(archive.read("golden/scene.json"))["detections"]
        assert archive.provenance["parity"]["map50_95"]["torch"] > 0.2
        assert archive.provenance["recipe"]["parity"] == parity
        assert archive.provenance["fitted_to"]["pictures"] == 18
    assert own != json.loads((recipe_folder / "golden/scene.json").read_text())["detections"]
    verify_archive(built.path)


def test_a_torch_archive_in_bf16_is_compared_too(recipe_folder: Path, tmp_path: Path) -> None:
    other = recipe(recipe_folder, runtime={"precision": "bf16"})
    built = build_archive(other, tmp_path / "a.mar")
    assert "parity with torch in fp32 on 2 pictures" in built.notes[0]
    with open_archive(built.path) as archive:
        assert "model.safetensors" in archive.names()
        assert 0 < archive.provenance["parity"]["max_score_difference"] < 0.05
    tight = recipe(recipe_folder, runtime={"precision": "bf16"}, parity={"max_score_difference": 0.0001})
    with pytest.raises(ToolError, match=r"golden/\w+.jpg differs by .*max_score_difference is 0.0001") as caught:
        build_archive(tight, tmp_path / "b.mar")
    assert_one_line(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mar", "recipe"]
    assert build_archive(tight, tmp_path / "b.mar", even_beyond=True).beyond == str(caught.value)
    assert built.beyond is None
    plain = build_archive(recipe(recipe_folder, runtime={}, parity={}), tmp_path / "c.mar").path
    assert "runtime.precision: fp32 -> bf16" in diff_archives(plain, built.path)


def test_golden_answers_of_the_recipe_are_those_of_torch_in_fp32(recipe_folder: Path, tmp_path: Path) -> None:
    path = recipe_folder / "golden/scene.json"
    answer = json.loads(path.read_text())
    answer["detections"][0]["box"][0] += 60
    path.write_text(json.dumps(answer))
    with pytest.raises(MarinaError, match=r"scene\.jpg gets another answer"):
        build_archive(recipe(recipe_folder, runtime={"precision": "bf16"}), tmp_path / "a.mar")


def test_an_archive_whose_engine_is_absent_says_so(onnx_archive: Path, tmp_path: Path) -> None:
    """In the process that sees nothing but the archive and the installed libraries."""
    absent = b"raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')"
    without = rebuilt(onnx_archive, tmp_path / "b.mar", {"onnxruntime.py": absent})
    line = str(check_target(without))
    assert line.startswith("broken")
    assert "runtime.backend is onnx, but this server has no onnxruntime; install it there" in line


class Tiny(YOLOv5):
    """One layer before the head, so that the compiler is soon done."""

    def __init__(self) -> None:
        super().__init__("n", 2)
        self.layers = nn.ModuleList(nn.Conv2d(3, c, stride, stride) for c, stride in ((64, 8), (128, 16), (256, 32)))

    def features(self, images: Tensor) -> list[Tensor]:
        return [layer(images) for layer in self.layers]


@pytest.fixture
def settings(repository: Path) -> Settings:
    return settings_of(load_recipe(repository / "archives/shapes"))


def test_aoti_is_compiled_for_any_number_and_size(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tiny = Tiny().eval().requires_grad_(False)
    wanted = replace(settings, runtime=Runtime("aoti"))
    name, exported = export_network(tiny, wanted, tmp_path, [])
    assert exported.machine is not None
    assert [path.name for path in tmp_path.iterdir()] == [name]
    # What torch.export compiles test programs for, at every load.
    monkeypatch.setattr("torch._inductor.codecache.get_device_information", lambda device: pytest.fail("it compiles"))
    network = load_network(tmp_path, replace(wanted, weights=name, exported=exported), 2, torch.device("cpu"))
    for shape in ((1, 3, 32, 32), (3, 3, 64, 96)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        for threshold in (0.01, 0.0, 1.0):
            answers = (each.candidates(scaled, threshold) for each, scaled in ((network, images), (tiny, images / 255)))
            for found, expected in zip(*answers, strict=True):
                assert len(found.scores) == len(expected.scores)
                assert torch.allclose(found.scores, expected.scores, atol=1e-5)


def test_what_an_engine_refuses_is_one_line(settings: Settings, tmp_path: Path) -> None:
    class Unknown(Tiny):
        def features(self, images: Tensor) -> list[Tensor]:
            added = torch.linalg.eigvals(images[:, 0, :32, :32]).real.sum()
            return [feature + added for feature in super().features(images)]

    with pytest.raises(ToolError, match=r"yolov5 to onnx cannot be exported: .*eigvals") as caught:
        export_network(Unknown().eval(), replace(settings, runtime=Runtime("onnx")), tmp_path, [])
    assert_one_line(caught.value)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_faster_rcnn_answers_as_in_torch(settings: Settings, backend: str, tmp_path: Path) -> None:
    """Any size, one picture at a time, every candidate that torchvision has."""
    needs("onnx", backend.replace("onnx", "onnxruntime"))
    detector = build("fasterrcnn_mobilenet_v3_large_320_fpn", 4, min_size=96, max_size=160)
    load_state(detector, weights(detector.state_dict(), conv_gain=0.5))
    device = torch.device("cpu")
    plain = TorchNetwork(detector, device, torch.float32)
    model = replace(settings.model, definition="fasterrcnn_mobilenet_v3_large_320_fpn")
    postprocess = Postprocess(score_threshold=0.3)
    wanted = replace(settings, model=model, runtime=Runtime(backend), postprocess=postprocess, golden=())
    name, exported = export_network(detector, wanted, tmp_path, [])
    assert exported.single
    wanted = replace(wanted, weights=name, exported=exported)
    labels = ["__background__", "a", "b", "c"]
    networks = (plain, load_network(tmp_path, wanted, 4, device))
    expected, other = (Pipeline(wanted, labels, network, device) for network in networks)
    pictures = [
        (str(seed), encode(scene(height, width, seed))) for seed, (height, width) in enumerate([(120, 160), (150, 90)])
    ]
    report = Report(compare(expected, other, pictures, 2, BOUNDS["fp32"]), None)
    assert beyond(report, BOUNDS["fp32"]) is None
    assert report.detections > 20
    batch = [encode(scene(120, 160, seed)) for seed in (3, 4, 5)]
    together = other.detect(batch, other.defaults)
    for body, found in zip(batch, together, strict=True):
        (alone,) = other.detect([body], other.defaults)
        assert torch.equal(found.labels, alone.labels)
        assert torch.allclose(found.boxes, alone.boxes, atol=0.01)
    thin = encode(scene(1, 5000))
    refusals = [str(pipeline.detect([thin], pipeline.defaults)[0]) for pipeline in (expected, other)]
    assert refusals[0] == refusals[1]
    assert "less than one pixel thin" in refusals[0]


@pytest.mark.parametrize("runtime", [Runtime("onnx"), Runtime("openvino", "int8")], ids=["onnx", "openvino int8"])
def test_the_same_weights_give_the_same_bytes(settings: Settings, runtime: Runtime, tmp_path: Path) -> None:
    """In a process that has made other networks before, too."""
    needs("onnx", *(["nncf", "openvino"] if runtime.backend == "openvino" else []))
    detector, made = build("yolov5", 4, size="n").eval(), []
    pictures = [torch.full((3, 64, 64), level, dtype=torch.uint8) for level in (0, 120, 250)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_network(detector, replace(settings, runtime=runtime), tmp_path / name, pictures)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


def test_boxes_are_decoded_behind_what_is_quantised(settings: Settings, tmp_path: Path) -> None:
    """What is left of the head's convolution, for the cells of each of the three levels, and no whole one."""
    needs("nncf", "openvino")
    import openvino

    detector = build("yolov5", 4, size="n").eval()
    name, _ = export_network(detector, replace(settings, runtime=Runtime("openvino")), tmp_path, [])
    model = openvino.Core().read_model(tmp_path / name)
    kinds = {operation.get_friendly_name(): operation.get_type_name() for operation in model.get_ops()}
    behind = [kinds[each] for each in behind_convolutions(model)]
    assert behind.count("NonZero") == 3
    assert behind.count("MatMul") == 3
    assert not {"Convolution", "MaxPool", "Constant"} & set(behind)


def test_a_bare_network_comes_with_what_one_must_know(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnx", "onnxruntime")
    arguments = ["export", str(repository / "archives/shapes"), "--backend", "onnx", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{tmp_path / 'out'}: model.onnx, network.json, ") and "untested" not in told.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "network.json"]
    described = json.loads((tmp_path / "out/network.json").read_text())
    assert described["inputs"] == ["images", "score_threshold"]
    assert described["outputs"] == ["rows", "pictures"]
    assert list(described["meaning"]) == [*described["inputs"], *described["outputs"]]
    assert described["preprocess"] == {"size": 320, "shape": "rect", "padding": 114}
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / described["network"])
    given = torch.zeros(2, 3, 64, 96).numpy(), torch.tensor(0.0).numpy()
    rows, pictures = session.run(described["outputs"], dict(zip(described["inputs"], given, strict=True)))
    each = 3 * (8 * 12 + 4 * 6 + 2 * 3)
    assert rows.shape == (2 * each, 5 + len(described["labels"]))
    assert np.bincount(pictures).tolist() == [each, each]


def test_an_engine_that_was_never_run_is_said_to_be_untested(
    repository: Path, recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnx")
    flags = ["--backend", "tensorrt", "--output", str(tmp_path / "out")]
    assert main(["export", str(repository / "archives/shapes"), *flags]) == 0
    assert capsys.readouterr().err.startswith("untested: Marina's makers have not run tensorrt on real hardware;")
    path = recipe(recipe_folder, runtime={"backend": "tensorrt"}, serving={"device": "cpu"}).path
    assert main(["archive", "build", str(path), "--output", str(tmp_path / "a.mar")]) == 1
    untested, refusal = capsys.readouterr().err.splitlines()
    assert untested.startswith("untested: ") and "serving.device is cpu" in refusal


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs no export; name an engine with --backend"),
        (["--backend", "onnx", "--precision", "int8"], "precision is int8, but onnx has fp32"),
        (
            ["--backend", "openvino", "--precision", "int8"],
            "give a folder of them, a hundred or more, with --calibration",
        ),
        (["--backend", "onnx", "--shape", "fixed"], "set preprocess.shape to square"),
        (["--backend", "onnx", "--calibration", "nowhere"], "calibration folder nowhere is not there"),
    ],
)
def test_a_wrong_export_is_one_line(
    repository: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(repository / "archives/shapes"), *flags, "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("definition", "runtime", "serving", "message"),
    [
        ("retinanet_resnet50_fpn", {"backend": "onnx"}, {}, "these can: yolov5, fasterrcnn_resnet50_fpn"),
        ("fasterrcnn_resnet50_fpn", {"backend": "aoti"}, {}, "these can: yolov5"),
        ("fasterrcnn_resnet50_fpn", {"backend": "onnx", "shape": "fixed"}, {}, "shape is fixed, .* of any size"),
        (
            "fasterrcnn_resnet50_fpn",
            {"backend": "openvino", "precision": "int8"},
            {},
            "fp32 and bf16 alone; take",
        ),
        ("yolov5", {"backend": "openvino"}, {"device": "gpu"}, "serving.device is gpu, where openvino does not run"),
        ("yolov5", {"backend": "tensorrt"}, {"device": "cpu"}, "serving.device is cpu, where tensorrt does not run"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    recipe_folder: Path, definition: str, runtime: dict, serving: dict, message: str
) -> None:
    given = recipe(recipe_folder, model={"definition": definition}, runtime=runtime, serving=serving)
    with pytest.raises(BadSettings, match=message) as caught:
        check_recipe(given)
    assert_one_line(caught.value)
