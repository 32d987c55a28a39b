"""Figures that an evaluation must reach."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.errors import ToolError
from tools.evaluate.evaluation import OVERALL, PER_CLASS


class Gate(NamedTuple):
    """name: of a figure, as `Evaluation.values` calls it."""

    name: str
    least: float


def parse_gates(texts: Sequence[str], classes: Sequence[str]) -> list[Gate]:
    """From `map50=0.8` or `f2:CLASS=0.75`. Raises ToolError for an unknown figure or class, or no number above 0
    and up to 1."""
    known = {*OVERALL, *(f"{column}:{name}" for column in PER_CLASS for name in classes)}
    gates = []
    for text in texts:
        name, _, number = text.rpartition("=")
        if name not in known:
            raise ToolError(
                f"--require {text}: give FIGURE=NUMBER; figures are {', '.join(OVERALL)}, and of one class"
                f" {', '.join(f'{column}:CLASS' for column in PER_CLASS)}; classes are {', '.join(classes)}"
            )
        try:
            least = float(number)
        except ValueError:
            least = math.nan
        # At 0 everything passes, a network that finds nothing too.
        if not 0 < least <= 1:
            raise ToolError(f"--require {text}: {number!r} is no number above 0 and up to 1")
        gates.append(Gate(name, least))
    return gates


def failures(gates: Sequence[Gate], values: Mapping[str, float]) -> list[str]:
    """One line for each gate that is not reached; a figure that cannot be said reaches none."""
    return [
        f"{gate.name} is {'unknown: nothing to measure it by' if math.isnan(value) else f'{value:.6g}'},"
        f" but {gate.least:g} is required"
        for gate in gates
        if not (value := values[gate.name]) >= gate.least
    ]
