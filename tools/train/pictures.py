"""Pictures and boxes as networks are trained and validated with, sample by sample and in batches."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from handlers.geometry import Letterbox, letterbox, plan_letterbox
from handlers.settings import Preprocess
from tools.data.dataset import Picture
from tools.errors import ToolError
from tools.train.augment import Labelled, Tile, jitter_colour, mixup, mosaic, random_affine, view
from tools.train.augmentation import Augmentation
from tools.train.cache import Cache, LoaderSettings, Wanted, scaled


class Sample(NamedTuple):
    """pixels: uint8 `[3, H, W]`, RGB. boxes: float32 `[N, 4]` xyxy in its pixels. labels: int64 `[N]`, those of the
    data set, from 0."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """images: uint8 `[B, 3, H, W]` from a canvas, else a list of B `[3, H, W]`.
    targets: float32 `[T, 6]`, as `yolov5_loss` takes them: index in the batch, label, centre x, centre y, width,
    height, the last four in pixels of the picture.
    """

    images: Tensor | list[Tensor]
    targets: Tensor

    def by_picture(self) -> list[tuple[Tensor, Tensor]]:
        """For every picture its boxes `[N, 4]` xyxy in pixels and labels `[N]` int64, as torchvision takes them."""
        found = []
        for index in range(len(self.images)):
            rows = self.targets[self.targets[:, 0] == index]
            half = rows[:, 4:] / 2
            found.append((torch.cat((rows[:, 2:4] - half, rows[:, 2:4] + half), dim=1), rows[:, 1].long()))
        return found


class ValidationBatch(NamedTuple):
    """images: uint8 `[B, 3, H, W]`. plans: how each was letterboxed, None for a model that resizes by itself.
    indices: which pictures they are."""

    images: Tensor
    plans: list[Letterbox | None]
    indices: list[int]


class TrainingPictures(Dataset[Sample]):
    """Augmented pictures, asked for by (epoch, index).

    All chance comes from seed, epoch and index, so that a sample does not depend on the number of workers, and a
    resumed training sees what an uninterrupted one does.

    canvas: every sample is a square of `size`: a mosaic, or one letterboxed picture. Otherwise it is the picture in
    its own shape, its longer side at most `size`, for the models that resize by themselves; there is no mosaic.
    Crowd boxes are left out. Fills the cache; raises ToolError as that does.
    """

    def __init__(
        self, pictures: Sequence[Picture], size: int, augmentation: Augmentation, seed: int, canvas: bool, cache: Cache
    ):
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.canvas = canvas
        self.cache = cache
        self._wanted = [
            scaled(picture, size)
            if canvas or max(picture.height, picture.width) > size
            else Wanted(picture, picture.height, picture.width)
            for picture in pictures
        ]
        self._boxes = [_scaled_boxes(wanted) for wanted in self._wanted]
        cache.fill(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = default_rng([self.seed, epoch, index])
        if self.canvas and rng.random() < self.augmentation.mosaic:
            seen = self._mosaic(rng, index)
            if rng.random() < self.augmentation.mixup:
                seen = mixup(rng, seen, self._mosaic(rng, int(rng.integers(len(self)))))
        else:
            seen = self._single(rng, index)
        pixels = torch.from_numpy(jitter_colour(rng, seen.pixels, self.augmentation))
        boxes = torch.from_numpy(seen.boxes.astype(np.float32))
        return Sample(pixels.permute(2, 0, 1), boxes, torch.from_numpy(seen.labels))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        rows = []
        for index, (_, boxes, labels) in enumerate(samples):
            owner = torch.full((len(boxes), 1), float(index))
            low, high = boxes[:, :2], boxes[:, 2:]
            rows.append(torch.cat((owner, labels[:, None].float(), (low + high) / 2, high - low), dim=1))
        images = [sample.pixels for sample in samples]
        return Batch(torch.stack(images) if self.canvas else images, torch.cat(rows))

    def _labelled(self, index: int) -> Labelled:
        return Labelled(self.cache.read(self._wanted[index]), *self._boxes[index])

    def _mosaic(self, rng: Generator, index: int) -> Labelled:
        indices = [index, *rng.integers(len(self), size=3)]
        tiles = mosaic(rng, [self._labelled(each) for each in indices], self.size)
        matrix = random_affine(rng, self.augmentation, (self.size, self.size), self.size, self.size)
        return view(tiles, matrix, self.size, self.size)

    def _single(self, rng: Generator, index: int) -> Labelled:
        picture, top, left = self._labelled(index), 0, 0
        height, width = picture.pixels.shape[:2]
        if self.canvas:
            plan = plan_letterbox(height, width, Preprocess(self.size, "square"), stride=1)
            top, left, height, width = plan.top, plan.left, self.size, self.size
        matrix = random_affine(rng, self.augmentation, (width / 2, height / 2), width, height)
        return view([Tile(picture, left, top)], matrix, width, height)


class ValidationPictures(Dataset[tuple[Tensor, Letterbox | None, int]]):
    """Pictures as the server prepares them, asked for by index: pixels uint8 `[3, H, W]`, plan and index.

    preprocess: None for a model that resizes by itself, which gets the picture as it is. Fills the cache; raises
    ToolError as that does.
    """

    def __init__(self, pictures: Sequence[Picture], preprocess: Preprocess | None, stride: int, cache: Cache):
        self.cache = cache
        self._plans = [_plan(picture, preprocess, stride) for picture in pictures]
        self._wanted = [
            Wanted(picture, plan.content_height, plan.content_width)
            if plan
            else Wanted(picture, picture.height, picture.width)
            for picture, plan in zip(pictures, self._plans, strict=True)
        ]
        cache.fill(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, index: int) -> tuple[Tensor, Letterbox | None, int]:
        plan = self._plans[index]
        pixels = torch.from_numpy(np.array(self.cache.read(self._wanted[index]))).permute(2, 0, 1)
        return (letterbox(pixels, plan) if plan else pixels), plan, index

    def collate(self, samples: Sequence[tuple[Tensor, Letterbox | None, int]]) -> ValidationBatch:
        images, plans, indices = zip(*samples, strict=True)
        return ValidationBatch(torch.stack(images), list(plans), list(indices))


def validation_batches(
    pictures: Sequence[Picture], preprocess: Preprocess | None, stride: int, batch: int
) -> list[list[int]]:
    """Indices of all pictures in batches of one shape, the smallest shape first."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        plan = _plan(picture, preprocess, stride)
        groups[(plan.canvas_height, plan.canvas_width) if plan else (picture.height, picture.width)].append(index)
    return [
        group[start : start + batch] for _, group in sorted(groups.items()) for start in range(0, len(group), batch)
    ]


