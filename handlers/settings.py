"""The settings of an archive, read once from its model-config.yaml.

An unknown key, a missing one, a wrong type or a value out of range is an error, never ignored. The
same classes describe the recipe that the archive is built from.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from handlers.errors import BadSettings

FORMATS = ("torchserve", "detections", "coco", "yolo", "image")
Format = Literal["torchserve", "detections", "coco", "yolo", "image"]

# How pydantic reads these classes when a recipe is parsed.
STRICT = {"extra": "forbid", "strict": True}

# More detections than this cannot be asked for: with the longest labels the answer still fits
# TorchServe's limit on an answer, beyond which it kills the worker.
MAX_DETECTIONS = 1000
MAX_LABEL_LENGTH = 256
# The environment variable of a server that sends larger answers than TorchServe does by default: how many bytes.
ANSWER_VARIABLE = "MARINA_MAX_ANSWER_BYTES"
# That of a server that keeps captured pictures elsewhere than the recipe says, or nowhere: `off`.
CAPTURE_VARIABLE = "MARINA_CAPTURE_TO"
# Pillow refuses to decode more (twice PIL.Image.MAX_IMAGE_PIXELS).
MOST_PIXELS = 178_956_970
MOST_SHOWN = 200  # characters of a value in a message


def shown(value: Any) -> str:
    """For a message. What a request or an archive gives may be of any length, width and depth."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    try:
        text = brief.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of very many digits"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, outside of {low} to {high}")


@dataclass(frozen=True)
class Model:
    """Which network: a key of `model_defs.DEFINITIONS` and the arguments of its builder."""

    __pydantic_config__ = STRICT
    definition: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocess:
    """How a picture is scaled and padded, for the models that do not resize it themselves.

    size: pixels of the longer side. shape: `rect` pads to the smallest stride multiple that holds the
    picture, `square` to size x size.
    """

    __pydantic_config__ = STRICT
    size: int = 640
    shape: Literal["rect", "square"] = "rect"

    def __post_init__(self) -> None:
        _check_range("size", self.size, 32, 8192)


@dataclass(frozen=True)
class Postprocess:
    """Which candidates become detections: score above `score_threshold`, no overlap above
    `iou_threshold` with a better one of the same class (of any class if `class_agnostic`)."""

    __pydantic_config__ = STRICT
    score_threshold: float = 0.25
    iou_threshold: float = 0.45
    max_detections: int = 300
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        _check_range("score_threshold", self.score_threshold, 0, 1)
        _check_range("iou_threshold", self.iou_threshold, 0, 1)
        _check_range("max_detections", self.max_detections, 1, MAX_DETECTIONS)


@dataclass(frozen=True)
class Limits:
    """The largest picture taken: encoded bytes, and width x height."""

    __pydantic_config__ = STRICT
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        _check_range("max_bytes", self.max_bytes, 1, 1_000_000_000)
        _check_range("max_pixels", self.max_pixels, 1, MOST_PIXELS)


@dataclass(frozen=True)
class Response:
    """The answer's format where a request asks for none."""

    __pydantic_config__ = STRICT
    format: Format = "torchserve"


Backend = Literal["torch", "onnx", "openvino", "aoti", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]

