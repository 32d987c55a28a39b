"""The steps, in order: which script, which parameters it sees, what it needs."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tools.pipeline.parameters import HERE_ONLY, Parameters, as_text, variable

SOURCE = Path(__file__).resolve().parent.parent.parent / "docker" / "tekton" / "steps"
# Where a wheel puts them, as pyproject.toml says.
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "marina" / "steps"
SCRIPTS = SOURCE if SOURCE.is_dir() else INSTALLED
STORE = ("store", "s3_endpoint")
EVERYTHING = tuple(Parameters.model_fields)


class Step(NamedTuple):
    """sees: parameters in its environment. store: it needs the store's credentials. heavy: it runs a network."""

    name: str
    sees: tuple[str, ...] = ()
    store: bool = False
    heavy: bool = False

    @property
    def script(self) -> Path:
        return SCRIPTS / f"{self.name}.sh"

    def environment(self, parameters: Parameters) -> dict[str, str]:
        return {variable(name): as_text(getattr(parameters, name)) for name in self.sees}


NETWORK = ("definition", "model_size", "weights", "epochs", "batch", "size", "patience", "seed")
STEPS = (
    Step("fetch", EVERYTHING, store=True),
    Step("prepare", ("max_side", "split", "seed")),
    Step("wait-for-gpu", ("device", "gpu_timeout")),
    Step("choose-device", ("device", "gpu_timeout", "epochs")),
    Step("train", ("model_name", "license", "live", *NETWORK), heavy=True),
    Step("evaluate", ("live",), heavy=True),
    Step("gate", ("require", "live", "live_drop")),
    Step("export", ("backend",), heavy=True),
    Step("archive", heavy=True),
    Step("push", (*STORE, "model_name", "require"), store=True),
    Step("deploy", (*STORE, "deploy", *HERE_ONLY), store=True),
)
SUMMARY = Step("summary", EVERYTHING)
STATUSES = "MARINA_STATUSES"  # of the steps, for the summary


def statuses(done: Iterable[str], failed: str | None) -> str:
    """As Tekton calls them, for the summary: `fetch=Succeeded train=Failed gate=None`."""
    finished = set(done)
    return " ".join(
        f"{step.name}={'Succeeded' if step.name in finished else 'Failed' if step.name == failed else 'None'}"
        for step in STEPS
    )
