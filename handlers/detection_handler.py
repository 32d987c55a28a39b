"""The entry module of an archive: TorchServe on one side, our pipeline on the other."""

import json
import time
from pathlib import Path
from typing import Any

from handlers.lean_import import import_torchvision, lean_vision_handler

# Before all that imports torchvision the slow way; hence the imports that stand late (E402).
import_torchvision()
with lean_vision_handler():
    from ts.torch_handler.vision_handler import VisionHandler

from handlers.errors import InvalidOption  # noqa: E402  # see above
from handlers.pipeline import Answer, Job, load_checked  # noqa: E402  # see above
from handlers.response import JSON, error_answer  # noqa: E402  # see above


class DetectionHandler(VisionHandler):
    """Detection for TorchServe. Every item of a batch gets its own answer and status."""

    def initialize(self, context: Any) -> None:
        """Called once a worker. Raises MarinaError, which TorchServe logs, and the worker stops."""
        properties = context.system_properties
        self.context = context
        self.manifest = context.manifest
        self.pipeline = load_checked(
            Path(properties["model_dir"]), context.model_yaml_config or {}, properties.get("gpu_id")
        )
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """The inherited one lets the headers `explain` and `describe` of a batch's first item decide for all."""
        start = time.perf_counter()
        answers = self.postprocess(self.inference(self.preprocess(data, context)))
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
            if answer.status != 200:
                context.set_response_status(answer.status, answer.phrase, index)
        context.metrics.add_time("HandlerTime", round((time.perf_counter() - start) * 1000, 2), None, "ms")
        return [answer.body for answer in answers]

    def preprocess(self, data: list[dict[str, Any]], context: Any) -> list[Job | Answer]:
        return [
            self._read(row, context.get_all_request_header(index) or {}, context.get_request_id(index) or "")
            for index, row in enumerate(data)
        ]

    def _read(self, row: dict[str, Any], headers: dict[str, Any], request_id: str) -> Job | Answer:
        if headers.get("describe") == "True":
            return Answer(json.dumps(self.pipeline.describe()).encode(), JSON)
        if headers.get("explain") == "True":
            error = InvalidOption("explanations are not available for detectors; use /predictions")
            return Answer(*error_answer(error), error.status, error.phrase)
        return self.pipeline.read(row, headers, request_id)

    def inference(self, data: list[Job | Answer]) -> list[Job | Answer]:
        self.pipeline.infer([job for job in data if isinstance(job, Job)])
        return data

    def postprocess(self, data: list[Job | Answer]) -> list[Answer]:
        return [self.pipeline.respond(job) if isinstance(job, Job) else job for job in data]
