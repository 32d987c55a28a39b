"""Concatenations that only convolutions take: gone from an exported network, which computes the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="ONNX MISSING: pip install '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNXRUNTIME MISSING: pip install '.[onnx]'")

from tools.export.concatenations import split_concatenations  # noqa: E402  # imports onnx


class Net(nn.Module):
    """`goes` goes into two convolutions. Each of the others has a reason to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(11, 5, 1, bias=False)
        self.two = nn.Conv2d(11, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.rows = nn.Conv2d(4, 2, 1)
        self.shared = nn.Conv2d(7, 2, 1)
        self.given = nn.Conv2d(7, 2, 1)
        self.alone = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.first(images)
        goes = torch.cat((found, images, found.sigmoid()), dim=1)
        grouped = torch.cat((found, found.tanh()), dim=1)
        rows = torch.cat((found, found.exp()), dim=2)
        shared = torch.cat((images, found), dim=1)
        given = torch.cat((images, found.sin()), dim=1)
        kept = self.grouped(grouped), self.rows(rows), self.shared(shared), shared + 1, self.given(given), given
        return self.one(goes), self.two(goes), *kept, self.alone(torch.cat((found.cos(),), dim=1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_only_what_convolutions_alone_take_is_split(dynamic: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    network = Net().eval()
    axes = {"images": {0: "batch", 2: "height", 3: "width"}} if dynamic else None
    torch.onnx.export(network, (torch.rand(1, 3, 8, 8),), path, dynamo=False, input_names=["images"], dynamic_axes=axes)
    split_concatenations(path)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["Concat"] == 5 and kinds["Conv"] == 12
    onnx.checker.check_model(path, full_check=True)
    images = torch.rand((2, 3, 10, 12) if dynamic else (1, 3, 8, 8))
    found = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    for ours, expected in zip(found, network(images), strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-5)
    once = path.read_bytes()
    split_concatenations(path)
    assert path.read_bytes() == once
