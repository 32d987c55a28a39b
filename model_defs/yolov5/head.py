"""The anchor head of YOLOv5: raw maps and decoded boxes.

A cell predicts, for each of its anchors, `x y w h objectness class_0 ... class_n` as logits.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

# In logits. Objectness is computed twice, each time rounded in its own way: no box may be lost between the two.
MARGIN = 0.05


class Detect(nn.Module):
    """One 1x1 convolution a level.

    `anchors` is a buffer `[levels, anchors, 2]` of widths and heights in units of the level's stride,
    as the official state dict holds it.
    """

    anchors: Tensor

    def __init__(self, num_classes: int, channels: list[int], strides: tuple[int, ...], anchors: Tensor):
        super().__init__()
        self.num_classes = num_classes
        self.strides = strides
        self.outputs_per_anchor = 5 + num_classes
        self.anchors_per_level = anchors.shape[1]
        self.register_buffer("anchors", anchors)
        self.m = nn.ModuleList(nn.Conv2d(c, self.anchors_per_level * self.outputs_per_anchor, 1) for c in channels)
        self._initialise_biases()

    @torch.no_grad()
    def _initialise_biases(self) -> None:
        """Start from few objects: about 8 in a 640x640 picture, each class at 0.6 / classes
        (the prior of focal loss, arXiv:1708.02002 section 3.3)."""
        for conv, stride in zip(self.m, self.strides, strict=True):
            bias = conv.get_parameter("bias").view(self.anchors_per_level, self.outputs_per_anchor)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.num_classes - 0.99999))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features to raw logits a level, each `[B, anchors, rows, columns, 5 + classes]`."""
        raw = []
        for conv, feature in zip(self.m, features, strict=True):
            x = conv(feature)
            batch, _, rows, columns = x.shape
            x = x.view(batch, self.anchors_per_level, self.outputs_per_anchor, rows, columns)
            raw.append(x.permute(0, 1, 3, 4, 2).contiguous())
        return raw

    def decode(self, raw: list[Tensor]) -> Tensor:
        """Raw maps to `[B, N, 5 + classes]`: centre x, centre y, width, height in input pixels, then
        objectness and class scores in 0..1. N counts level by level, anchor by anchor, row by row."""
        levels = []
        for logits, stride, anchors in zip(raw, self.strides, self.anchors, strict=True):
            batch, _, rows, columns, _ = logits.shape
            grid_y, grid_x = torch.meshgrid(
                torch.arange(rows, device=logits.device), torch.arange(columns, device=logits.device), indexing="ij"
            )
            decoded = _decode(logits, torch.stack((grid_x, grid_y), dim=-1), anchors[:, None, None], stride)
            levels.append(decoded.view(batch, -1, self.outputs_per_anchor))
        return torch.cat(levels, dim=1)

    def decode_above(self, features: list[Tensor], score_threshold: Tensor) -> tuple[Tensor, Tensor]:
        """What `decode` gives for the cells with an objectness above the threshold, and for few others.

        A score is objectness times class score, so no other cell can have one above it: of those the objectness is
        all that is computed. score_threshold: in 0..1, without dimensions. Back come rows `[M, 5 + classes]` and
        the index of the picture of each, `[M]`, in no set order.
        """
        least = torch.logit(score_threshold.float()) - MARGIN
        rows, pictures = [], []
        for conv, feature, stride, anchors in zip(self.m, features, self.strides, self.anchors, strict=True):
            weight, bias = conv.get_parameter("weight").flatten(1), conv.get_parameter("bias")
            objectness = slice(4, None, self.outputs_per_anchor)
            best = conv2d(feature, weight[objectness, :, None, None], bias[objectness]).amax(dim=1)
            picture, row, column = (best.float() > least).nonzero(as_tuple=True)
            cells = feature.permute(0, 2, 3, 1)[picture, row, column]
            cell = torch.stack((column, row), dim=-1)
            for logits, anchor in zip(
                linear(cells, weight, bias).split(self.outputs_per_anchor, 1), anchors, strict=True
            ):
                rows.append(_decode(logits, cell, anchor, stride))
                pictures.append(picture)
        return torch.cat(rows), torch.cat(pictures)


def _decode(logits: Tensor, cell: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """`[..., 5 + classes]` logits to the same in pixels and 0..1. cell: column and row of each; anchors: in strides."""
    # Half the bits of float32 would place a box to several pixels.
    y = logits.float().sigmoid()
    centre = (y[..., :2] * 2 - 0.5 + cell) * stride
    size = (y[..., 2:4] * 2) ** 2 * (anchors * stride)
    return torch.cat((centre, size, y[..., 4:]), dim=-1)
