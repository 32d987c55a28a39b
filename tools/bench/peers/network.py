"""The network of the peers: the whole of YOLOv5's answer for one size, which is what its users export."""

import tempfile
import warnings
from pathlib import Path

import torch

from handlers.pipeline import Pipeline
from handlers.runtimes.torch import TorchNetwork
from tools.archive.reader import open_archive
from tools.export.network import OPSET


def write_network(archive: Path, output: Path) -> None:
    """An ONNX file of what an archive for torch answers with: `[1, 3, size, size]` in 0..1 to `[1, N, 5 + classes]`.

    Raises BadArchive with one line.
    """
    with tempfile.TemporaryDirectory(prefix="marina-") as folder, open_archive(archive) as opened:
        opened.extract(Path(folder))
        pipeline = Pipeline.load(Path(folder), opened.config)
    assert isinstance(pipeline.network, TorchNetwork)
    size = pipeline.settings.preprocess.size
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is traced
        example = (torch.zeros(1, 3, size, size),)
        torch.onnx.export(pipeline.network.detector, example, output, dynamo=False, opset_version=OPSET)
