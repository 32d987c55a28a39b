"""`marina archive build` beside `torch-model-archiver`, on the same files, in turns."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.archive.recipe import Recipe, load_recipe
from tools.archive.sources import find_weights, sha256_of
from tools.errors import ToolError

ARCHIVER = "torch-model-archiver"
MB = 1_000_000
# What a build may take beyond the weights and an imported torch.
ALLOWANCE = 300 * MB
# Ended at once, as our process that runs the archive: in the course of an orderly end torch takes 130 MB more.
IMPORT_TORCH = "import os, torch; os._exit(0)"
# Starts a command and counts what it and all that it waits for take. A process of its own, since Linux begins
# a child's peak with the memory of the one that starts it.
LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass(frozen=True)
class Cost:
    """seconds: of the clock. cpu_seconds: user and system, of all processes together. peak: bytes of the
    largest of its processes."""

    seconds: float
    cpu_seconds: float
    peak: int


@dataclass(frozen=True)
class BuildReport:
    """A cost of each round. weights: bytes of the file. ratio: medians of the clock, ours by theirs."""

    recipe: str
    weights: int
    marina: list[dict[str, float]]
    archiver: list[dict[str, float]]
    import_torch: list[dict[str, float]]
    ratio: float
    cpu_ratio: float
    beyond_import: int
    allowed: int

    def as_table(self) -> str:
        lines = [
            f"{self.recipe}, weights of {self.weights / MB:.0f} MB",
            f"{'round':<8}{'marina':>9}{'(CPU)':>9}{ARCHIVER:>23}{'(CPU)':>9}{'ratio':>8}{'(CPU)':>9}  s",
        ]
        rows = [*zip(self.marina, self.archiver, strict=True), (_median(self.marina), _median(self.archiver))]
        for number, (ours, theirs) in enumerate(rows, start=1):
            name = str(number) if number < len(rows) else "median"
            lines.append(
                f"{name:<8}{ours['seconds']:>9.2f}{ours['cpu_seconds']:>9.2f}"
                f"{theirs['seconds']:>23.2f}{theirs['cpu_seconds']:>9.2f}"
                f"{ours['seconds'] / theirs['seconds']:>8.2f}{ours['cpu_seconds'] / theirs['cpu_seconds']:>9.2f}"
            )
        peak, torch = _peak(self.marina), _peak(self.import_torch)
        lines.append(
            f"peak memory {peak / MB:.0f} MB, of import torch alone {torch / MB:.0f} MB:"
            f" {self.beyond_import / MB:.0f} MB beyond, {self.allowed / MB:.0f} MB allowed"
            f" (weights + {ALLOWANCE / MB:.0f} MB)"
        )
        return "\n".join(lines)


def bench_build(path: Path, weights: Path | None, rounds: int) -> BuildReport:
    """Build a recipe `rounds` times with each tool. Raises MarinaError with one line."""
    recipe = load_recipe(path)
    source = find_weights(recipe, weights)
    archiver = shutil.which(ARCHIVER, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if archiver is None:
        raise ToolError(f"{ARCHIVER} is not installed, so there is nothing to compare with; pip install {ARCHIVER}")
    # The warm-up: weights and libraries come from memory in every round.
    sha256_of(source)
    measure([sys.executable, "-c", IMPORT_TORCH])
    costs: dict[str, list[dict[str, float]]] = {"marina": [], "archiver": [], "import_torch": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="marina-") as folder:
            costs["marina"].append(asdict(measure(_build_command(recipe, source, Path(folder)), folder)))
        with tempfile.TemporaryDirectory(prefix="marina-") as folder:
            costs["archiver"].append(asdict(measure(_archiver_command(archiver, recipe, source, folder), folder)))
        costs["import_torch"].append(asdict(measure([sys.executable, "-c", IMPORT_TORCH])))
    ours, theirs = _median(costs["marina"]), _median(costs["archiver"])
    size = source.stat().st_size
    return BuildReport(
        recipe=recipe.name,
        weights=size,
        **costs,
        ratio=round(ours["seconds"] / theirs["seconds"], 3),
        cpu_ratio=round(ours["cpu_seconds"] / theirs["cpu_seconds"], 3),
        beyond_import=_peak(costs["marina"]) - _peak(costs["import_torch"]),
        allowed=size + ALLOWANCE,
    )


def _build_command(recipe: Recipe, source: Path, folder: Path) -> list[str]:
    arguments = [str(recipe.path), "--weights", str(source), "--output", str(folder / f"{recipe.name}.mar")]
    return [sys.executable, "-m", "tools.cli", "archive", "build", *arguments]


def _archiver_command(archiver: str, recipe: Recipe, source: Path, folder: str) -> list[str]:
    options = {
        "model-name": recipe.name,
        "version": recipe.version,
        "serialized-file": str(source),
        "handler": "object_detector",
        "extra-files": str(recipe.beside(recipe.labels)),
        "export-path": folder,
    }
    return [archiver, *(part for name, value in options.items() for part in (f"--{name}", value))]


def measure(command: Sequence[str], scratch: str | None = None) -> Cost:
    """Run a command to its end. scratch: its folder for temporary files. Raises ToolError when it fails."""
    environment = os.environ | ({"TMPDIR": scratch} if scratch else {})
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command], capture_output=True, env=environment, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ToolError(f"{Path(command[0]).name} failed with exit code {done.returncode}: {last}")
    seconds, cpu_seconds, peak = json.loads(done.stdout)
    return Cost(round(seconds, 3), round(cpu_seconds, 3), peak * 1024)


def _median(costs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(cost[key] for cost in costs) for key in costs[0]}


def _peak(costs: list[dict[str, float]]) -> int:
    return int(max(cost["peak"] for cost in costs))
