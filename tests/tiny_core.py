"""The archives of `tiny_archive` for both engines: a core that asks the same handler as TorchServe does."""

import zipfile
from pathlib import Path
from typing import Any

import tiny_archive

_PIPELINE = """
from typing import NamedTuple


class Job(NamedTuple):
    row: dict
    headers: dict


class Answer(NamedTuple):
    body: bytes
    content_type: str
    status: int
"""

_WORKER = """
import tiny_handler

from handlers.pipeline import Answer, Job


class Figures:
    def report(self, write):
        write(Counted("marina_answers", 0, ("tiny",)))


class Counted:
    def __init__(self, counter, amount, of):
        self.counter, self.amount, self.of = counter, amount, of


class Context:
    def __init__(self, jobs):
        self.jobs, self.types, self.statuses = jobs, {}, {}

    def get_all_request_header(self, index):
        return self.jobs[index].headers

    def set_response_content_type(self, index, content_type):
        self.types[index] = content_type

    def set_response_status(self, code, phrase, idx):
        self.statuses[idx] = code


class Worker:
    def __init__(self, folder, config, name, gpu=None):
        self.figures = Figures()
        tiny_handler.handle(None, None)

    def read(self, row, headers, request_id=""):
        return Job(row, headers)

    def infer(self, jobs):
        self.context = Context(jobs)
        self.bodies = tiny_handler.handle([job.row for job in jobs], self.context)

    def respond(self, jobs):
        types, statuses = self.context.types, self.context.statuses
        return [Answer(b, types.get(i, "text/plain"), statuses.get(i, 200)) for i, b in enumerate(self.bodies)]
"""

_METRICS = """
class Declared:
    dimensions = ("model",)


COUNTERS = {"marina_answers": Declared}
"""

CORE = {
    "__init__": "",
    "lean_import": "def import_torchvision():\n    pass\n",
    "metrics": _METRICS,
    "pipeline": _PIPELINE,
    "worker": _WORKER,
}


def write_archive(path: Path, name: str, **settings: Any) -> Path:
    """As `tiny_archive.write_archive`."""
    tiny_archive.write_archive(path, name, **settings)
    with zipfile.ZipFile(path, "a") as archive:
        for module, text in CORE.items():
            archive.writestr(f"handlers/{module}.py", text)
    return path
