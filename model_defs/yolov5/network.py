"""YOLOv5 in all ten sizes.

A backbone that halves the picture five (P5) or six (P6) times, a path aggregation neck
(PANet, arXiv:1803.01534) and one detection head a level. Layers stand in one numbered list, with
empty places where the official list has layers without weights, so that the keys of the official
state dicts fit; `forward` wires them by hand.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from model_defs.candidates import from_rows
from model_defs.contract import Detections, Detector, HeadLayout
from model_defs.yolov5.head import Detect
from model_defs.yolov5.layers import C3, SPPF, Conv


class Variant(NamedTuple):
    depth: float  # factor on the number of bottlenecks in a block
    width: float  # factor on the number of channels
    levels: int  # 3: heads at strides 8 to 32, 4: at strides 8 to 64


VARIANTS = {
    "n": Variant(0.33, 0.25, 3),
    "s": Variant(0.33, 0.50, 3),
    "m": Variant(0.67, 0.75, 3),
    "l": Variant(1.00, 1.00, 3),
    "x": Variant(1.33, 1.25, 3),
    "n6": Variant(0.33, 0.25, 4),
    "s6": Variant(0.33, 0.50, 4),
    "m6": Variant(0.67, 0.75, 4),
    "l6": Variant(1.00, 1.00, 4),
    "x6": Variant(1.33, 1.25, 4),
}
STAGE_CHANNELS = {3: (64, 128, 256, 512, 1024), 4: (64, 128, 256, 512, 768, 1024)}
STAGE_DEPTHS = {3: (3, 6, 9, 3), 4: (3, 6, 9, 3, 3)}
NECK_DEPTH = 3

# Widths and heights in pixels, three a level, fitted to COCO by the authors of the weights. A
# checkpoint brings its own; these are where training from scratch starts.
COCO_ANCHORS = {
    3: (
        (10, 13, 16, 30, 33, 23),
        (30, 61, 62, 45, 59, 119),
        (116, 90, 156, 198, 373, 326),
    ),
    4: (
        (19, 27, 44, 40, 38, 94),
        (96, 68, 86, 152, 180, 137),
        (140, 301, 303, 264, 238, 542),
        (436, 615, 739, 380, 925, 792),
    ),
}


class YOLOv5(Detector):
    """Raises ValueError for an unknown size.

    size: n, s, m, l, x or n6, s6, m6, l6, x6.
    num_classes: how many classes; label 0 is the first one, there is no background.
    """

    has_background = False
    letterbox = True

    def __init__(self, size: str, num_classes: int):
        super().__init__()
        if size not in VARIANTS:
            raise ValueError(f"unknown YOLOv5 size {size!r}; use one of {', '.join(VARIANTS)}")
        variant = VARIANTS[size]
        self.num_classes = num_classes
        self.levels = variant.levels
        strides = tuple(8 * 2**level for level in range(variant.levels))
        self.stride = strides[-1]
        stem, *stages = (math.ceil(c * variant.width / 8) * 8 for c in STAGE_CHANNELS[variant.levels])
        depths = [max(1, round(n * variant.depth)) for n in STAGE_DEPTHS[variant.levels]]
        neck_depth = max(1, round(NECK_DEPTH * variant.depth))
        pyramid = stages[-variant.levels :]

        layers: list[nn.Module] = [Conv(3, stem, 6, 2, padding=2)]
        for c_in, c_out, depth in zip([stem, *stages], stages, depths, strict=False):
            layers += [Conv(c_in, c_out, 3, 2), C3(c_in=c_out, c_out=c_out, depth=depth)]
        layers += [SPPF(stages[-1])]
        for c_high, c_low in zip(pyramid[:0:-1], pyramid[-2::-1], strict=True):
            empty = (nn.Identity(), nn.Identity())  # upsampling and concatenation
            layers += [Conv(c_high, c_low), *empty, C3(2 * c_low, c_low, neck_depth, shortcut=False)]
        for c_low, c_high in pairwise(pyramid):
            layers += [Conv(c_low, c_low, 3, 2), nn.Identity(), C3(2 * c_low, c_high, neck_depth, shortcut=False)]
        anchors = torch.tensor(COCO_ANCHORS[variant.levels], dtype=torch.float32).view(variant.levels, -1, 2)
        layers += [Detect(num_classes, pyramid, strides, anchors / torch.tensor(strides)[:, None, None])]
        self.model = nn.ModuleList(layers)

    @property
    def head(self) -> Detect:
        return self.model[-1]  # type: ignore[return-value]  # a ModuleList does not know its members

    def features(self, images: Tensor) -> list[Tensor]:
        """What the head looks at: `[B, channels, H / stride, W / stride]` a level, finest level first.

        images: `[B, 3, H, W]`, H and W multiples of `stride`.
        """
        layers = iter(self.model)
        x = next(layers)(images)
        pyramid = []
        for _ in range(self.levels + 1):
            x = next(layers)(x)
            x = next(layers)(x)
            pyramid.append(x)
        pyramid[-1] = next(layers)(x)  # pooled

        # Down the pyramid: what the coarse levels know reaches the fine ones.
        x = pyramid[-1]
        laterals = []
        for feature in pyramid[-2:0:-1]:
            lateral = next(layers)(x)
            next(layers), next(layers)
            laterals.append(lateral)
            x = next(layers)(torch.cat((interpolate(lateral, scale_factor=2.0, mode="nearest"), feature), dim=1))

        # And up again.
        outputs = [x]
        for lateral in reversed(laterals):
            x = next(layers)(x)
            next(layers)
            x = next(layers)(torch.cat((x, lateral), dim=1))
            outputs.append(x)
        return outputs

    def raw(self, images: Tensor) -> list[Tensor]:
        """Logits a level, `[B, anchors, rows, columns, 5 + classes]`, finest level first."""
        return self.head(self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, N, 5 + classes]`, as `Detect.decode` describes it."""
        return self.head.decode(self.raw(images))

    def rows(self, images: Tensor) -> Tensor:
        return self(images)

    def rows_above(self, images: Tensor, score_threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Of what `forward` gives, the rows that can hold a candidate, as `Detect.decode_above` describes it."""
        return self.head.decode_above(self.features(images), score_threshold)

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        rows, pictures = self.rows_above(images, torch.tensor(score_threshold, device=images.device))
        return from_rows(rows, pictures, len(images), score_threshold, multi_label)

    def fuse(self) -> None:
        """Fold every batch normalisation into its convolution."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()

    def classes_in(self, state: dict[str, Tensor]) -> int | None:
        head = f"model.{len(self.model) - 1}"
        anchors, bias = state.get(f"{head}.anchors"), state.get(f"{head}.m.0.bias")
        if anchors is None or bias is None or anchors.shape != self.head.anchors.shape:
            return None
        return bias.numel() // self.head.anchors_per_level - 5

    def head_layout(self, key: str, length: int) -> HeadLayout:
        # An anchor's box and objectness come first.
        return HeadLayout(self.head.anchors_per_level, 5, 1)

    def prepare_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if state and not any(".bn." in key for key in state):
            self.fuse()
        return state

    def optimise(self) -> None:
        self.fuse()
