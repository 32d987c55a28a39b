"""The entry module of an archive: TorchServe on one side, our worker on the other."""

from pathlib import Path
from typing import Any

from handlers.lean_import import import_torchvision, lean_vision_handler

# Before all that imports torchvision the slow way; hence the imports that stand late (E402).
import_torchvision()
with lean_vision_handler():
    from ts.metrics.metric_cache_errors import MetricsCacheKeyError
    from ts.torch_handler.vision_handler import VisionHandler

from handlers.metrics import COUNTERS, Increase  # noqa: E402  # see above
from handlers.pipeline import Answer, Job  # noqa: E402  # see above
from handlers.worker import Worker  # noqa: E402  # see above


class DetectionHandler(VisionHandler):
    """Detection for TorchServe. Every item of a batch gets its own answer and status."""

    def initialize(self, context: Any) -> None:
        """Called once a worker. Raises MarinaError, which TorchServe logs, and the worker stops."""
        properties = context.system_properties
        self.context = context
        self.manifest = context.manifest
        folder, config = Path(properties["model_dir"]), context.model_yaml_config or {}
        self.worker = Worker(folder, config, context.model_name, properties.get("gpu_id"))
        self._report_to(context.metrics)
        self.initialized = True

    def _report_to(self, metrics: Any) -> None:
        """Reports the figures that the server's metrics.yaml declares as we do; TorchServe would log a line for each
        of the others, every time."""
        counters = {}
        for name, declared in COUNTERS.items():
            try:
                counter = metrics.get_metric(name)
            except MetricsCacheKeyError:
                continue
            if counter.dimension_names == list(declared.dimensions):
                counters[name] = counter

        def write(increase: Increase) -> None:
            if increase.counter in counters:
                # By way of logging, so that the line is never mixed with another.
                counters[increase.counter].add_or_update(increase.amount, list(increase.of))

        if counters:
            self.worker.figures.report(write)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """The inherited one lets the headers `explain` and `describe` of a batch's first item decide for all."""
        answers = self.postprocess(self.inference(self.preprocess(data, context)))
        for index, answer in enumerate(answers):
            context.set_response_content_type(index, answer.content_type)
            if answer.status != 200:
                context.set_response_status(answer.status, answer.phrase, index)
        return [answer.body for answer in answers]

    def preprocess(self, data: list[dict[str, Any]], context: Any) -> list[Job | Answer]:
        return [
            self.worker.read(row, context.get_all_request_header(index) or {}, context.get_request_id(index) or "")
            for index, row in enumerate(data)
        ]

    def inference(self, data: list[Job | Answer]) -> list[Job | Answer]:
        self.worker.infer([job for job in data if isinstance(job, Job)])
        return data

    def postprocess(self, data: list[Job | Answer]) -> list[Answer]:
        answers = iter(self.worker.respond([job for job in data if isinstance(job, Job)]))
        return [next(answers) if isinstance(job, Job) else job for job in data]
