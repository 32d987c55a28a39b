"""The training loss of YOLOv5, written from its published description.

An object is learned by every anchor of like width and height, in the cell that holds its centre and
in the two cells nearest to that centre. Boxes learn by complete IoU (arXiv:1911.08287), objectness by
cross-entropy towards the IoU reached, classes by cross-entropy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from model_defs.yolov5 import YOLOv5

ANCHOR_RATIO = 4.0  # an anchor learns objects less than so many times wider or narrower, higher or lower
LEVEL_BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # fine levels have many more empty cells


class Gains(NamedTuple):
    """The weight of each part, for a picture of 640x640 pixels, 3 levels and the 80 classes of COCO; the loss
    scales them."""

    box: float = 0.05
    objectness: float = 1.0
    classes: float = 0.5


DEFAULT_GAINS = Gains()


class Losses(NamedTuple):
    """Scalars with their gains applied; training descends their sum. Means, so no batch size is in them."""

    box: Tensor
    objectness: Tensor
    classes: Tensor


class Matches(NamedTuple):
    """Which predictions of one level learn which object, a pair an entry, `[M]` int64 each.

    `raw[image, anchor, row, column]` learns `targets[target]`.
    """

    target: Tensor
    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor


def alone(counts: Tensor) -> Tensor:
    """The mean of counts over the processes of a training that has one."""
    return counts


def yolov5_loss(
    model: YOLOv5,
    raw: list[Tensor],
    targets: Tensor,
    gains: Gains = DEFAULT_GAINS,
    label_smoothing: float = 0.0,
    mean_over_processes: Callable[[Tensor], Tensor] = alone,
) -> Losses:
    """How far `raw` is from finding exactly `targets`.

    raw: logits a level, `[B, anchors, rows, columns, 5 + classes]`, as `model.raw` gives them.
    targets: `[T, 6]` float: index in the batch, label, centre x, centre y, width, height, the last four in
        pixels of the network's input. T may be 0. Centres lie inside the picture, sides are above 0.
    label_smoothing: how far the classes' targets stay from 0 and 1, twice.
    mean_over_processes: takes float counts of this process, `[N]`. The mean of the losses of all processes is
        then the loss of their batches together, and so is the mean of the gradients.
    """
    head = model.head
    found = [
        match(targets, anchors * stride, stride, rows=logits.shape[2], columns=logits.shape[3])
        for logits, stride, anchors in zip(raw, head.strides, head.anchors, strict=True)
    ]
    counts = [len(level.target) for level in found] + [logits[..., 4].numel() for logits in raw]
    matched, cells = mean_over_processes(raw[0].new_tensor(counts, dtype=torch.float64)).float().chunk(2)

    box = objectness = classes = raw[0].new_zeros((), dtype=torch.float32)
    for level, (logits, balance) in enumerate(zip(raw, LEVEL_BALANCE[len(raw)], strict=True)):
        logits = logits.float()
        losses, target_iou = _matched_losses(model, level, logits, targets, found[level], label_smoothing)
        # Nothing matched here may be many matches elsewhere, and the other way round.
        box = box + losses[0] / matched[level].clamp(min=1e-9)
        classes = classes + losses[1] / (matched[level] * model.num_classes).clamp(min=1e-9)
        presence = binary_cross_entropy_with_logits(logits[..., 4], target_iou, reduction="sum")
        objectness = objectness + balance * presence / cells[level]

    pixels = raw[0].shape[2] * raw[0].shape[3] * head.strides[0] ** 2
    scaled = _scaled(gains, len(raw), model.num_classes, pixels)
    return Losses(box * scaled.box, objectness * scaled.objectness, classes * scaled.classes)


def _matched_losses(
    model: YOLOv5, level: int, logits: Tensor, targets: Tensor, found: Matches, label_smoothing: float
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The sums over one level's matches for box and classes, and the IoU that every cell reaches."""
    stride, anchors = model.head.strides[level], model.head.anchors[level]
    picked = logits[found.image, found.anchor, found.row, found.column]
    wanted = targets[found.target]
    cell = torch.stack((found.column, found.row), dim=1)
    iou = complete_iou(_decode(picked, cell, anchors[found.anchor], stride), wanted[:, 2:])
    target_iou = _scatter_best(torch.zeros_like(logits[..., 4]), found, iou.detach().clamp(min=0))
    classes = logits.new_zeros(())
    if model.num_classes > 1:
        is_class = one_hot(wanted[:, 1].long(), model.num_classes).to(picked.dtype)
        is_class = is_class * (1 - label_smoothing) + label_smoothing / 2
        classes = binary_cross_entropy_with_logits(picked[:, 5:], is_class, reduction="sum")
    return ((1 - iou).sum(), classes), target_iou


