"""A loaded archive: requests in, answers out. Knows nothing of any server.

    read:     row, headers -> pictures -> upright RGB -> letterboxed tensors
    infer:    pictures of one shape share a forward pass -> candidates -> detections
    respond:  detections -> bytes, content type, status

A picture that cannot be answered carries its own error from where it arose; its neighbours go on.
"""

import hashlib
import logging
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from handlers.boxes import select
from handlers.brightness import brightness
from handlers.errors import (
    BadArchive,
    BadSettings,
    InvalidImage,
    InvalidOption,
    ModelFailure,
    RequestError,
)
from handlers.geometry import Letterbox, clip, letterbox, plan_letterbox, unletterbox
from handlers.golden import difference, load_golden
from handlers.image import decode
from handlers.labels import check_background, load_labels
from handlers.metrics import OK
from handlers.options import Options, default_options, parse_options
from handlers.request import Instance, read_request
from handlers.response import Context, error_answer, json_answer, kserve_answer, render
from handlers.runtimes import ENGINES, Network, load_network
from handlers.settings import Settings, parse_settings
from handlers.tensor import read_tensor, tensor_answer
from model_defs.contract import Detections

logger = logging.getLogger(__name__)

# What is decoded may only be read, and is only read.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

# Pictures of one shape that share a forward pass, and their pixels together, at most: bounds the memory that a batch
# of large pictures takes where the model resizes them itself, 12 bytes a pixel and copies of that.
MAX_FORWARD = 16
MAX_FORWARD_PIXELS = 32_000_000
PROVENANCE = "MAR-INF/PROVENANCE.json"


@dataclass
class Item:
    """One picture on its way. tensor: `[3, h, w]` as the network will see it, uint8; float32 where a client has sent it
    so, who gets the network's `rows`. brightness: of the picture, 0 to 1. usual: whether it is asked about with the
    archive's own options, the format apart, and is no golden picture, with which servers are probed."""

    options: Options
    request_id: str = ""
    height: int = 0
    width: int = 0
    pixels: np.ndarray | None = None
    plan: Letterbox | None = None
    tensor: Tensor | None = None
    brightness: float | None = None
    usual: bool = False
    detections: Detections | None = None
    rows: Tensor | None = None
    error: RequestError | None = None
    timing_ms: dict[str, float] = field(default_factory=dict)
    # For those who keep pictures: the encoded one, and what the network found in `tensor`, before suppression.
    body: bytes | None = None
    candidates: Detections | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing_ms[stage] = round((time.perf_counter() - start) * 1000, 3)


@dataclass
class Job:
    """One request: its pictures, or the error that it came to before there were any."""

    items: list[Item] = field(default_factory=list)
    kserve: bool = False
    error: RequestError | None = None


@dataclass(frozen=True)
class Answer:
    """outcome: `OK`, or the name of the error."""

    body: bytes
    content_type: str
    status: int = 200
    phrase: str = "OK"
    outcome: str = OK


