"""Runs the step scripts on this machine, one after the other."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tools.errors import ToolError
from tools.pipeline import state as progress
from tools.pipeline.parameters import PREFIX, Parameters
from tools.pipeline.state import State
from tools.pipeline.steps import STATUSES, STEPS, SUMMARY, Step, statuses

LOGS = "logs"


class Ended(NamedTuple):
    """code: of the script. last: the last line that it said."""

    code: int
    last: str


def run_pipeline(parameters: Parameters, folder: Path, resume: bool) -> State:
    """Run all steps in the folder, those that are done already left out, and say how it went.

    The first step that fails is the last; state `failed` and `reason` then tell of it. Raises ToolError when nothing
    can be run: the folder is taken, or holds another pipeline.
    """
    if not SUMMARY.script.is_file():
        raise ToolError(f"{SUMMARY.script} is not there, though it belongs to Marina; install it again")
    with progress.alone(folder) as lock, _ended_by_signals():
        state = progress.read(folder, parameters) if resume else progress.start(folder, parameters)
        state = state.model_copy(update={"failed": None, "reason": None})
        runner = _Runner(folder, parameters, lock)
        for step in STEPS:
            if step.name in state.done:
                _tell(f"{step.name}: done before")
                continue
            _tell(f"{step.name}: begins")
            ended = runner.execute(step, {})
            if ended.code:
                state = state.model_copy(update={"failed": step.name, "reason": ended.last})
            else:
                state = state.model_copy(update={"done": (*state.done, step.name)})
            progress.write(folder, state)
            if ended.code:
                break
        runner.execute(SUMMARY, {STATUSES: statuses(state.done, state.failed)})
    return state


class _Runner:
    def __init__(self, folder: Path, parameters: Parameters, lock: int):
        self.folder = folder
        self.parameters = parameters
        self.lock = lock
        (folder / LOGS).mkdir(exist_ok=True)
        # Parameters are seen by the steps that name them, here as in a cluster.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        # `marina` and `python` are those that run this.
        path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        self.environment = inherited | {"PATH": path, "PYTHONUNBUFFERED": "1"}

    def execute(self, step: Step, more: dict[str, str]) -> Ended:
        """Run one script; what it says goes to the terminal and to its log."""
        environment = self.environment | step.environment(self.parameters) | more
        last = ""
        with (
            (self.folder / LOGS / f"{step.name}.log").open("w", encoding="utf-8") as log,
            _process(["sh", str(step.script)], self.folder, environment, self.lock) as process,
        ):
            assert process.stdout is not None  # for mypy: it is a pipe
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
                last = line.strip() or last
        return Ended(process.wait(), last or f"exit code {process.returncode}, without a word")


@contextmanager
def _process(
    command: list[str], folder: Path, environment: dict[str, str], lock: int
) -> Iterator[subprocess.Popen[str]]:
    """In a process group of its own, which does not outlive the block."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        yield process
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the steps as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(line: str) -> None:
    print(f"== {line}", flush=True)