PRECISIONS: dict[str, tuple[str, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnx": ("fp32",),
    "openvino": ("fp32", "bf16", "int8"),
    "aoti": ("fp32",),
    "tensorrt": ("fp32", "fp16"),
}


@dataclass(frozen=True)
class Runtime:
    """What executes the network, in which precision.

    shape: `fixed` writes an exported network for one picture of preprocess.size x preprocess.size, `dynamic` for any
    number of any size.
    """

    __pydantic_config__ = STRICT
    backend: Backend = "torch"
    precision: Precision = "fp32"
    shape: Literal["dynamic", "fixed"] = "dynamic"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS[self.backend]:
            raise ValueError(
                f"precision is {self.precision}, but {self.backend} has {', '.join(PRECISIONS[self.backend])}"
            )
        if self.backend == "torch" and self.shape == "fixed":
            raise ValueError("shape is fixed, but torch takes every shape; leave it out")


@dataclass(frozen=True)
class Exported:
    """What the file of an exported network does not tell; the first three as `model_defs.contract.Detector` has them.

    outputs: their names, in order: rows as YOLOv5 gives them and the picture of each, or boxes, labels and scores of
    one picture.
    single: it takes one picture at a time. machine: the only kind that it runs on, where there is one. sides: what it
    scales a picture to, as `model_defs.contract.check_thickness` takes them; None where the handler does that.
    """

    has_background: bool
    letterbox: bool
    stride: int
    outputs: tuple[str, ...]
    single: bool
    machine: str | None = None
    sides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Golden:
    """A picture and the answer that the archive must give on it."""

    __pydantic_config__ = STRICT
    image: str
    detections: str


def check_destination(value: str) -> None:
    """Raises ValueError unless captured pictures can be kept there, as far as its form tells."""
    if not value.startswith("/") and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/[^?#]*)?", value):
        raise ValueError(f"to is {value!r}, neither an absolute folder nor s3://bucket/prefix")


@dataclass(frozen=True)
class Keep:
    """Which of the answered pictures are worth labelling; one reason is enough.

    near_threshold: something found whose score is at most this much above the threshold. classes: one of these found.
    rare: a class found that up to now less than this share of the pictures had. empty: nothing found. random: any,
    with this probability.
    """

    __pydantic_config__ = STRICT
    near_threshold: float = 0.0
    classes: tuple[str, ...] = ()
    rare: float = 0.0
    empty: bool = False
    random: float = 0.0

    def __post_init__(self) -> None:
        for name in ("near_threshold", "rare", "random"):
            _check_range(name, getattr(self, name), 0, 1)
        if not any(vars(self).values()):
            raise ValueError("nothing is kept; give near_threshold, classes, rare, empty or random")


@dataclass(frozen=True)
class Blur:
    """What is made unrecognisable before a picture is kept.

    classes: all of their boxes. heads_of: the upper part of the boxes of these, for models that know no faces.
    """

    __pydantic_config__ = STRICT
    classes: tuple[str, ...] = ()
    heads_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capture:
    """The pictures that a server keeps, as the start of a next data set; off in an archive that has none of this.

    to: an absolute folder or `s3://bucket/prefix`; the server's MARINA_CAPTURE_TO goes before it, and where there is
    neither, nothing is kept. per_hour: at most, by all workers together. per_class_per_hour: of those, for the sake of
    one class. days: how long they are kept in a folder; in a bucket that is up to its lifecycle rules.
    """

    __pydantic_config__ = STRICT
    keep: Keep
    to: str | None = None
    per_hour: int = 100
    per_class_per_hour: int = 20
    days: int = 30
    blur: Blur = Blur()

    def __post_init__(self) -> None:
        _check_range("per_hour", self.per_hour, 1, 100_000)
        _check_range("per_class_per_hour", self.per_class_per_hour, 1, 100_000)
        _check_range("days", self.days, 1, 36_500)
        if self.to is not None:
            check_destination(self.to)


@dataclass(frozen=True)
class Settings:
    """Everything the handler knows; file names are relative to the archive."""

    name: str
    version: str
    model: Model
    weights: str
    labels: str
    preprocess: Preprocess
    postprocess: Postprocess
    limits: Limits
    response: Response
    runtime: Runtime
    device: Literal["auto", "cpu", "gpu"]
    golden: tuple[Golden, ...]
    exported: Exported | None = None
    capture: Capture | None = None


def parse_settings(section: Any) -> Settings:
    """The `handler` section of a model-config.yaml. Raises BadSettings, naming the key."""
    if not isinstance(section, Mapping):
        raise BadSettings("model-config.yaml has no `handler` section; build the archive with `marina archive build`")
    return _parse(Settings, section, "handler")


def _parse(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise BadSettings(f"{where}: {shown(value)} is not a mapping of settings")
    known = {f.name: f for f in fields(kind)}
    for key in value:
        if key not in known:
            name = key[:80] if isinstance(key, str) else shown(key)
            raise BadSettings(f"{where}.{name}: unknown setting; known here: {', '.join(known)}")
    hints = get_type_hints(kind)
    arguments = {}
    for name, declared in known.items():
        if name in value:
            arguments[name] = _convert(hints[name], value[name], f"{where}.{name}")
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise BadSettings(f"{where}.{name}: missing")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise BadSettings(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _parse(hint, value, where)
    origin = get_origin(hint)
    if origin is UnionType:
        kind, _ = get_args(hint)
        return None if value is None else _convert(kind, value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise BadSettings(f"{where}: {shown(value)} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BadSettings(f"{where}: {shown(value)} is not a list")
        return tuple(_convert(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    expected = dict if origin is dict else hint
    if expected is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise BadSettings(f"{where}: {shown(value)} is too large a number") from None
    if type(value) is not expected:
        raise BadSettings(f"{where}: {shown(value)} is {type(value).__name__}, not {expected.__name__}")
    return value
