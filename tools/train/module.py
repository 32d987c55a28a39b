"""The training and validation steps, as Lightning calls them."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from handlers.options import Options
from handlers.pipeline import finish
from model_defs.contract import Detections, Detector
from tools.errors import ToolError
from tools.evaluate.metrics import average_precision, fitness, truth_of
from tools.train.config import TrainSettings
from tools.train.loaders import Loaders
from tools.train.model import loss_weight, losses_of
from tools.train.optimise import MOST_GRADIENT, Schedule, make_optimizer, set_rates, update_average
from tools.train.pictures import Batch, ValidationBatch

# The setting in which mean average precision is measured.
VALIDATION = Options(
    score_threshold=0.001,
    iou_threshold=0.6,
    max_detections=300,
    class_agnostic=False,
    classes=None,
    format="detections",
    multi_label=True,
)


LARGEST_WEIGHT = 1e6  # sound ones stay below a thousand


class LossNotFinite(ToolError):
    """Training has gone out of bounds."""


class Training(LightningModule):
    """Trains `detector`; `average`, the moving average of its weights, is what is validated and kept.

    metrics: of the last validation, the same in every process. found: what that found, by picture, labels as the
    data set counts them; in the first process.
    """

    def __init__(self, detector: Detector, settings: TrainSettings, loaders: Loaders):
        super().__init__()
        self.automatic_optimization = False
        self.detector = detector
        self.average = copy.deepcopy(detector).eval().requires_grad_(False)
        self.settings = settings
        self.loaders = loaders
        self.schedule = Schedule(settings, len(loaders.batches), loaders.batch)
        self.metrics: dict[str, float] = {}
        self.found: dict[int, Detections] = {}
        self.losses: dict[str, Tensor] = {}  # of the last step, in this process
        self._sums: dict[str, Tensor] = {}
        self._updates = 0
        self._waiting = 0  # batches whose gradients wait for a step of the optimiser

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.detector, self.settings, self.schedule.batch)

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning sets the epoch of samplers, not of batch samplers, and fetches the first batch early.
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        self.loaders.batches.set_epoch(progress.processed)
        return self.loaders.training

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loaders.validation

    def on_train_epoch_start(self) -> None:
        self.loaders.batches.set_epoch(self.current_epoch)

    def training_step(self, batch: Batch, index: int) -> None:
        epoch = self.current_epoch
        # torchvision draws anchors and proposals at random: from a resumed run the same as from a whole one.
        torch.manual_seed(hash((self.settings.seed, epoch, index, self.global_rank)))
        optimizer: Any = self.optimizers()
        rates = self.schedule.at(epoch * self.schedule.steps + index)
        set_rates(optimizer.optimizer, rates)

        losses = losses_of(self.detector, self.settings, batch, self._mean)
        total = torch.stack(list(losses.values())).sum()
        if not total.isfinite():
            parts = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            raise LossNotFinite(
                f"the loss is not finite at epoch {epoch + 1}, step {index + 1} ({parts}); give a lower --lr than"
                f" {self.settings.rate:g}; what was saved before is intact"
            )
        pictures = self._mean(total.new_tensor(float(len(batch.images)))).item() * self.trainer.world_size
        self.manual_backward(total * loss_weight(self.detector, pictures, rates.gather))
        self._note(losses, first=index == 0)
        self._waiting += 1
        # At the end of an epoch nothing waits, so that a run can go on from there.
        if self._waiting >= rates.gather or self.trainer.is_last_batch:
            self._step(optimizer)

    def _note(self, losses: Mapping[str, Tensor], first: bool) -> None:
        self.losses = {name: value.detach() for name, value in losses.items()}
        before = {} if first else self._sums
        self._sums = {name: before.get(name, 0.0) + value for name, value in self.losses.items()}

    def _step(self, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()
        self._waiting = 0
        self._updates += 1
        update_average(self.average, self.detector, self._updates)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_norm_(self.detector.parameters(), MOST_GRADIENT)

    def check_weights(self) -> None:
        """Raises LossNotFinite where the last step of an epoch has blown the weights up, which no loss has seen."""
        largest = max(float(parameter.detach().abs().max()) for parameter in self.detector.parameters())
        if not largest < LARGEST_WEIGHT:
            raise LossNotFinite(
                f"the weights have grown to {largest:g} by the end of epoch {self.current_epoch + 1}; give a lower"
                f" --lr than {self.settings.rate:g}; what was saved before is intact"
            )

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.trainer.world_size == 1:
            return values
        torch.distributed.all_reduce(values)
        return values / self.trainer.world_size

    def mean_losses(self) -> dict[str, float]:
        """Of the epoch that ends, over all processes; every process must ask."""
        means = self._mean(torch.stack(list(self._sums.values()))) / self.trainer.num_training_batches
        return dict(zip(self._sums, means.tolist(), strict=True))

    def on_validation_epoch_start(self) -> None:
        self.found = {}
        if self.trainer.world_size > 1:
            # Each process has normalised by its own pictures since the last step.
            for buffer in self.average.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: ValidationBatch, index: int) -> None:
        images = batch.images.float() / 255
        # Coordinates need more than the 8 bits of bf16.
        with torch.autocast(self.device.type, enabled=False):
            candidates = self.average.candidates(images, VALIDATION.score_threshold, multi_label=True)
        first_class = int(self.average.has_background)
        for found, plan, number in zip(candidates, batch.plans, batch.indices, strict=True):
            picture = self.loaders.pictures[number]
            boxes, labels, scores = finish(found, VALIDATION, plan, picture.height, picture.width)
            self.found[number] = Detections(boxes, labels - first_class, scores)

    def on_validation_epoch_end(self) -> None:
        world = self.trainer.world_size
        metrics: list[dict[str, float]] = [{}]
        if world > 1:
            parts: list[Any] | None = [None] * world if self.global_rank == 0 else None
            torch.distributed.gather_object(self.found, parts, 0)
            self.found = {number: found for part in parts or () for number, found in part.items()}
        if self.global_rank == 0:
            metrics = [self._measure()]
        if world > 1:
            torch.distributed.broadcast_object_list(metrics, 0)
        self.metrics = metrics[0]

    def _measure(self) -> dict[str, float]:
        numbers = sorted(self.found)
        truths = [truth_of(self.loaders.pictures[number]) for number in numbers]
        classes = self.detector.num_classes - int(self.detector.has_background)
        precision = average_precision(truths, [self.found[number] for number in numbers], classes)
        figures = {"map50": precision.map50, "map50_95": precision.map50_95, "fitness": fitness(precision)}
        # Pictures without objects leave nothing to measure.
        return {name: 0.0 if math.isnan(value) else float(value) for name, value in figures.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """By way of the detectors: torchvision's have other keys than the modules that they consist of."""
        for name, detector in (("detector.", self.detector), ("average.", self.average)):
            own = {key.removeprefix(name): value for key, value in state_dict.items() if key.startswith(name)}
            detector.load_state_dict(own, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["updates"] = self._updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._updates = checkpoint["updates"]
