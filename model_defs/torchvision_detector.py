"""torchvision's detectors under the contract: Faster R-CNN, RetinaNet, FCOS, SSD.

torchvision does resizing, normalisation, forward pass and box decoding as ever; its own threshold,
suppression and limit are opened, so that every request can have its own.
"""

import inspect
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import detection
from torchvision.ops import FeaturePyramidNetwork

from model_defs.contract import Detections, Detector, HeadLayout, check_thickness


class Family(NamedTuple):
    """Where a model keeps what the adapter needs.

    class_key: the state dict entry whose first dimension is classes x `class_factor`.
    post: the submodule with torchvision's thresholds ("" for the model itself).
    heads: the submodules behind the backbone that have layers.
    """

    class_key: str
    class_factor: int
    post: str = ""
    heads: tuple[str, ...] = ("head",)


FASTER_RCNN = Family("roi_heads.box_predictor.cls_score.bias", 1, "roi_heads", ("rpn.head", "roi_heads.box_predictor"))
RETINANET = Family("head.classification_head.cls_logits.bias", 9)  # anchors a cell
FCOS = Family("head.classification_head.cls_logits.bias", 1)
SSD300 = Family("head.classification_head.module_list.0.bias", 4)  # anchors a cell of the first level
SSDLITE = Family("head.classification_head.module_list.0.1.bias", 6)  # anchors a cell

FAMILIES = {
    "fasterrcnn_resnet50_fpn": FASTER_RCNN,
    "fasterrcnn_resnet50_fpn_v2": FASTER_RCNN,
    "fasterrcnn_mobilenet_v3_large_fpn": FASTER_RCNN,
    "fasterrcnn_mobilenet_v3_large_320_fpn": FASTER_RCNN,
    "retinanet_resnet50_fpn": RETINANET,
    "retinanet_resnet50_fpn_v2": RETINANET,
    "fcos_resnet50_fpn": FCOS,
    "ssd300_vgg16": SSD300,
    "ssdlite320_mobilenet_v3_large": SSDLITE,
}
NO_LIMIT = 2**31 - 1


class Pyramid(nn.Module):
    """The layers of torchvision's FeaturePyramidNetwork, and its very answers, with two maps less in memory at
    the finest level: 60 MB each for a picture of 1216x800."""

    def __init__(self, network: FeaturePyramidNetwork):
        super().__init__()
        self.inner_blocks = network.inner_blocks
        self.layer_blocks = network.layer_blocks
        self.extra_blocks = network.extra_blocks

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """features: maps `[B, C, H, W]` by name, finest first; back come theirs of 256 channels, and extra levels."""
        names, maps = list(features), list(features.values())
        features.clear()
        inner = self.inner_blocks[-1](maps[-1])
        results = [self.layer_blocks[-1](inner)]
        for level in range(len(maps) - 2, -1, -1):
            finer = self.inner_blocks[level](maps.pop(level))
            finer += interpolate(inner, size=finer.shape[-2:], mode="nearest")
            inner = finer
            results.insert(0, self.layer_blocks[level](inner))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def _in_float32(module: nn.Module, given: Any, output: Any) -> Any:
    """A forward hook: the tensors that a module gives, in whatever it keeps them."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: _in_float32(module, given, value) for name, value in output.items()}
    return type(output)(_in_float32(module, given, value) for value in output)


# torchvision's names for what is the handler's work, with and without the prefix of Faster R-CNN.
POSTPROCESSING = {
    f"{prefix}{name}" for prefix in ("", "box_") for name in ("score_thresh", "nms_thresh", "detections_per_img")
}


class TorchvisionDetector(Detector):
    """One of torchvision's detectors; label 0 is the background, as torchvision counts."""

    has_background = True
    letterbox = False

    def __init__(self, definition: str, num_classes: int, batch_norm_eps: float | None, arguments: dict[str, Any]):
        super().__init__()
        self.num_classes = num_classes
        self._family = FAMILIES[definition]
        builder = getattr(detection, definition)
        self.model = builder(weights=None, weights_backbone=None, num_classes=num_classes, **arguments)
        # torchvision takes any name, and ignores those that it does not know.
        known = inspect.signature(builder).parameters.keys() | inspect.signature(type(self.model)).parameters.keys()
        for name in arguments:
            if name in POSTPROCESSING or name not in known:
                raise TypeError(f"unknown argument {name!r}; thresholds belong into postprocess")
        if batch_norm_eps is not None:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = batch_norm_eps
        # Of bf16's eight bits, anchors and boxes would be off by pixels, and torchvision's NMS has no use for it.
        for name in ("backbone", *self._family.heads):
            self.model.get_submodule(name).register_forward_hook(_in_float32)
        post = self.model.get_submodule(self._family.post)
        # An IoU is never above 1: nothing is suppressed before the handler does it.
        post.nms_thresh, post.detections_per_img = 1.0, NO_LIMIT
        self._post = [post]  # in a list, so that it does not become a submodule twice

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        self._post[0].score_thresh = score_threshold
        # RetinaNet and FCOS score the background, which was never shown to them, like any class.
        return [
            Detections(*(found[part][found["labels"] > 0] for part in ("boxes", "labels", "scores")))
            for found in self.model(list(images))
        ]

    def check_size(self, height: int, width: int) -> None:
        transform = self.model.transform
        if transform.fixed_size is None:
            check_thickness(height, width, transform.min_size[-1], transform.max_size)

    def classes_in(self, state: dict[str, Tensor]) -> int | None:
        weights = state.get(self._family.class_key)
        return None if weights is None else weights.numel() // self._family.class_factor

    def head_layout(self, key: str, length: int) -> HeadLayout:
        # Faster R-CNN has a box for every class; the others score every class of every anchor.
        if ".bbox_pred." in key:
            return HeadLayout(1, 0, 4)
        return HeadLayout(length // self.num_classes, 0, 1)

    def optimise(self) -> None:
        pyramid = getattr(self.model.backbone, "fpn", None)
        if isinstance(pyramid, FeaturePyramidNetwork):
            self.model.backbone.fpn = Pyramid(pyramid)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Under torchvision's own keys."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Under torchvision's own keys."""
        return self.model.load_state_dict(state_dict, strict, assign)


def build(
    definition: str, num_classes: int, batch_norm_eps: float | None = None, **arguments: Any
) -> TorchvisionDetector:
    """The detector without weights; nothing is downloaded.

    batch_norm_eps: 0.0 for torchvision's own COCO_V1 weights of fasterrcnn_resnet50_fpn and
        retinanet_resnet50_fpn, which were trained so; otherwise torchvision's default.
    arguments: torchvision's own, such as min_size and max_size.
    """
    return TorchvisionDetector(definition, num_classes, batch_norm_eps, arguments)
