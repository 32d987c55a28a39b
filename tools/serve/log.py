"""What TorchServe's JVM prints, read: records, the error that stopped a worker, busy workers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

WORKER_OUTPUT = "MODEL_LOG"
_RECORD = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:,]+ \[(?P<level>\w+)\] \[(?P<thread>[^]]*)\] (?P<logger>\S+) - (?P<message>.*)"
)
_WORKER_THREAD = re.compile(r"W-\d+-(?P<key>.+?)(-stdout|-stderr)?")
_IDLE = (".pollBatch(", "ThreadPoolExecutor.getTask(")
_WORKER_PID = re.compile(r"\[PID\](\d+)")

# What TorchServe's part of a worker says at every start.
_GREETING = re.compile(
    r"s_name_part0=.*|Listening on .*|Successfully loaded \S+metrics\.yaml\.|\[PID\]\d+|Torch worker started\."
    r"|Python runtime: .*|Connection accepted: .*|model_name: \S+, batchSize: \d+"
)

# The last line of a Python traceback: a dotted name, then a message or nothing.
_PYTHON_ERROR = re.compile(r"[A-Za-z_][\w.]*(: .*)?")
MESSAGE_LIMIT = 600
# What TorchServe raises on top of the error that matters.
_ECHOES = (
    re.compile(r"RuntimeError: (500 - Unknown exception|507 - System out of memory)"),
    re.compile(r"ModuleNotFoundError: No module named 'ts\.torch_handler\..*"),
)
_JAVA_ERROR = re.compile(r"(Caused by: )?([a-z][\w$]*\.)+[A-Z][\w$]*(Exception|Error)\b.*|Invalid configuration: .*")

# A worker is gone, or never came up: the logger's class and the start of its message.
_WORKER_FAILURES = (
    (WORKER_OUTPUT, "Backend worker process died."),
    ("org.pytorch.serve.wlm.BatchAggregator", "Load model failed: "),
    ("org.pytorch.serve.wlm.WorkerThread", "Backend worker error"),
    ("org.pytorch.serve.wlm.WorkerThread", "Backend worker thread exception."),
)
_MODEL_FAILURE = ("org.pytorch.serve.ModelServer", "Failed to load model: ")


@dataclass(frozen=True)
class Record:
    """One record of the log. worker: `<model>_<version>` where a worker or its thread wrote it, else None."""

    level: str
    logger: str
    message: str
    worker: str | None

    @property
    def from_worker(self) -> bool:
        """The worker process printed it, not TorchServe about the worker."""
        return self.logger == WORKER_OUTPUT

    @property
    def is_greeting(self) -> bool:
        """TorchServe's own lines of a worker that starts, which tell nothing new."""
        return self.from_worker and bool(_GREETING.fullmatch(self.message))

    @property
    def pid(self) -> int | None:
        """The worker process that has just started, where this says so."""
        found = _WORKER_PID.fullmatch(self.message) if self.from_worker else None
        return int(found[1]) if found else None

    @property
    def worker_failed(self) -> bool:
        return any(self.logger == logger and self.message.startswith(text) for logger, text in _WORKER_FAILURES)

    @property
    def unloadable_file(self) -> str | None:
        """The file that TorchServe could not register, where this says so."""
        logger, text = _MODEL_FAILURE
        return self.message.removeprefix(text) if self.logger == logger and self.message.startswith(text) else None


def parse(line: str) -> Record | None:
    """A record as tools.serve.config.LOG4J prints it; None for the lines of a Java stack trace or thread dump."""
    found = _RECORD.fullmatch(line)
    if not found:
        return None
    thread = _WORKER_THREAD.fullmatch(found["thread"])
    return Record(found["level"], found["logger"], found["message"], thread["key"] if thread else None)


def python_error(lines: Iterable[str]) -> str | None:
    """The exception that stopped a worker, in one line: the last that its tracebacks end in, echoes apart."""
    errors: list[str] = []
    state = "outside"
    for line in lines:
        indented = line[:1].isspace()
        if line.startswith("Traceback (most recent call last):"):
            state = "frames"
        elif state == "frames" and line and not indented:
            state = "message" if _PYTHON_ERROR.fullmatch(line) else "outside"
            errors += [line] if state == "message" else []
        elif state == "message" and indented:
            # torch lists the keys that do not fit in lines of their own.
            errors[-1] = f"{errors[-1]} {line.strip()}"
        elif state == "message":
            state = "outside"
    telling = [error for error in errors if not any(echo.fullmatch(error) for echo in _ECHOES)]
    return next((error[:MESSAGE_LIMIT] for error in reversed(telling or errors)), None)


def java_error(lines: Iterable[str]) -> str | None:
    """The innermost exception among lines that the JVM printed, or its word on the configuration."""
    found = [line.removeprefix("Caused by: ") for line in lines if _JAVA_ERROR.fullmatch(line)]
    return found[-1] if found else None


def busy_workers(dump: Iterable[str]) -> int:
    """How many workers have a request under way, in a thread dump of the JVM.

    A worker's thread waits in Model.pollBatch for the next request, or, where its version was removed, in a pool for
    another task; anywhere else it is sending a request, or waiting for its answer.
    """
    busy = 0
    for stack in "\n".join(dump).split("\n\n"):
        name = re.search(r'^"([^"]*)"', stack, re.MULTILINE)
        thread = _WORKER_THREAD.fullmatch(name[1]) if name else None
        if thread and thread[2] is None and not any(place in stack for place in _IDLE):
            busy += 1
    return busy
