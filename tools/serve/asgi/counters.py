"""The figures of all workers, added up, as Prometheus reads them: names and labels as TorchServe has them."""

import re
import socket
from collections import defaultdict
from collections.abc import Mapping

HOSTNAME = socket.gethostname()
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SPECIAL = re.compile(r'[\\"\n]')


class Counters:
    """To be used by one thread."""

    def __init__(self) -> None:
        self._values: defaultdict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        series = self._values[name]
        key = tuple(labels.items())
        series[key] = series.get(key, 0) + amount

    def text(self) -> str:
        """In Prometheus' text format, version 0.0.4."""
        lines = []
        for name, series in self._values.items():
            lines.append(f"# TYPE {name} counter")
            for labels, value in series.items():
                inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
                lines.append(f"{name}{{{inside}}} {value}")
        return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: "\\n" if found[0] == "\n" else f"\\{found[0]}", text)
