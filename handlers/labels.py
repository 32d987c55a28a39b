"""Class names: `index_to_name.json`, TorchServe's convention."""

import json
from pathlib import Path

from handlers.errors import BadSettings
from handlers.settings import MAX_LABEL_LENGTH, Capture

BACKGROUND = "__background__"


def load_labels(path: Path) -> list[str]:
    """The names in the order of their indices.

    The file maps "0", "1", ... to names. Raises BadSettings for a missing file, a gap, a name that
    is empty, too long, not printable or there twice (two classes of one name cannot be told apart in an answer).
    """
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSettings(
            f"labels file {path} cannot be read ({error.strerror}); give one as index_to_name.json"
        ) from error
    except ValueError as error:
        raise BadSettings(f"labels file {path} is not JSON ({error})") from error
    if not isinstance(mapping, dict) or not mapping:
        raise BadSettings(f'labels file {path} must map indices to names, as {{"0": "cat", "1": "dog"}}')
    missing = [str(i) for i in range(len(mapping)) if str(i) not in mapping]
    if missing:
        raise BadSettings(
            f"labels file {path} has {len(mapping)} names but no index {missing[0]!r}; number them from 0 without gaps"
        )
    labels: list[str] = []
    for index in range(len(mapping)):
        name = mapping[str(index)]
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_LABEL_LENGTH:
            raise BadSettings(
                f"labels file {path}: index {index} is named {name!r}; a name is 1 to {MAX_LABEL_LENGTH}"
                " printable characters"
            )
        if name in labels:
            raise BadSettings(
                f"labels file {path}: {labels.index(name)} and {index} are both named {name!r}; rename one"
            )
        labels.append(name)
    return labels


def check_capture(capture: Capture, labels: list[str]) -> None:
    """Raises BadSettings for a class that the model does not know."""
    named = {
        "keep.classes": capture.keep.classes,
        "blur.classes": capture.blur.classes,
        "blur.heads_of": capture.blur.heads_of,
    }
    for key, names in named.items():
        for name in names:
            if name not in labels or name == BACKGROUND:
                known = [label for label in labels if label != BACKGROUND]
                raise BadSettings(
                    f"capture.{key} has {name!r}, which is no class of this model; it knows {', '.join(known[:100])}"
                    + (", ..." if len(known) > 100 else "")
                )


def check_background(labels: list[str], has_background: bool, definition: str) -> None:
    """Raises BadSettings unless label 0 is the background exactly where the model has one."""
    if has_background and labels[0] != BACKGROUND:
        raise BadSettings(f"{definition} counts the background: label 0 must be {BACKGROUND!r}, not {labels[0]!r}")
    if not has_background and BACKGROUND in labels:
        raise BadSettings(f"{definition} has no background class: take {BACKGROUND!r} out of the labels")
