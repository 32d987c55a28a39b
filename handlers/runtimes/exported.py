"""What all exported networks have in common: tensors in, tensors out, candidates from those."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from handlers.settings import Exported
from model_defs.candidates import from_rows
from model_defs.contract import Detections

INPUT = "images"

# Takes `[B, 3, H, W]` float32 in 0..1, contiguous; gives the outputs in the order of `Exported.outputs`.
Run = Callable[[Tensor], Sequence[Any]]


class ExportedNetwork:
    """A network in the file of another engine, which `run` executes."""

    def __init__(self, exported: Exported, run: Run):
        self.has_background, self.letterbox, self.stride = exported.has_background, exported.letterbox, exported.stride
        self._rows = len(exported.outputs) == 1
        self._single = exported.single
        self._run = run

    def check_size(self, height: int, width: int) -> None:
        """Every size that the handler lets through is taken."""

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        # Pictures may come with their channels last, which no engine expects of what it is given.
        scaled = (images / 255).contiguous()
        parts = scaled.split(1) if self._single else [scaled]
        if not self._rows:
            return [self._flat(part, score_threshold) for part in parts]
        return [
            found for part in parts for found in from_rows(_tensor(self._run(part)[0]), score_threshold, multi_label)
        ]

    def _flat(self, image: Tensor, score_threshold: float) -> Detections:
        boxes, labels, scores = (_tensor(part) for part in self._run(image))
        keep = scores > score_threshold
        return Detections(boxes[keep], labels[keep], scores[keep])


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value)
