"""The search itself: stage after stage, as long as the budget lasts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tools.bench.table import table
from tools.bench.usage import COLUMNS, columns
from tools.progress import Progress
from tools.tune.objective import Slo, keeps, rank
from tools.tune.record import Trial
from tools.tune.space import Setting, Space


@dataclass
class Outcome:
    """trials: those that the search came to, whether measured now or before. left_out: for which no time was left."""

    slos: Sequence[Slo]
    trials: list[Trial] = field(default_factory=list)
    left_out: list[Setting] = field(default_factory=list)

    def ranked(self) -> list[Trial]:
        """Without the failures, the best first."""
        done = [(rank(trial.measured.load, self.slos), trial) for trial in self.trials if trial.measured]
        return [trial for _, trial in sorted(done, key=lambda item: item[0])]

    def winner(self) -> Trial | None:
        """The best, if it keeps the SLOs."""
        best = next(iter(self.ranked()), None)
        return best if best and best.measured and keeps(best.measured.load, self.slos) else None

    def as_table(self) -> str:
        winner = self.winner()
        header = ["  setting", "images/s", "p50 ms", "p90", "p99", "SLO", *COLUMNS]
        rows = [self._cells(trial, "*" if trial is winner else " ") for trial in self.ranked()]
        rows += [[f"  {trial.setting}", f"FAILED: {trial.failure}"] for trial in self.trials if trial.failure]
        return "\n".join(table(header, rows))

    def _cells(self, trial: Trial, mark: str) -> list[str]:
        assert trial.measured
        load = trial.measured.load
        return [
            f"{mark} {trial.setting}",
            f"{load.images_per_s:.2f}",
            *(f"{value:.1f}" for value in (load.p50_ms, load.p90_ms, load.p99_ms)),
            "kept" if keeps(load, self.slos) else "missed",
            *columns(trial.measured.usage, load.seconds, load.requests),
        ]


def search(
    space: Space,
    slos: Sequence[Slo],
    before: Mapping[Setting, Trial],
    measure: Callable[[Setting], Trial],
    keep: Callable[[Trial], None],
    budget_s: float,
) -> Outcome:
    """Every stage of the space. before: trials that need not be made again. keep: called with each that was made.

    The first trial always begins, another one only if the mean of those known still fits into the budget.
    """
    outcome = Outcome(slos)
    known = dict(before)
    spent = 0.0
    for name, propose in space.stages.items():
        settings = propose([trial.setting for trial in outcome.ranked()])
        with Progress(f"tuning, {name}", len(settings), unit="trials") as progress:
            progress.show()
            for setting in settings:
                if setting not in known:
                    mean = sum(trial.seconds for trial in known.values()) / max(1, len(known))
                    if known and spent + mean > budget_s:
                        outcome.left_out.append(setting)
                        continue
                    known[setting] = measure(setting)
                    spent += known[setting].seconds
                    keep(known[setting])
                outcome.trials.append(known[setting])
                progress.advance()
    return outcome
