"""The anchor head of YOLOv5: raw maps and decoded boxes.

A cell predicts, for each of its anchors, `x y w h objectness class_0 ... class_n` as logits.
"""

import math

import torch
from torch import Tensor, nn


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
        """Raw logits a level, each `[B, anchors, rows, columns, 5 + classes]`."""
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
            # Half the bits of float32 would place a box to several pixels.
            y = logits.float().sigmoid()
            grid_y, grid_x = torch.meshgrid(
                torch.arange(rows, device=y.device, dtype=y.dtype),
                torch.arange(columns, device=y.device, dtype=y.dtype),
                indexing="ij",
            )
            cell = torch.stack((grid_x, grid_y), dim=-1)
            centre = (y[..., :2] * 2 - 0.5 + cell) * stride
            size = (y[..., 2:4] * 2) ** 2 * (anchors * stride)[:, None, None, :]
            levels.append(torch.cat((centre, size, y[..., 4:]), dim=-1).view(batch, -1, self.outputs_per_anchor))
        return torch.cat(levels, dim=1)