class Pipeline:
    """The network of one archive with its labels and settings. Keeps nothing of a request."""

    def __init__(self, settings: Settings, labels: list[str], network: Network, device: torch.device):
        self.settings = settings
        self.labels = labels
        self.network = network
        self.device = device
        self.defaults = default_options(settings)
        self.since = datetime.now(UTC)
        self.checksum: str | None = None
        self.golden: tuple[bytes, ...] = ()
        # Where set, a picture keeps its encoded form, and all candidates above this score.
        self.keep_above: float | None = None

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], gpu: int | None = None) -> "Pipeline":
        """Read an extracted archive.

        config: the parsed model-config.yaml. gpu: the ordinal that the server gives this worker.
        Raises BadSettings or BadArchive, one line that names the cause.
        """
        settings = parse_settings(config.get("handler"))
        _set_threads(config)
        device = _device(settings.device, gpu)
        labels = load_labels(folder / settings.labels)
        network = load_network(folder, settings, len(labels), device)
        check_background(labels, network.has_background, settings.model.definition)
        if network.letterbox and settings.preprocess.size % network.stride:
            raise BadSettings(
                f"preprocess.size is {settings.preprocess.size}, not a multiple of the model's stride {network.stride}"
            )
        pipeline = cls(settings, labels, network, device)
        if (folder / PROVENANCE).is_file():
            pipeline.checksum = hashlib.sha256((folder / PROVENANCE).read_bytes()).hexdigest()
        pipeline.golden = tuple(pipeline.golden_picture(folder, golden.image) for golden in settings.golden)
        return pipeline

    def check_golden(self, folder: Path, record: bool = False) -> list[dict[str, Any]]:
        """Answer the golden pictures, which also warms up; the answers come back as format `detections`.

        Raises BadArchive when an answer differs from the stored one. record: a picture may be without one yet.
        """
        answers = []
        for golden in self.settings.golden:
            item = self._item(Instance(self.golden_picture(folder, golden.image), {}))
            self._infer_items([item])
            try:
                found, context = self._result(item)
            except RequestError as error:
                raise BadArchive(f"golden picture {golden.image} cannot be answered: {error}") from error
            if not record or (folder / golden.detections).exists():
                expected = load_golden(folder / golden.detections, self.labels)
                problem = difference(expected, found, self.defaults.score_threshold)
                if problem:
                    raise BadArchive(f"golden picture {golden.image} gets another answer than it has to: {problem}")
            answers.append(json_answer(found, "detections", context._replace(timing_ms={})))
        return answers

    def golden_picture(self, folder: Path, name: str) -> bytes:
        """The encoded picture. Raises BadArchive when it cannot be read."""
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise BadArchive(f"golden picture {name} cannot be read ({error.strerror})") from error

    def warm_up(self, folder: Path, batch_size: int) -> None:
        """Run one full batch of the first golden picture, so that no client waits for first allocations."""
        if not self.settings.golden or batch_size == 1:
            return
        picture = self.golden_picture(folder, self.settings.golden[0].image)
        items = [self._item(Instance(picture, {})) for _ in range(min(batch_size, MAX_FORWARD))]
        self._infer_items(items)

    def detect(self, bodies: Sequence[bytes], options: Options) -> list[Detections | RequestError]:
        """What the server finds on encoded pictures: an answer, or why there is none, for each, in order."""
        items = [self._item(Instance(body, {}), options=options) for body in bodies]
        self._infer_items([item for item in items if item.error is None])
        return [item.error or item.detections for item in items]  # type: ignore[misc]  # one of them is there

    def read(self, row: Mapping[str, Any], headers: Mapping[str, Any], request_id: str = "") -> Job:
        """One request as far as its tensors. Raises nothing: an error goes into the job.

        request_id: what the log calls the request, should the model fail on it.
        """
        try:
            request = read_request(row, headers, self.settings.limits)
        except RequestError as error:
            return Job(error=_bare(error))
        return Job([self._item(instance, request_id) for instance in request.instances], request.kserve)

    def _item(self, instance: Instance, request_id: str = "", options: Options | None = None) -> Item:
        item = Item(options or self.defaults, request_id)
        try:
            if instance.tensor:
                item.tensor = self._tensor(instance)
                return item
            item.options = parse_options(instance.options, item.options, self.labels)
            with item.timed("decode"):
                pixels = decode(instance.body, self.settings.limits, _decode_jpeg)
            with item.timed("preprocess"):
                self._prepare(item, pixels)
            asked = replace(item.options, format=self.defaults.format)
            item.usual = asked == self.defaults and instance.body not in self.golden
            if self.keep_above is not None:
                item.body = instance.body
        except RequestError as error:
            item.error = _bare(error)
        return item

    def _tensor(self, instance: Instance) -> Tensor:
        shape, *others = (instance.options.get("shape"), *(set(instance.options) - {"shape"}))
        if others:
            raise InvalidOption(f"option {others[0]} does not go with a tensor, which is answered with all rows")
        if not self.network.letterbox:
            raise InvalidOption("this model takes pictures and resizes them itself, no tensors; send the picture")
        return read_tensor(instance.body, shape, self.network.stride, self.settings.limits)

    def _prepare(self, item: Item, pixels: np.ndarray) -> None:
        item.height, item.width = pixels.shape[:2]
        if item.options.format == "image":
            item.pixels = pixels
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if not self.network.letterbox:
            try:
                self.network.check_size(item.height, item.width)
            except ValueError as error:
                raise InvalidImage(str(error)) from error
            item.tensor = image
        else:
            item.plan = plan_letterbox(item.height, item.width, self.settings.preprocess, self.network.stride)
            item.tensor = letterbox(image, item.plan)
        item.brightness = brightness(item.tensor, item.plan)

    def infer(self, jobs: Sequence[Job]) -> None:
        """Fill in the detections of every picture that has none and no error."""
        self._infer_items([item for job in jobs for item in job.items if item.error is None])

    def _infer_items(self, items: list[Item]) -> None:
        groups: dict[tuple[int, int, torch.dtype, bool], list[Item]] = defaultdict(list)
        for item in items:
            if item.tensor is not None:
                _, height, width = item.tensor.shape
                groups[height, width, item.tensor.dtype, item.options.multi_label].append(item)
        for (height, width, *_), group in groups.items():
            size = max(1, min(MAX_FORWARD, MAX_FORWARD_PIXELS // (height * width)))
            for start in range(0, len(group), size):
                self._forward(group[start : start + size])

    def _forward(self, items: list[Item]) -> None:
        """Pictures of one shape through the network. If that fails, each goes alone and answers for itself."""
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                images = torch.stack([item.tensor for item in items if item.tensor is not None])
                if images.is_floating_point():
                    for item, rows in zip(items, self.network.rows(images), strict=True):
                        item.rows = rows
                    return
                threshold = min(item.options.score_threshold for item in items)
                if self.keep_above is not None:
                    threshold = min(threshold, self.keep_above)
                found = self.network.candidates(images, threshold, items[0].options.multi_label)
                elapsed = round((time.perf_counter() - start) * 1000, 3)
                for item, candidates in zip(items, found, strict=True):
                    item.timing_ms["inference"] = elapsed
                    if self.keep_above is not None:
                        item.candidates = candidates
                    with item.timed("postprocess"):
                        item.detections = finish(candidates, item.options, item.plan, item.height, item.width)
        except Exception:  # noqa: BLE001  # whatever the network raises concerns this batch only
            if len(items) > 1:
                for item in items:
                    self._forward([item])
                return
            items[0].error = _model_failure(items[0].request_id)
        finally:
            for item in items:
                item.tensor = None

    def respond(self, job: Job) -> Answer:
        """The bytes of one request's answer."""
        try:
            if job.error:
                raise job.error
            if job.kserve:
                return Answer(*kserve_answer([self._kserve_prediction(i, item) for i, item in enumerate(job.items)]))
            (item,) = job.items
            if item.rows is not None:
                return Answer(*tensor_answer(item.rows))
            detections, context = self._result(item)
            return Answer(*render(detections, item.options.format, context, item.pixels))
        except RequestError as error:
            return _refusal(_bare(error))
        except Exception:  # noqa: BLE001  # such as boxes that are no numbers: the neighbours get their answers
            return _refusal(_model_failure(job.items[0].request_id if job.items else ""))

    def _kserve_prediction(self, index: int, item: Item) -> Any:
        if item.options.format in ("yolo", "image"):
            raise InvalidOption(
                f"format {item.options.format} is no JSON; for instances use torchserve, detections or coco"
            )
        try:
            detections, context = self._result(item)
        except RequestError as error:
            raise type(error)(f"instances[{index}]: {error}") from _bare(error)
        return json_answer(detections, item.options.format, context)

    def _result(self, item: Item) -> tuple[Detections, Context]:
        if item.error:
            raise item.error
        assert item.detections is not None
        settings = self.settings
        context = Context(settings.name, settings.version, self.labels, item.height, item.width, item.timing_ms)
        return item.detections, context

    def describe(self) -> dict[str, Any]:
        """What this model is, for TorchServe's customised description.

        since: when this worker has loaded it. checksum: of the archive's provenance, which holds those of all its
        entries; None where there is none.
        """
        settings = self.settings
        return {
            "name": settings.name,
            "version": settings.version,
            "definition": settings.model.definition,
            "labels": self.labels,
            "postprocess": vars(settings.postprocess),
            "response": vars(settings.response),
            "device": str(self.device),
            "since": self.since.isoformat(timespec="seconds"),
            "checksum": self.checksum,
            "input": vars(settings.preprocess) | {"letterbox": self.network.letterbox, "stride": self.network.stride},
        }


def finish(candidates: Detections, options: Options, plan: Letterbox | None, height: int, width: int) -> Detections:
    """From a network's candidates to detections on a picture of `height` x `width`, on the CPU.

    plan: how the picture was letterboxed, None for a model that resizes by itself.
    """
    boxes, labels, scores = (part.cpu() for part in select(candidates, options))
    if plan is not None:
        boxes = unletterbox(boxes, plan)
    return Detections(clip(boxes, height, width), labels, scores)


def load_checked(folder: Path, config: Mapping[str, Any], gpu: int | None = None) -> Pipeline:
    """Load an extracted archive for serving: golden pictures checked, batches warmed up.

    Raises BadSettings or BadArchive, one line that names the cause.
    """
    pipeline = Pipeline.load(folder, config, gpu)
    pipeline.check_golden(folder)
    pipeline.warm_up(folder, int(config.get("batchSize", 1)))
    return pipeline


def dry_run(folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Load an extracted archive without serving it; what the build records about it.

    Raises BadSettings or BadArchive, one line that names the cause.
    """
    pipeline = Pipeline.load(Path(folder), config)
    answers = pipeline.check_golden(Path(folder), record=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    engine = ENGINES.get(pipeline.settings.runtime.backend)
    if engine:
        versions[engine] = import_module(engine).__version__
    return {"answers": answers, "versions": versions}


def _decode_jpeg(body: bytes) -> np.ndarray:
    """The same library as Pillow's, a fifth faster: it writes to where the pixels are wanted."""
    encoded = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _bare(error: RequestError) -> RequestError:
    """Without where it came from: those frames hold the picture and the item that holds the error, and such a ring
    stays in memory until Python looks for rings."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _refusal(error: RequestError) -> Answer:
    return Answer(*error_answer(error), error.status, error.phrase, type(error).__name__)


def _model_failure(request_id: str) -> ModelFailure:
    """For the client, while the exception being handled goes to the log."""
    logger.exception("request %s: the model failed on a picture", request_id or "without id")
    return ModelFailure("the model failed on this picture; the server's log has the cause")


def _set_threads(config: Mapping[str, Any]) -> None:
    """Cores divided by workers: TorchServe starts as many workers as there are cores, and torch as many
    threads in each, which then wait for each other."""
    cores = len(os.sched_getaffinity(0))
    workers = config.get("maxWorkers", cores)
    if type(workers) is not int:
        raise BadSettings(
            f"maxWorkers is {workers!r} in model-config.yaml, not a whole number; TorchServe ignores it so"
        )
    torch.set_num_threads(max(1, cores // max(1, workers)))


def _device(wanted: str, gpu: int | None) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "gpu" and not available:
        raise BadSettings(
            "device is gpu, but torch finds no usable CUDA device; check the driver, or build with device: auto"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", gpu or 0)
