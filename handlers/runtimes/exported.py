"""What all exported networks have in common: tensors in, tensors out, candidates from those."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from handlers.settings import Exported
from model_defs.candidates import from_rows
from model_defs.contract import Detections, check_thickness

INPUTS = ("images", "score_threshold")

# Takes `[B, 3, H, W]` float32 in 0..1, contiguous, and the threshold without dimensions; gives the outputs in the order
# of `Exported.outputs`.
Run = Callable[[Tensor, Tensor], Sequence[Any]]


class ExportedNetwork:
    """A network in the file of another engine, which `run` executes."""

    def __init__(self, exported: Exported, run: Run):
        self.has_background, self.letterbox, self.stride = exported.has_background, exported.letterbox, exported.stride
        self._rows = len(exported.outputs) == 2
        self._single, self._sides = exported.single, exported.sides
        self._run = run

    def check_size(self, height: int, width: int) -> None:
        if self._sides:
            check_thickness(height, width, *self._sides)

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        # Pictures may come with their channels last, which no engine expects of what it is given.
        scaled = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        threshold = torch.tensor(score_threshold)
        result = []
        for part in scaled.split(1) if self._single else [scaled]:
            found = [_tensor(value) for value in self._run(part, threshold)]
            if self._rows:
                rows, pictures = found
                result += from_rows(rows, pictures, len(part), score_threshold, multi_label)
            else:
                result.append(Detections(*found))
        return result

    def rows(self, images: Tensor) -> Tensor:
        result = []
        for part in images.split(1) if self._single else [images]:
            rows, pictures = (_tensor(value) for value in self._run(part, torch.tensor(0.0)))
            result += [rows[pictures == index] for index in range(len(part))]
        return torch.stack(result)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value)
