"""Building blocks of YOLOv5 (release 6 and later).

Written from the published architecture: CSP bottlenecks (CSPNet, arXiv:1911.11929) and spatial
pyramid pooling (arXiv:1406.4729) in its sequential form. Attribute names follow the state dict of
the official weights, so that those load key by key.
"""

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.03


class Conv(nn.Module):
    """Convolution, batch normalisation, SiLU. `[B, c_in, H, W]` to `[B, c_out, H/stride, W/stride]`."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(c_out, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch normalisation into the convolution; afterwards the state dict has
        `conv.weight` and `conv.bias` only."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return
        norm, conv = self.bn, self.conv
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        self.bn = nn.Identity()


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, added to the input where `shortcut` says so."""

    def __init__(self, channels: int, shortcut: bool):
        super().__init__()
        self.cv1 = Conv(channels, channels, 1)
        self.cv2 = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Cross-stage partial block: one half of the channels goes through `depth` bottlenecks, the other past them."""

    def __init__(self, c_in: int, c_out: int, depth: int, shortcut: bool = True):
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(c_in, hidden, 1)
        self.cv3 = Conv(2 * hidden, c_out, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: three 5x5 max pools in a row see 5, 9 and 13 cells."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
        self.cv1 = Conv(channels, hidden, 1)
        self.cv2 = Conv(4 * hidden, channels, 1)
        self.pool = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        p5 = self.pool(x)
        p9 = self.pool(p5)
        return self.cv2(torch.cat((x, p5, p9, self.pool(p9)), dim=1))
