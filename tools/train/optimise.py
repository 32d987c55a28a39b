"""How the weights move: optimiser, rates over the steps, moving average."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from tools.train.config import TrainSettings

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
LEAST_WARM_UP = 100  # steps; fewer only where training itself is short
LONGEST_WARM_UP = 1 / 3  # of all steps
MOST_GRADIENT = 10.0  # norm to which gradients are clipped
AVERAGE_DECAY, AVERAGE_RAMP = 0.9999, 2000.0  # of the moving average; the ramp in updates


def make_optimizer(model: nn.Module, settings: TrainSettings, batch: int) -> torch.optim.Optimizer:
    """Two groups: biases, which have a warm-up of their own, and the rest. Only matrices and kernels decay, not
    biases nor the scales of normalisations.

    batch: pictures a step, over all processes.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    biases = [parameter for name, parameter in trained.items() if name.endswith("bias")]
    scales = [p for name, p in trained.items() if p.ndim <= 1 and not name.endswith("bias")]
    kernels = [p for name, p in trained.items() if p.ndim > 1 and not name.endswith("bias")]
    decay = settings.weight_decay * batch * gathered(settings, batch) / max(settings.nominal_batch, batch)
    groups = [
        {"params": biases, "weight_decay": 0.0, "is_bias": True},
        {"params": scales, "weight_decay": 0.0, "is_bias": False},
        {"params": kernels, "weight_decay": decay, "is_bias": False},
    ]
    kind = OPTIMIZERS[settings.optimizer]
    # One pass over the weights. With fp16 it would also undo the loss's scale, after gradients have been clipped.
    fused = settings.precision != "fp16"
    if kind is torch.optim.SGD:
        return kind(groups, lr=settings.rate, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=fused)
    return kind(groups, lr=settings.rate, betas=(settings.momentum, 0.999), fused=fused)


def gathered(settings: TrainSettings, batch: int) -> int:
    """How many batches make one step of the optimiser, after warm-up."""
    return max(1, round(settings.nominal_batch / batch))


@dataclass(frozen=True)
class Rates:
    """What holds at one step. gather: batches for one step of the optimiser."""

    others: float
    biases: float
    momentum: float
    gather: int


@dataclass(frozen=True)
class Schedule:
    """Warm-up, in which rates and gathering rise in a line and those of biases fall, then a decay by epochs.

    steps: batches an epoch. batch: pictures a step, over all processes.
    """

    settings: TrainSettings
    steps: int
    batch: int

    @property
    def warm_up(self) -> int:
        """In steps."""
        wanted = self.settings.warmup_epochs * self.steps
        if not wanted:
            return 0
        return round(min(max(wanted, LEAST_WARM_UP), LONGEST_WARM_UP * self.settings.epochs * self.steps))

    def at(self, step: int) -> Rates:
        """step: counts batches over all epochs, from 0."""
        settings = self.settings
        done = min(1.0, (step // self.steps) / settings.epochs)
        falling = (1 + math.cos(math.pi * done)) / 2 if settings.cosine else 1 - done
        rate = settings.rate * (settings.lr_final + (1 - settings.lr_final) * falling)
        gather = gathered(settings, self.batch)
        if step >= self.warm_up:
            return Rates(rate, rate, settings.momentum, gather)
        share = step / self.warm_up
        return Rates(
            others=rate * share,
            biases=_between(settings.warmup_bias_lr, rate, share),
            momentum=_between(settings.warmup_momentum, settings.momentum, share),
            gather=max(1, round(_between(1, gather, share))),
        )


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates.biases if group["is_bias"] else rates.others
        if "momentum" in group:
            group["momentum"] = rates.momentum
        else:
            group["betas"] = (rates.momentum, group["betas"][1])


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, updates: int) -> None:
    """An exponential moving average of weights and statistics; short at first.

    updates: how many there have been, this one counted.
    """
    weight = 1 - AVERAGE_DECAY * (1 - math.exp(-updates / AVERAGE_RAMP))
    current = model.state_dict()
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[key], weight)
        else:
            value.copy_(current[key])
