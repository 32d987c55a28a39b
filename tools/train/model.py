"""The network that is trained: built, given weights to start from, partly frozen; and its losses."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import Bottleneck

import model_defs
from handlers.labels import BACKGROUND, load_labels
from handlers.weights import load_state
from model_defs.contract import Detector
from model_defs.torchvision_detector import TorchvisionDetector
from model_defs.yolov5 import YOLOv5
from tools.checkpoint import LazyTensor, open_checkpoint
from tools.errors import ToolError
from tools.train.config import TrainSettings
from tools.train.head import carry_over, shared_classes
from tools.train.loss import Gains, yolov5_loss
from tools.train.pictures import Batch
from tools.train.recipe import LABELS

# Of the statistics of torchvision's batch normalisations. Its MobileNet has 0.01, with which they follow the weights a
# hundred steps behind; a short training has none to spare.
STATISTICS_MOMENTUM = 0.1
# Of the proposals that Faster R-CNN's second stage learns from, at most so many are objects: with fewer proposals than
# torchvision's 512, its quarter would be few.
POSITIVE_FRACTION = 0.5


def label_names(settings: TrainSettings, classes: tuple[str, ...]) -> list[str]:
    """What the network's labels mean, as `index_to_name.json` says it."""
    return list(classes) if settings.family == "yolov5" else [BACKGROUND, *classes]


def make_model(settings: TrainSettings, classes: tuple[str, ...]) -> tuple[Detector, list[str]]:
    """A network ready for training, and what there is to say about how it starts. What is random follows from the
    seed. Raises ToolError for weights that do not fit."""
    torch.manual_seed(settings.seed)
    detector = _build(settings, len(label_names(settings, classes)))
    if isinstance(detector, TorchvisionDetector):
        _for_short_training(detector, settings)
    note = "weights: random" if settings.weights is None else _load_weights(detector, settings, classes)
    freeze(detector, settings.freeze, norms=settings.freeze_norms)
    return detector.to(memory_format=torch.channels_last), [note]  # type: ignore[call-overload]  # stubs lack it


def _for_short_training(detector: TorchvisionDetector, settings: TrainSettings) -> None:
    if hasattr(detector.model, "roi_heads"):
        sampler = detector.model.roi_heads.fg_bg_sampler
        sampler.batch_size_per_image, sampler.positive_fraction = settings.proposals, POSITIVE_FRACTION
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = STATISTICS_MOMENTUM
        # Residual blocks that add nothing at first make a network of random weights learn faster
        # (arXiv:1706.02677, section 5.1).
        if isinstance(module, InvertedResidual) and module.use_res_connect:
            nn.init.zeros_(module.block[-1][1].weight)
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def _build(settings: TrainSettings, num_labels: int) -> Detector:
    try:
        return model_defs.build(settings.definition, num_labels, **settings.model_args)
    except ValueError as error:
        raise ToolError(str(error)) from error


def _load_weights(detector: Detector, settings: TrainSettings, classes: tuple[str, ...]) -> str:
    """Everything from the file; where it is for other classes, of what depends on them that of those that stay."""
    assert settings.weights is not None
    with open_checkpoint(settings.weights) as checkpoint:
        if checkpoint.size not in (None, settings.model_size) and isinstance(detector, YOLOv5):
            raise ToolError(
                f"{settings.weights} is a YOLOv5{checkpoint.size}; give --model-size {checkpoint.size}, it is"
                f" {settings.model_size}"
            )
        state = {name: _tensor(lazy) for name, lazy in checkpoint.tensors.items()}
    if isinstance(detector, YOLOv5) and not any(".bn." in name for name in state):
        raise ToolError(
            f"{settings.weights} has its batch normalisation folded in, or is no YOLOv5; give the weights that"
            " training left, not those made for serving"
        )
    given = detector.classes_in(state)
    note = f"weights: {settings.weights}"
    if settings.license == "unknown":
        note += " (their licence goes into the recipe with --license)"
    labels, names = label_names(settings, classes), checkpoint.names or _names_beside(settings.weights)
    shared = shared_classes(labels, names) if names and len(names) == given else {}
    if given is not None and (given != detector.num_classes or (shared and names != labels)):
        head = _head(detector, settings)
        if shared:
            note += f"; they know {len(shared)} of the {len(labels)} labels, whose part of the head goes along by name"
            head = {key: carry_over(detector, key, own, state[key], given, shared) for key, own in head.items()}
        else:
            note += f"; they are for {given} labels, not {len(labels)}: the head ({len(head)} tensors) starts anew"
        state |= head
    load_state(detector, state)
    return note


def _names_beside(weights: Path) -> list[str] | None:
    """Of weights that do not tell their labels, in the folder of a recipe."""
    path = weights.with_name(LABELS)
    return load_labels(path) if path.is_file() else None


def _head(detector: Detector, settings: TrainSettings) -> dict[str, Tensor]:
    """The entries of the state dict that depend on the number of labels."""
    own = detector.state_dict()
    with torch.device("meta"):
        other = _build(settings, detector.num_classes + 1).state_dict()
    return {key: value for key, value in own.items() if value.shape != other[key].shape}


def _tensor(lazy: LazyTensor) -> Tensor:
    dtype = getattr(torch, lazy.dtype)
    return torch.frombuffer(bytearray(lazy.read()), dtype=dtype).view(lazy.shape) if lazy.numel else torch.empty(0)


def freeze(detector: Detector, count: int, norms: bool) -> None:
    """Keep the first `count` layers as they are, and with `norms` every batch normalisation. Raises ToolError for
    more layers than there are."""
    layers = _layers(detector)
    if count > len(layers):
        raise ToolError(f"--freeze is {count}, but {type(detector).__name__} has {len(layers)} layers")
    frozen: list[nn.Module] = layers[:count]
    if norms:
        frozen += [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    for part in frozen:
        # In training mode a normalisation would go on following the pictures.
        part.requires_grad_(False).eval()
    if not any(parameter.requires_grad for parameter in detector.parameters()):
        raise ToolError(f"--freeze {count} leaves nothing to train; give less")


def _layers(detector: Detector) -> list[nn.Module]:
    """In the order in which a picture goes through them; of torchvision's models, those of the backbone."""
    if isinstance(detector, YOLOv5):
        return list(detector.model)
    assert isinstance(detector, TorchvisionDetector)
    body, *others = detector.model.backbone.children()
    return [*body.children(), *others]


def losses_of(
    detector: Detector, settings: TrainSettings, batch: Batch, mean_over_processes: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The parts of the loss, a scalar each, means over the pictures of the batch; training descends their sum."""
    if isinstance(detector, YOLOv5):
        assert isinstance(batch.images, Tensor)
        gains = Gains(settings.box_gain, settings.objectness_gain, settings.class_gain)
        raw = detector.raw(batch.images.float() / 255)
        return yolov5_loss(detector, raw, batch.targets, gains, settings.label_smoothing, mean_over_processes)._asdict()
    assert isinstance(detector, TorchvisionDetector)
    # To torchvision label 0 is the background.
    truths = [{"boxes": boxes, "labels": labels + 1} for boxes, labels in batch.by_picture()]
    return detector.model([image.float() / 255 for image in batch.images], truths)


def loss_weight(detector: Detector, batch: float, gather: int) -> float:
    """What a batch's loss, a mean over its pictures, counts in the step of the optimiser that it is gathered for.

    The published rates of YOLOv5 are for gradients summed over pictures, those of torchvision for their mean.
    """
    return batch if isinstance(detector, YOLOv5) else 1 / gather
