"""What an evaluation says of what is pushed, and the gates that it is held to."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.errors import ToolError
from tools.store.contents import Contents
from tools.store.manifest import GATED, Evidence, GateResult


def read_evidence(path: Path, require: Sequence[str], contents: Contents) -> Evidence:
    """path: the evaluation.json that `marina evaluate --output` wrote, or its folder. require: as --require there.

    Raises ToolError: it is no such file, a gate cannot be read, or another archive was evaluated.
    """
    from tools.evaluate.evaluation import OVERALL, PER_CLASS, RESULT
    from tools.evaluate.gates import failures, parse_gates

    if contents.kind not in GATED:
        raise ToolError(f"--evaluation: {contents.kind} are not evaluated; leave it out")
    path = path / RESULT if path.is_dir() else path
    content, digest = _read(path)
    try:
        model, data = str(content["model"]), content["data"]
        classes = [str(each["name"]) for each in content["per_class"]]
        figures = {name: content["overall"][name] for name in OVERALL}
        figures |= {f"{column}:{each['name']}": each[column] for each in content["per_class"] for column in PER_CLASS}
        values = {name: math.nan if value is None else float(value) for name, value in figures.items()}
        split, pictures = str(data["split"]), int(data["pictures"])
    except (KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{path} is no evaluation ({error!r}); `marina evaluate … --output DIR` writes one") from error
    evaluated = f"{contents.name} {contents.version}"
    if contents.kind == "archives" and model != evaluated:
        raise ToolError(f"{path} is about {model!r}, not about {evaluated!r}; evaluate the .mar that is pushed")
    gates = parse_gates(require, classes)
    results = [
        GateResult(
            name=gate.name,
            least=gate.least,
            value=None if math.isnan(values[gate.name]) else values[gate.name],
            passed=not failures([gate], values),
        )
        for gate in gates
    ]
    return Evidence(sha256=digest, model=model, split=split, pictures=pictures, figures=figures, gates=results)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise ToolError(f"evaluation {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ToolError(
            f"evaluation {path} is no JSON ({error}); `marina evaluate … --output DIR` writes one"
        ) from error
    return content, hashlib.sha256(raw).hexdigest()
