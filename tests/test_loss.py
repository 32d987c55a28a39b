import math

import pytest
import torch
from torch import Tensor

from model_defs import build
from model_defs.yolov5 import YOLOv5
from tools.train import loss as loss_module
from tools.train.loss import Gains, complete_iou, match, yolov5_loss

CLASSES = 3
HEIGHT, WIDTH = 96, 128


@pytest.fixture
def model() -> YOLOv5:
    torch.manual_seed(0)
    return build("yolov5", CLASSES, size="n")


def blank(model: YOLOv5, images: int = 1) -> list[Tensor]:
    """Raw maps that are sure that nothing is there."""
    raw = [torch.zeros(images, 3, HEIGHT // s, WIDTH // s, 5 + CLASSES) for s in model.head.strides]
    for logits in raw:
        logits[..., 4] = -20
    return raw


def perfect(model: YOLOv5, targets: Tensor) -> list[Tensor]:
    """Raw maps that predict exactly `targets` wherever those are to be learned; decoding undone by hand."""
    raw = blank(model, images=int(targets[:, 0].max()) + 1)
    for logits, stride, anchors in zip(raw, model.head.strides, model.head.anchors, strict=True):
        found = match(targets, anchors * stride, stride, *logits.shape[2:4])
        for target, *place in zip(*found, strict=True):
            _, anchor, row, column = place
            _, label, x, y, width, height = targets[target].tolist()
            offset = torch.tensor([x / stride - column, y / stride - row])
            share = torch.tensor([width, height]) / (anchors[anchor] * stride)
            entry = logits[tuple(place)]
            entry[:2] = torch.logit((offset + 0.5) / 2)
            entry[2:4] = torch.logit(share.sqrt() / 2)
            entry[4] = 20
            entry[5:] = -20
            entry[5 + int(label)] = 20
    return raw


def test_perfect_prediction_has_no_loss(model: YOLOv5) -> None:
    targets = torch.tensor([[0, 2, 41.3, 30.6, 22, 30], [0, 0, 90.2, 61.7, 60, 55], [1, 1, 64.9, 50.1, 100, 80]])
    losses = yolov5_loss(model, perfect(model, targets), targets)
    assert losses.box < 1e-5
    assert losses.objectness < 1e-5
    assert losses.classes < 1e-5
    # The same maps are wrong for objects elsewhere, of other classes, or for none.
    moved = targets + torch.tensor([0, 0, 6.0, 0, 0, 0])
    renamed = targets.clone()
    renamed[:, 1] = (renamed[:, 1] + 1) % CLASSES
    assert yolov5_loss(model, perfect(model, targets), moved).box > 0.005
    assert yolov5_loss(model, perfect(model, targets), renamed).classes > 0.1
    assert yolov5_loss(model, perfect(model, targets), targets[:0]).objectness > 0.01


def test_perfect_prediction_decodes_to_the_targets(model: YOLOv5) -> None:
    """The loss and the head mean the same by a logit."""
    targets = torch.tensor([[0, 2, 41.3, 30.6, 22, 30]])
    decoded = model.head.decode(perfect(model, targets))[0]
    sure = decoded[decoded[:, 4] > 0.5]
    assert len(sure) >= 3
    assert torch.allclose(sure[:, :4], targets[:, 2:].expand(len(sure), 4), atol=1e-3)


def test_pictures_without_objects(model: YOLOv5) -> None:
    nothing = torch.zeros(0, 6)
    losses = yolov5_loss(model, blank(model, images=2), nothing)
    assert losses.box == 0
    assert losses.classes == 0
    assert losses.objectness < 1e-6
    raw = model.raw(torch.rand(2, 3, 64, 64))
    sum(yolov5_loss(model, raw, nothing)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("x", [0.0, 0.5, WIDTH - 0.5, WIDTH])
@pytest.mark.parametrize("y", [0.0, HEIGHT / 2, HEIGHT])
def test_objects_at_the_border_are_learned_inside(model: YOLOv5, x: float, y: float) -> None:
    targets = torch.tensor([[0.0, 1.0, x, y, 30.0, 40.0]])
    counts = []
    for stride, anchors in zip(model.head.strides, model.head.anchors, strict=True):
        rows, columns = HEIGHT // stride, WIDTH // stride
        found = match(targets, anchors * stride, stride, rows, columns)
        counts.append(len(found.target))
        assert ((found.row >= 0) & (found.row < rows)).all()
        assert ((found.column >= 0) & (found.column < columns)).all()
    assert sum(counts) > 0
    losses = yolov5_loss(model, model.raw(torch.rand(1, 3, HEIGHT, WIDTH)), targets)
    assert all(part.isfinite() for part in losses)


def test_centre_and_the_two_nearest_neighbours_learn() -> None:
    anchors = torch.tensor([[20.0, 20.0]])
    targets = torch.tensor([[0, 0, 35.0, 45.0, 20.0, 20.0]])  # 4.375 and 5.625 in cells of 8
    found = match(targets, anchors, 8, rows=12, columns=16)
    assert set(zip(found.column.tolist(), found.row.tolist(), strict=True)) == {(4, 5), (3, 5), (4, 6)}


def test_anchors_learn_objects_of_like_size() -> None:
    anchors = torch.tensor([[10.0, 10.0], [39.0, 39.0], [41.0, 10.0], [160.0, 160.0]])
    targets = torch.tensor([[0, 0, 36.0, 44.0, 10.0, 10.0]])
    found = match(targets, anchors, 8, rows=12, columns=16)
    assert set(found.anchor.tolist()) == {0, 1}


def test_best_of_two_objects_counts_where_they_meet(model: YOLOv5) -> None:
    """Two objects in the same cells and anchors: objectness aims at the one predicted better, in any order."""
    first = torch.tensor([[0, 0, 41.3, 30.6, 22.0, 30.0]])
    second = first + torch.tensor([0, 0, 0.5, 0.5, 12.0, -8.0])
    raw = perfect(model, first)
    one = yolov5_loss(model, raw, torch.cat((first, second))).objectness
    other = yolov5_loss(model, raw, torch.cat((second, first))).objectness
    assert one == other
    assert one < yolov5_loss(model, raw, second).objectness
    twice = yolov5_loss(model, raw, torch.cat((first, first))).objectness
    assert twice.item() == pytest.approx(0, abs=1e-5)


def test_complete_iou_of_known_boxes() -> None:
    box = torch.tensor([[50.0, 40.0, 20.0, 10.0]])
    assert complete_iou(box, box).item() == pytest.approx(1)
    # Side by side: IoU 0, centres 20 apart, the box around both 40 x 10, shapes alike.
    assert complete_iou(box, box + torch.tensor([20.0, 0, 0, 0])).item() == pytest.approx(-400 / 1700)
    # The same place turned by a quarter: IoU 100 / 300; the term for shape by the paper's formula.
    turned = torch.tensor([[50.0, 40.0, 10.0, 20.0]])
    unlike = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    expected = 1 / 3 - unlike**2 / (1 - 1 / 3 + unlike)
    assert complete_iou(box, turned).item() == pytest.approx(expected)


def test_gains_follow_levels_classes_and_size() -> None:
    assert loss_module._scaled(Gains(), 3, 80, 640 * 640) == pytest.approx((0.05, 1.0, 0.5))
    assert loss_module._scaled(Gains(), 4, 8, 320 * 320) == pytest.approx((0.0375, 0.1875, 0.0375))


def test_four_levels() -> None:
    six = build("yolov5", CLASSES, size="n6")
    targets = torch.tensor([[0, 1, 60.0, 60.0, 40.0, 50.0]])
    losses = yolov5_loss(six, six.raw(torch.rand(1, 3, 128, 128)), targets)
    assert all(part > 0 and part.isfinite() for part in losses)


def test_training_on_one_picture_learns_it(model: YOLOv5) -> None:
    image = torch.rand(1, 3, 64, 64) * 0.2
    image[:, 0, 20:50, 10:40] = 1
    targets = torch.tensor([[0, 1, 25.0, 35.0, 30.0, 30.0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    history = []
    for _ in range(40):
        losses = yolov5_loss(model, model.raw(image), targets)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append([part.item() for part in losses])
    assert history[-1][0] < history[0][0] / 2
    assert history[-1][2] < history[0][2] / 2


def test_means_of_processes_are_the_loss_of_all(model: YOLOv5) -> None:
    """Two parts of a batch, of unlike numbers of pictures and objects, under the counts of both."""
    objects = torch.tensor([[0, 1, 25.0, 35.0, 30.0, 30.0], [0, 2, 60, 30, 14, 18], [1, 0, 70, 50, 60, 60]])
    raw = [torch.randn(4, *logits.shape[1:], requires_grad=True) for logits in blank(model)]
    together = yolov5_loss(model, raw, objects)
    gradients = torch.autograd.grad(sum(together), raw)
    parts = [(slice(0, 3), objects), (slice(3, 4), objects[:0])]
    counts = []
    for part, own in parts:
        yolov5_loss(model, [x[part] for x in raw], own, mean_over_processes=lambda own: counts.append(own) or own)
    mean = torch.stack(counts).mean(0)
    found = [yolov5_loss(model, [x[p] for x in raw], own, mean_over_processes=lambda _: mean) for p, own in parts]
    for whole, *shares in zip(together, *found, strict=True):
        assert sum(shares).item() / 2 == pytest.approx(whole.item(), rel=1e-5)
    averaged = torch.autograd.grad(sum(sum(losses) for losses in found) / 2, raw)
    for mine, wanted in zip(averaged, gradients, strict=True):
        assert torch.allclose(mine, wanted, atol=1e-7)


def test_smoothed_classes_are_best_short_of_certain(model: YOLOv5) -> None:
    targets = torch.tensor([[0, 2, 41.3, 30.6, 22, 30]])
    sure = perfect(model, targets)
    assert yolov5_loss(model, sure, targets, label_smoothing=0.1).classes > 0.01
    for logits in sure:
        logits[..., 5:] = logits[..., 5:].clamp(*(torch.logit(torch.tensor([0.05, 0.95])).tolist()))
    smooth = yolov5_loss(model, sure, targets, label_smoothing=0.1).classes
    assert smooth < yolov5_loss(model, perfect(model, targets), targets, label_smoothing=0.1).classes
    assert smooth < yolov5_loss(model, [x * 0.9 for x in sure], targets, label_smoothing=0.1).classes