def match(targets: Tensor, anchors: Tensor, stride: int, rows: int, columns: int) -> Matches:
    """The anchors and cells of one level that learn each object; none for an object of another scale.

    targets: `[T, 6]` as in `yolov5_loss`; anchors: `[A, 2]` width and height in pixels.
    """
    ratio = targets[:, None, 4:6] / anchors
    alike = torch.maximum(ratio, 1 / ratio).amax(dim=-1) < ANCHOR_RATIO
    target, anchor = alike.nonzero(as_tuple=True)

    limit = torch.tensor((columns, rows), device=targets.device)
    centre = targets[target, 2:4] / stride
    cell = torch.minimum(centre.floor().long(), limit - 1)  # a centre on the far edge belongs to the last cell
    side = torch.where(centre - cell < 0.5, -1, 1)  # which neighbour is nearer, in x and in y
    steps = torch.stack((torch.zeros_like(side), side * side.new_tensor((1, 0)), side * side.new_tensor((0, 1))))
    cells = (cell + steps).flatten(0, 1)
    inside = ((cells >= 0) & (cells < limit)).all(dim=1)
    target, anchor, cells = target.repeat(3)[inside], anchor.repeat(3)[inside], cells[inside]
    return Matches(target, targets[target, 0].long(), anchor, row=cells[:, 1], column=cells[:, 0])


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """`[M]` complete IoU of `[M, 4]` and `[M, 4]` boxes, each centre x, centre y, width, height (arXiv:1911.08287).

    IoU, less the squared distance of the centres over the squared diagonal of the box around both, less a
    penalty for unlike shapes. 1 for equal boxes, down to below -1 for distant ones.
    """
    a_low, a_high = a[:, :2] - a[:, 2:] / 2, a[:, :2] + a[:, 2:] / 2
    b_low, b_high = b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(dim=1)
    union = a[:, 2:].prod(dim=1) + b[:, 2:].prod(dim=1) - overlap
    iou = overlap / union.clamp(min=1e-7)

    around = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    distance = (a[:, :2] - b[:, :2]).square().sum(dim=1) / around.square().sum(dim=1).clamp(min=1e-7)
    angle = torch.atan2(b[:, 2], b[:, 3]) - torch.atan2(a[:, 2], a[:, 3])
    unlike = 4 / math.pi**2 * angle.square()
    weight = unlike.detach() / (1 - iou.detach() + unlike.detach()).clamp(min=1e-7)
    return iou - distance - weight * unlike


def _decode(logits: Tensor, cell: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Picked logits `[M, 5 + classes]` to centre x, centre y, width, height in pixels, as `Detect.decode` does.

    cell: `[M, 2]` column and row; anchors: `[M, 2]` in units of the stride.
    """
    y = logits[:, :4].sigmoid()
    return torch.cat((y[:, :2] * 2 - 0.5 + cell, (y[:, 2:] * 2) ** 2 * anchors), dim=1) * stride


def _scatter_best(empty: Tensor, found: Matches, iou: Tensor) -> Tensor:
    """`empty`, `[B, anchors, rows, columns]`, with the IoU at every match; the best where objects share a place."""
    _, anchors, rows, columns = empty.shape
    index = ((found.image * anchors + found.anchor) * rows + found.row) * columns + found.column
    return empty.flatten().scatter_reduce(0, index, iou, "amax").view_as(empty)


def _scaled(gains: Gains, levels: int, num_classes: int, pixels: int) -> Gains:
    share = 3 / levels
    return Gains(
        gains.box * share, gains.objectness * share * pixels / 640**2, gains.classes * share * num_classes / 80
    )
