"""A detector's network, written as the file of another engine.

    torch -> model.onnx                      ONNX Runtime, TensorRT
                        -> model.xml, .bin   OpenVINO, there also quantised
          -> model.pt2                       AOTInductor, compiled for this kind of machine

The same weights give the same bytes, save for AOTInductor, whose compiled code holds the names of temporary files.
"""

import logging
import warnings
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from handlers.runtimes.exported import INPUTS
from handlers.settings import Exported, Settings
from model_defs.contract import Detector
from model_defs.torchvision_detector import TorchvisionDetector
from model_defs.yolov5 import YOLOv5
from tools.errors import ToolError

OPSET = 17
ROWS = ("rows", "pictures")
FLAT = ("boxes", "labels", "scores")
SMALLEST_SIDE = 1e-2  # of a box, in pixels; torchvision drops smaller ones
MOST_IN_A_BATCH = 1024
MOST_STRIDES = 512  # a side, at the largest picture


class Pictures(Sized, Protocol):
    """Pictures as the network sees them, `[3, H, W]` uint8; gone through more than once."""

    def __iter__(self) -> Iterator[Tensor]: ...


class RowsAbove(nn.Module):
    """YOLOv5 with the threshold as an input, so that it decodes no more than what can be a candidate."""

    def __init__(self, model: YOLOv5):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, score_threshold: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.rows_above(images, score_threshold)


class FlatFasterRCNN(nn.Module):
    """torchvision's Faster R-CNN for one picture: every box above the threshold, before suppression.

    Its own code for that does not stand for export: it has the threshold as a constant.
    """

    def __init__(self, model: FasterRCNN):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, score_threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[1, 3, H, W]` in 0..1 to boxes `[N, 4]`, xyxy in pixels of H x W, labels `[N]` and scores `[N]`."""
        heads = self.model.roi_heads
        scaled, _ = self.model.transform([images[0]])
        size = scaled.image_sizes[0]
        features = self.model.backbone(scaled.tensors)
        proposals, _ = self.model.rpn(scaled, features)
        pooled = heads.box_roi_pool(features, proposals, scaled.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        # Label 0 is the background.
        class_scores = logits.softmax(-1)[:, 1:]
        labels = torch.arange(1, class_scores.shape[1] + 1, device=images.device).expand_as(class_scores).flatten()
        scores = class_scores.flatten()
        boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, proposals), size)[:, 1:].reshape(-1, 4)
        (above,) = (scores > score_threshold).nonzero(as_tuple=True)
        keep = above[remove_small_boxes(boxes[above], SMALLEST_SIDE)]
        height, width = images.shape[-2:]
        return resize_boxes(boxes[keep], size, (height, width)), labels[keep], scores[keep]


def export_network(detector: Detector, settings: Settings, folder: Path, pictures: Pictures) -> tuple[str, Exported]:
    """Write the network under `folder`; back come the name of its main file and what that does not tell.

    detector: with its weights, optimised; it is not changed. settings: definition, runtime and preprocess count, and
    fit each other (`check_runtime`). pictures: what int8 is fitted to. Raises ToolError with the engine's reason.
    """
    runtime = settings.runtime
    network, outputs = _flat(detector)
    fixed = runtime.shape == "fixed"
    machine = None
    with _refusals(f"{settings.model.definition} to {runtime.backend}"), torch.no_grad():
        if runtime.backend == "aoti":
            name = "model.pt2"
            machine = _write_aoti(network, folder / name, settings, detector.stride)
        elif runtime.backend == "openvino":
            name = "model.xml"
            _write_openvino(network, folder / name, settings, outputs, pictures)
        else:
            name = "model.onnx"
            _write_onnx(network, folder / name, settings, outputs)
            if outputs == ROWS:
                from tools.export.concatenations import split_concatenations

                split_concatenations(folder / name)
    single = fixed or outputs == FLAT
    sides = None
    if isinstance(detector, TorchvisionDetector):
        sides = detector.model.transform.min_size[-1], detector.model.transform.max_size
    exported = Exported(detector.has_background, detector.letterbox, detector.stride, outputs, single, machine, sides)
    return name, exported


def _flat(detector: Detector) -> tuple[nn.Module, tuple[str, ...]]:
    """The network with tensors in and out, and the names of the latter."""
    if isinstance(detector, TorchvisionDetector):
        return FlatFasterRCNN(detector.model).eval(), FLAT
    assert isinstance(detector, YOLOv5)
    return RowsAbove(detector).eval(), ROWS


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """An engine's exception as one line."""
    try:
        yield
    except (ToolError, ModuleNotFoundError):
        raise
    except Exception as error:  # each engine has its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ToolError(f"{what} cannot be exported: {reason}; choose another runtime.backend or precision") from error


def _example(settings: Settings, outputs: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """What the network is traced with: noise, since the tracer takes what comes out empty for a constant."""
    size = settings.preprocess.size
    shape = (1, 3, size, size)
    if settings.runtime.shape == "dynamic":
        # Of unequal sides, so that none is taken for another.
        shape = (1 if outputs == FLAT else 2, 3, 256, 320)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.tensor(0.0)


def _write_onnx(network: nn.Module, path: Path, settings: Settings, outputs: tuple[str, ...]) -> None:
    axes: dict[str, dict[int, str]] = {name: {0: "candidates"} for name in outputs}
    if settings.runtime.shape == "dynamic":
        axes[INPUTS[0]] = {2: "height", 3: "width"} | ({0: "batch"} if outputs == ROWS else {})
    with warnings.catch_warnings():
        # That it is traced, and that this exporter is the older one: the newer takes minutes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            _example(settings, outputs),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(outputs),
            dynamic_axes=axes,
        )


def _write_openvino(
    network: nn.Module, path: Path, settings: Settings, outputs: tuple[str, ...], pictures: Pictures
) -> None:
    import openvino

    source = path.with_suffix(".onnx")
    _write_onnx(network, source, settings, outputs)
    try:
        model = openvino.Core().read_model(source)
    finally:
        source.unlink()
    _number(model)
    if settings.runtime.precision == "int8":
        from tools.export.quantise import quantise

        model = quantise(model, pictures)
        _number(model)
    openvino.save_model(model, path, compress_to_fp16=False)


def _number(model: Any) -> None:
    """Names of operations by their place: OpenVINO counts all that the process has ever made."""
    for index, operation in enumerate(model.get_ordered_ops()):
        if operation.get_type_name() not in ("Parameter", "Result"):
            operation.set_friendly_name(f"{operation.get_type_name()}_{index}")


def _write_aoti(network: nn.Module, path: Path, settings: Settings, stride: int) -> str:
    """Returns the kind of machine that it is compiled for."""
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim, export

    from handlers.runtimes.aoti import machine

    shapes: dict[int, Any] = {}
    if settings.runtime.shape == "dynamic":
        sides = (stride * Dim(name, min=1, max=MOST_STRIDES) for name in ("rows", "columns"))
        shapes = dict(zip((0, 2, 3), (Dim("batch", min=1, max=MOST_IN_A_BATCH), *sides), strict=True))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the compiler about itself
        program = export(network, _example(settings, ROWS), dynamic_shapes=dict(zip(INPUTS, (shapes, {}), strict=True)))
        aoti_compile_and_package(program, package_path=str(path))
    return machine()