def make_loader(
    pictures: TrainingPictures | ValidationPictures,
    batches: Sampler[list[tuple[int, int]]] | Sequence[list[int]],
    settings: LoaderSettings,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Batches of `pictures`, made by worker processes if `settings` says so.

    Iterating raises ToolError for a picture that cannot be read.
    """
    return _Loader(
        pictures,
        batch_sampler=batches,
        collate_fn=_ByPipe(pictures.collate) if settings.by_pipe else pictures.collate,
        num_workers=settings.workers,
        multiprocessing_context=settings.multiprocessing_context,
        persistent_workers=settings.workers > 0,
        pin_memory=pin_memory,
    )


class _Loader(DataLoader[Any]):
    """Passes on a worker's ToolError as its one line; DataLoader puts the worker's trace before it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # one of torch's own, which is an iterator too
        try:
            yield from super().__iter__()
        except ToolError as error:
            raise ToolError(str(error).rpartition("tools.errors.ToolError: ")[2]) from None


class _ByPipe:
    """Collates to what is pickled whole, where torch would put tensors into shared memory."""

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        return _Parcel(batch) if get_worker_info() else batch


class _Parcel:
    """A batch that is pickled as arrays, and unpickled as the batch."""

    def __init__(self, batch: Batch | ValidationBatch):
        self.batch = batch

    def __reduce__(self) -> Any:
        kind, parts = type(self.batch), [_to_arrays(part) for part in self.batch]
        return _unpack, (kind, parts)


def _to_arrays(part: Any) -> Any:
    if isinstance(part, list):
        return [_to_arrays(item) for item in part]
    return part.numpy() if isinstance(part, Tensor) else part


def _to_tensors(part: Any) -> Any:
    if isinstance(part, list):
        return [_to_tensors(item) for item in part]
    return torch.from_numpy(part) if isinstance(part, np.ndarray) else part


def _unpack(kind: type[Batch] | type[ValidationBatch], parts: list[Any]) -> Batch | ValidationBatch:
    return kind(*map(_to_tensors, parts))


def _plan(picture: Picture, preprocess: Preprocess | None, stride: int) -> Letterbox | None:
    return plan_letterbox(picture.height, picture.width, preprocess, stride) if preprocess else None


def _scaled_boxes(wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float64 `[N, 4]` xyxy in pixels of the scaled picture, and labels int64 `[N]`; without crowds."""
    picture, height, width = wanted
    kept = [box for box in picture.boxes if not box.crowd]
    boxes = np.array([box.xyxy for box in kept], dtype=np.float64).reshape(-1, 4)
    scale = np.array((width / picture.width, height / picture.height) * 2)
    return boxes * scale, np.array([box.label for box in kept], dtype=np.int64)
