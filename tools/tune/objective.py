"""What is best: the most images/s among those that keep the latencies asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.load import Load
from tools.errors import ToolError

SLO = re.compile(r"(p50|p90|p99)=(\d+(?:\.\d+)?)ms")
BUDGET = re.compile(r"(\d+(?:\.\d+)?)([smh])")
SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Slo:
    """A latency that may not be passed (service level objective). percentile: p50, p90 or p99."""

    percentile: str
    limit_ms: float

    def __str__(self) -> str:
        return f"{self.percentile}={self.limit_ms:g}ms"

    def latency_ms(self, load: Load) -> float:
        """The one that it is about."""
        return float(getattr(load, f"{self.percentile}_ms"))


def parse_slo(text: str) -> Slo:
    """Raises ToolError for what is not of the form `p99=150ms`."""
    match = SLO.fullmatch(text)
    if not match or not float(match[2]):
        raise ToolError(f"--slo is {text!r}; write p50, p90 or p99 and milliseconds above 0, as in p99=150ms")
    return Slo(match[1], float(match[2]))


def parse_budget(text: str) -> float:
    """Seconds. Raises ToolError for what is not of the form `20m`."""
    match = BUDGET.fullmatch(text)
    if not match or not float(match[1]):
        raise ToolError(f"--budget is {text!r}; write a time above 0 in s, m or h, as in 90s, 20m or 1.5h")
    return float(match[1]) * SECONDS[match[2]]


def keeps(load: Load, slos: Sequence[Slo]) -> bool:
    return all(slo.latency_ms(load) <= slo.limit_ms for slo in slos)


def rank(load: Load, slos: Sequence[Slo]) -> tuple[bool, float]:
    """To sort by, the best first: the fastest of those that keep the SLOs, then the others by how far they miss one."""
    if keeps(load, slos):
        return False, -load.images_per_s
    return True, max(slo.latency_ms(load) / slo.limit_ms for slo in slos)
