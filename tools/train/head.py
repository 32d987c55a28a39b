"""A head for other classes: what it knows of those that stay goes along, by their names."""

from collections.abc import Sequence

from torch import Tensor

from handlers.labels import BACKGROUND
from model_defs.contract import Detector


def shared_classes(own: Sequence[str], given: Sequence[str]) -> dict[int, int]:
    """Where a label of the new network stood in the old one, by its name; empty where they have no class in common."""
    before = {name: index for index, name in enumerate(given)}
    found = {index: before[name] for index, name in enumerate(own) if name in before}
    return found if {own[index] for index in found} - {BACKGROUND} else {}


def carry_over(detector: Detector, key: str, own: Tensor, given: Tensor, labels: int, shared: dict[int, int]) -> Tensor:
    """The entry `key` of the state dict: `own`, the new network's, with the rows of `given`, which is for so many
    `labels`, wherever they mean the same."""
    layout = detector.head_layout(key, len(own))
    merged = own.clone()
    new = merged.view(layout.groups, layout.others + detector.num_classes, layout.rows, -1)
    old = given.to(own.dtype).reshape(layout.groups, layout.others + labels, layout.rows, -1)
    new[:, : layout.others] = old[:, : layout.others]
    for index, before in shared.items():
        new[:, layout.others + index] = old[:, layout.others + before]
    return merged
