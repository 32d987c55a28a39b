"""What one worker of an archive does, whatever server it works for: the servers' own classes are shells around it.

a server's request -> read -> infer -> respond -> the server's answer
                                          `-> figures, pictures worth keeping
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handlers.baseline import load_baseline
from handlers.capture import open_capture
from handlers.errors import InvalidOption
from handlers.metrics import Figures
from handlers.pipeline import Answer, Job, load_checked
from handlers.response import JSON

logger = logging.getLogger(__name__)


class Worker:
    """An extracted archive, loaded and checked.

    config: the parsed model-config.yaml. name: as the server knows the archive. gpu: the ordinal that the server gives
    this worker. Raises BadSettings or BadArchive, one line that names the cause.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], name: str, gpu: int | None = None):
        self.pipeline = load_checked(folder, config, gpu)
        self.figures = Figures(name, self.pipeline.settings.version, self.pipeline.labels, load_baseline(folder))
        self.capture = open_capture(self.pipeline, config, self.figures.add_captured)

    def read(self, row: Mapping[str, Any], headers: Mapping[str, Any], request_id: str = "") -> Job | Answer:
        """See `Pipeline.read`; where a header asks what the model is, the answer."""
        if headers.get("describe") == "True":
            return Answer(json.dumps(self.pipeline.describe()).encode(), JSON)
        if headers.get("explain") == "True":
            return Job(error=InvalidOption("explanations are not available for detectors; use /predictions"))
        return self.pipeline.read(row, headers, request_id)

    def infer(self, jobs: Sequence[Job]) -> None:
        """Fill in the detections of every picture of the jobs that came together."""
        self.pipeline.infer(jobs)

    def respond(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers to the jobs that came together, in order; and all that is told about them elsewhere."""
        answers = [self.pipeline.respond(job) for job in jobs]
        batch = list(zip(jobs, answers, strict=True))
        # Nothing of this is worth an answer.
        try:
            self.figures.add(batch)
        except Exception:
            logger.exception("a batch is missing from the metrics")
        try:
            if self.capture:
                self.capture.offer(batch)
        except Exception:
            logger.exception("a batch is missing from the pictures kept")
        return answers
