"""What every detector of Marina promises, whatever its architecture."""

from typing import NamedTuple

from torch import Tensor, nn


class Detections(NamedTuple):
    """The objects found in one picture.

    boxes: `[N, 4]` float32, x1 y1 x2 y2 in pixels of the picture given.
    labels: `[N]` int64, keys of `index_to_name.json`.
    scores: `[N]` float32 in 0..1.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


def check_thickness(height: int, width: int, least: int, most: int) -> None:
    """For networks that scale a picture's sides to `least` and `most` pixels, whichever is reached first.

    Raises ValueError for a picture of which nothing would be left.
    """
    scale = min(least / min(height, width), most / max(height, width))
    if min(height, width) * scale < 1:
        raise ValueError(
            f"a picture of {width}x{height} pixels is less than one pixel thin once its longer side is {most}; crop it"
        )


class HeadLayout(NamedTuple):
    """How the first dimension of an entry of the head is made up: groups x (others + labels) x rows, in this order."""

    groups: int
    others: int
    rows: int


class Detector(nn.Module):
    """A network that finds candidates; threshold, suppression and limits are the handler's work.

    num_classes: how many labels it answers with, `__background__` counted where it has one.
    has_background: label 0 is the background and never appears in an answer.
    letterbox: it takes pictures scaled and padded to a multiple of `stride`; otherwise it takes
        pictures of any size and resizes them itself.
    """

    num_classes: int
    has_background: bool
    letterbox: bool
    stride: int = 1

    def candidates(self, images: Tensor, score_threshold: float, multi_label: bool = False) -> list[Detections]:
        """Every candidate above `score_threshold`, before non-maximum suppression, in no set order.

        images: `[B, 3, H, W]` float, RGB in 0..1. The boxes are in pixels of `H x W`.
        multi_label: a box is a candidate for every class above the threshold, not for its best alone. The
            models that score every class by a box of its own always answer so.
        An item's candidates do not depend on its neighbours in the batch.
        """
        raise NotImplementedError

    def rows(self, images: Tensor) -> Tensor:
        """All that a letterboxing network decodes, `[B, 3, H, W]` to `[B, N, 5 + classes]`: centre x, centre y, width,
        height in pixels, objectness and class scores in 0..1."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for a picture of a size that the network cannot take."""

    def classes_in(self, state: dict[str, Tensor]) -> int | None:
        """How many labels the weights in `state` are for; None when they do not look like this model's."""
        raise NotImplementedError

    def head_layout(self, key: str, length: int) -> HeadLayout:
        """Of the entry `key` of this network's state dict, whose first dimension, `length`, grows with the labels."""
        raise NotImplementedError

    def prepare_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring the network into the form that `state` has been saved from, and return the entries to load."""
        return state

    def optimise(self) -> None:
        """Rewrite the network in place for inference, after the weights are loaded. Answers stay the same."""
