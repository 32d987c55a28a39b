"""Whether a run may be pushed: by the very evidence that the store will record with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from tools.errors import ToolError
from tools.store.contents import read_contents
from tools.store.evidence import read_evidence
from tools.store.manifest import Evidence


def check_gate(run: Path, evaluation: Path, require: str) -> Evidence:
    """require: gates with commas between. Raises ToolError when one is not passed, or says nothing."""
    evidence = read_evidence(evaluation, require.split(","), read_contents(run, None))
    if evidence.failed():
        raise ToolError(f"the gate is not passed: {evidence.line()}")
    return evidence


def check_live(evaluation: Path, live: Path, drop: float) -> str:
    """Whether the new model is as good as the one that serves now, on the classes that the latter finds, in one line.

    evaluation, live: folders that `marina evaluate --output` wrote, of the same pictures. Raises ToolError when its
    mAP50 is lower by more than `drop`, or they are not of the same pictures.
    """
    (data, now), (data_of_live, before) = _figures(evaluation), _figures(live)
    if data != data_of_live:
        raise ToolError(f"{evaluation} and {live} are not of the same pictures; evaluate both on one data set")
    known = [name for name, value in before.items() if value]
    if not known:
        return "the model that serves now finds nothing on these pictures"
    is_now, was = (mean(figures[name] or 0.0 for name in known) for figures in (now, before))
    line = f"mAP50 of {', '.join(known)} is {is_now:.4g}, {was:.4g} with the model that serves now"
    if is_now < was - drop:
        raise ToolError(f"the gate is not passed: {line}; it may be {drop:g} lower")
    return line


def _figures(folder: Path) -> tuple[str, Mapping[str, float | None]]:
    """What tells the pictures from others; the AP50 of each class."""
    from tools.evaluate.evaluation import RESULT

    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return str(content["data"]["digest"]), {str(each["name"]): each["ap50"] for each in content["per_class"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolError(
            f"{folder} holds no evaluation ({error!r}); `marina evaluate … --output DIR` writes one"
        ) from error
