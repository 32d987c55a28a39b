"""One round: what was annotated since the last one becomes part of the data set, and a pipeline trains on it.

In the folder of a loop:

    labelled/        all that was annotated, as `marina label pull` leaves it
    base/ID/         the data set that it is added to
    data/            both, as they were pushed
    rounds/ID/       the last pipeline, of the data set with that id
    judged           what the last pipeline that came to its gate was asked
"""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from handlers.errors import MarinaError
from tools.checkpoint.safetensors_format import replacing
from tools.data.dataset import INFO
from tools.data.prepare import PrepareSettings, prepare
from tools.errors import ToolError
from tools.labelstudio.client import LabelStudio
from tools.labelstudio.pull import pull
from tools.pipeline.parameters import Parameters
from tools.pipeline.run import run_pipeline
from tools.pipeline.state import State, alone
from tools.store.store import Store

SUFFIX = "-labelled"  # of the data set that is pushed


class Loop:
    """parameters: of the pipeline; `dataset` is what is added to. project: in Label Studio. folder: to work in."""

    def __init__(self, parameters: Parameters, project: str, folder: Path):
        self._parameters = parameters
        self._project = project
        self._folder = folder
        if parameters.s3_endpoint:
            # As the step scripts do.
            os.environ["AWS_ENDPOINT_URL"] = parameters.s3_endpoint

    def go_round(self, studio: LabelStudio) -> None:
        """Does nothing where all is as in the last round that came to its gate. Raises ToolError where a
        step fails, the gate too."""
        with alone(self._folder):
            pulled = pull(studio, self._project, self._folder / "labelled")
            _tell(f"annotations: {pulled.added} added, {pulled.changed} changed, {pulled.removed} removed")
            store = Store(self._parameters.store)
            judged = self._folder / "judged"
            if judged.is_file() and judged.read_text(encoding="ascii").strip() == self._question(store):
                _tell("neither annotations, nor parameters, nor the live model have changed since the last round")
                return
            state = self._train(store)
            # The same would come to the same gate with the same figures.
            if state.failed in (None, "gate"):
                with replacing(judged) as file:
                    # After a promotion with another live model than before.
                    file.write(f"{self._question(store)}\n".encode())
            if state.failed:
                raise ToolError(f"step {state.failed} failed: {state.reason}")

    @property
    def _live(self) -> str:
        return self._parameters.live or f"{self._parameters.model_name}@production"

    def _question(self, store: Store) -> str:
        """What a round answers, as a digest."""
        base, live = store.find(self._parameters.dataset, "datasets"), store.find(self._live, "runs")
        asked = [_digest(self._folder / "labelled"), base.id, live.id, self._parameters.model_dump_json()]
        return hashlib.sha256("\n".join(asked).encode()).hexdigest()

    def _train(self, store: Store) -> State:
        data, rounds = self._folder / "data", self._folder / "rounds"
        prepare(PrepareSettings(source=[self._base(store), self._folder / "labelled"], output=data, replace=True))
        pushed = store.push(data, f"{self._parameters.model_name}{SUFFIX}")
        _tell(f"data set: {pushed}")
        parameters = self._parameters.model_copy(update={"dataset": pushed.id, "live": self._live, "demo_pictures": 0})
        # What an earlier round has made that is of use lies in the store.
        shutil.rmtree(rounds, ignore_errors=True)
        return run_pipeline(parameters, rounds / pushed.id, resume=False)

    def _base(self, store: Store) -> Path:
        """The data set that is added to."""
        manifest = store.find(self._parameters.dataset, "datasets")
        folder = self._folder / "base" / manifest.id
        if manifest.folder and not folder.is_dir():
            store.pull(manifest, folder)
        # Its splits must be there: drawn anew, what was trained on could be evaluated on.
        if not (folder / INFO).is_file():
            raise ToolError(f"{manifest} is not prepared; push what `marina data prepare` makes, and name that")
        return folder


def again_and_again(go_round: Callable[[], None], pause_s: float) -> None:
    """Never returns; what fails is told."""
    while True:
        _tell(f"round of {_clock(datetime.now().astimezone())}")
        try:
            go_round()
        except MarinaError as error:
            print(f"marina: {error}", file=sys.stderr, flush=True)
        _tell(f"the next round begins at {_clock(datetime.now().astimezone() + timedelta(seconds=pause_s))}")
        time.sleep(pause_s)


def _clock(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S %Z}"


def _digest(labelled: Path) -> str:
    """Of the data set's annotations, which name its pictures."""
    digest = hashlib.sha256()
    for path in sorted(labelled.glob("*/*.json")):
        digest.update(path.relative_to(labelled).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _tell(line: str) -> None:
    print(f"== {line}", flush=True)
