"""How far a pipeline has come: in a file of its folder, written anew after every step."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.pipeline.parameters import Parameters
from tools.strict import Strict, parse, read_yaml

STATE = "pipeline.json"
LOCK = ".lock"


class State(Strict):
    """done: the steps that ended well. failed: the one that did not, and why."""

    parameters: Parameters
    done: tuple[str, ...] = ()
    failed: str | None = None
    reason: str | None = None


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """No other pipeline in the folder, which is made. Gives a file descriptor: whoever inherits it holds the folder,
    so that a step whose runner was killed keeps the next one out.

    Raises ToolError when there is one, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise ToolError(f"{folder} cannot be written ({error.strerror}); name another with --folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolError(
                f"another pipeline runs in {folder}, or a step of one that was killed (`fuser {folder / LOCK}` tells"
                " which process); wait for it, or name another with --folder"
            ) from None
        yield lock.fileno()


def start(folder: Path, parameters: Parameters) -> State:
    """Of a new pipeline. Raises ToolError when the folder holds one, or anything else, which it might overwrite."""
    if (folder / STATE).exists():
        raise ToolError(f"{folder} holds a pipeline; go on with it by --resume, or name another with --folder")
    if any(entry.name != LOCK for entry in folder.iterdir()):
        raise ToolError(f"{folder} is not empty; name another with --folder")
    state = State(parameters=parameters)
    write(folder, state)
    return state


def read(folder: Path, parameters: Parameters) -> State:
    """Of the pipeline in the folder. Raises ToolError when there is none, or it had other parameters."""
    try:
        state = parse(State, read_yaml(folder / STATE, "state"))
    except ValueError as error:
        raise ToolError(f"{folder} holds no pipeline that can go on: {error}") from error
    before, now = state.parameters.model_dump(), parameters.model_dump()
    other = [
        f"{name} was {_shown(before[name])} and is {_shown(now[name])}" for name in now if now[name] != before[name]
    ]
    if other:
        raise ToolError(f"--resume goes on with the same parameters: {'; '.join(other)}")
    return state


def write(folder: Path, state: State) -> None:
    try:
        with replacing(folder / STATE) as file:
            file.write(f"{state.model_dump_json(indent=1)}\n".encode())
    except OSError as error:
        raise ToolError(f"{folder / STATE} cannot be written ({error.strerror})") from error


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)
