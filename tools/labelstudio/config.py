"""The labelling configuration of a project: labelled rectangles on one picture.

https://labelstud.io/tags/rectanglelabels: XML whose tag RectangleLabels has a Label for each class, and names the
tag Image that it is for; `value="$image"` of that names the key of the task's data with the picture's address.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from handlers.drawing import class_colour

NAME, PICTURE, KEY = "label", "image", "image"
MOST_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Control:
    """name: of the RectangleLabels. picture: of the Image. key: of the address in a task's data. labels: in order."""

    name: str
    picture: str
    key: str
    labels: tuple[str, ...]


def make_config(labels: Sequence[str]) -> str:
    """Rectangles that cannot be turned, since detectors know none that are, in the colours of answers and reports."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=PICTURE, value=f"${KEY}", zoom="true", zoomControl="true")
    control = ElementTree.SubElement(view, "RectangleLabels", name=NAME, toName=PICTURE, canRotate="false")
    _add(control, labels, 0)
    return ElementTree.tostring(view, encoding="unicode")


def read_config(config: str) -> Control:
    """Raises ValueError, saying what does not fit."""
    control, picture = _find(_parse(config))
    names = tuple(label.get("value", "") for label in control.iter("Label"))
    if not names or "" in names or len(set(names)) != len(names):
        raise ValueError(f"its RectangleLabels have the labels {list(names)}; each must have a name of its own")
    return Control(control.get("name", ""), picture.get("name", ""), picture.get("value", "")[1:], names)


def extend_config(config: str, labels: Sequence[str]) -> str:
    """With those of `labels` added that it lacks; the same text where it lacks none. Raises ValueError."""
    known = read_config(config).labels
    new = [label for label in labels if label not in known]
    if not new:
        return config
    root = _parse(config)
    _add(_find(root)[0], new, len(known))
    return ElementTree.tostring(root, encoding="unicode")


def _add(control: ElementTree.Element, labels: Sequence[str], first: int) -> None:
    for index, label in enumerate(labels, start=first):
        red, green, blue = class_colour(index)
        ElementTree.SubElement(control, "Label", value=label, background=f"#{red:02x}{green:02x}{blue:02x}")


def _parse(config: str) -> ElementTree.Element:
    # Entities, which such a text has no use for, are what makes foreign XML dangerous.
    if len(config) > MOST_CHARACTERS or "<!DOCTYPE" in config:
        raise ValueError("it is too long, or has a document type")
    try:
        return ElementTree.fromstring(config)  # noqa: S314  # without a document type
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML ({error})") from error


def _find(root: ElementTree.Element) -> tuple[ElementTree.Element, ElementTree.Element]:
    """The RectangleLabels and the Image that they are for."""
    controls = list(root.iter("RectangleLabels"))
    if len(controls) != 1:
        raise ValueError(f"it has {len(controls)} tags RectangleLabels; one is needed")
    pictures = [picture for picture in root.iter("Image") if picture.get("name") == controls[0].get("toName")]
    if len(pictures) != 1 or not controls[0].get("name") or not pictures[0].get("value", "").startswith("$"):
        raise ValueError('its RectangleLabels are for no tag Image with a value such as "$image"')
    return controls[0], pictures[0]
