"""What one request may ask for, by header, field, member or query parameter alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handlers.errors import InvalidOption
from handlers.labels import BACKGROUND
from handlers.settings import FORMATS, MAX_DETECTIONS, Settings, shown

ALLOWED = {
    "score_threshold": "a number from 0 to 1",
    "iou_threshold": "a number from 0 to 1",
    "max_detections": f"a whole number from 1 to {MAX_DETECTIONS}",
    "classes": "class names or indices, separated by commas",
    "class_agnostic": "true or false",
    "format": ", ".join(FORMATS),
}


@dataclass(frozen=True)
class Options:
    """Thresholds and form of one answer.

    classes: the label indices wanted, None for all. multi_label: as in `Detector.candidates`; for evaluation,
    no request can ask for it.
    """

    score_threshold: float
    iou_threshold: float
    max_detections: int
    class_agnostic: bool
    classes: frozenset[int] | None
    format: str
    multi_label: bool = False


def default_options(settings: Settings) -> Options:
    post = settings.postprocess
    return Options(
        score_threshold=post.score_threshold,
        iou_threshold=post.iou_threshold,
        max_detections=post.max_detections,
        class_agnostic=post.class_agnostic,
        classes=None,
        format=settings.response.format,
    )


def parse_options(given: Mapping[str, Any], defaults: Options, labels: Sequence[str]) -> Options:
    """`defaults`, changed by what a request gives: text from a header, field or query, or JSON values.

    Raises InvalidOption, naming the option, the value and what is allowed.
    """
    values = dict(vars(defaults))
    for name, value in given.items():
        if isinstance(value, bytes | bytearray):
            value = value.decode("utf-8", errors="replace")
        if name not in ALLOWED:
            raise InvalidOption(f"unknown option {shown(name)}; known: {', '.join(ALLOWED)}")
        if name == "classes":
            values[name] = _classes(value, labels)
        else:
            values[name] = _PARSERS[name](name, value)
    if values["format"] == "torchserve" and "score" in labels:
        raise InvalidOption("format torchserve cannot tell the class named 'score' from the score; use detections")
    return Options(**values)


def _refuse(name: str, value: Any) -> InvalidOption:
    return InvalidOption(f"{name} is {shown(value)}; allowed: {ALLOWED[name]}")


def _fraction(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise _refuse(name, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refuse(name, value) from None
    if not 0 <= number <= 1:
        raise _refuse(name, value)
    return number


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 10:
        value = int(value)
    if type(value) is not int or not 1 <= value <= MAX_DETECTIONS:
        raise _refuse(name, value)
    return value


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise _refuse(name, value)
    return value


def _format(name: str, value: Any) -> str:
    if value not in FORMATS:
        raise _refuse(name, value)
    return value


_PARSERS = {
    "score_threshold": _fraction,
    "iou_threshold": _fraction,
    "max_detections": _count,
    "class_agnostic": _flag,
    "format": _format,
}


def _classes(value: Any, labels: Sequence[str]) -> frozenset[int]:
    """Indices of the classes named in a comma-separated text, or in a JSON list of names and indices."""
    if isinstance(value, str):
        # A name may hold a comma itself.
        items: list[Any] = [value.strip()] if value.strip() in labels else [part.strip() for part in value.split(",")]
    elif isinstance(value, list):
        items = value
    else:
        items = [value]
    if not items or items == [""]:
        raise _refuse("classes", value)
    return frozenset(_class_index(item, labels) for item in items)


def _class_index(item: Any, labels: Sequence[str]) -> int:
    if isinstance(item, str) and item in labels and item != BACKGROUND:
        return labels.index(item)
    if isinstance(item, str) and item.isascii() and item.isdigit() and len(item) < 10:
        item = int(item)
    if type(item) is int and 0 <= item < len(labels) and labels[item] != BACKGROUND:
        return item
    names = [f"{i} {name}" for i, name in enumerate(labels) if name != BACKGROUND]
    known = ", ".join(names[:100]) + (", ..." if len(names) > 100 else "")
    raise InvalidOption(f"unknown class {shown(item)} in classes; this model knows {known}")
