"""What the handler adds to the forward pass, measured on the pipeline that serves: request in, answer out."""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.archive.reader import open_archive
from tools.bench.pictures import described, given_pictures, golden_picture
from tools.errors import ToolError

if TYPE_CHECKING:
    from handlers.pipeline import Pipeline

FORWARD = "forward pass"
# The stages of a request in their order. Where the pipeline times one itself, its name there.
STAGES = {
    "read form and options": None,
    "decode": "decode",
    "letterbox": "preprocess",
    "batch, to float": None,
    FORWARD: None,
    "select, undo letterbox": "postprocess",
    "answer": None,
}
OVERHEAD = f"all but the {FORWARD}"


@dataclass(frozen=True)
class HandlerReport:
    """milliseconds: stage to median and p90 of `runs` requests, one after the other, after a warm-up."""

    archive: str
    picture: str
    device: str
    threads: int
    runs: int
    milliseconds: dict[str, dict[str, float]]

    def as_table(self) -> str:
        lines = [
            f"{self.archive}, {self.picture}",
            f"{self.runs} runs, {self.threads} thread(s) on as many cores, {self.device}",
            f"{'stage':<26}{'median':>10}{'p90':>10}  ms",
        ]
        lines += [
            f"{stage:<26}{values['median']:>10.3f}{values['p90']:>10.3f}" for stage, values in self.milliseconds.items()
        ]
        return "\n".join(lines)


def bench_handler(path: Path, image: Path | None, runs: int, threads: int) -> HandlerReport:
    """Load a .mar as TorchServe would and time requests with one picture, on `threads` cores.

    image: the picture, as its bytes are; without one, the first golden picture as a JPEG of 640x480 pixels.
    Raises ToolError or BadArchive with one line.
    """
    with open_archive(path) as archive, tempfile.TemporaryDirectory(prefix="marina-") as folder, _cores(threads):
        body = golden_picture(archive) if image is None else given_pictures([image])[0]
        archive.extract(Path(folder))
        samples, device = _measure(Path(folder), archive.config, body, runs, threads)
        name = f"{archive.name} {archive.version}"
    return HandlerReport(
        name, described(body), device, threads, runs, {stage: _summary(samples[stage]) for stage in samples}
    )


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """This process on `count` of its cores."""
    allowed = os.sched_getaffinity(0)
    if count > len(allowed):
        raise ToolError(f"--threads is {count}, but only {len(allowed)} cores may be used")
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _measure(
    folder: Path, config: dict[str, Any], body: bytes, runs: int, threads: int
) -> tuple[dict[str, list[float]], str]:
    """Stage to milliseconds of each run, and the device."""
    from handlers.lean_import import import_torchvision

    import_torchvision()
    import torch

    from handlers.pipeline import Pipeline

    previous = torch.get_num_threads()
    try:
        pipeline = Pipeline.load(folder, config)
        torch.set_num_threads(threads)
        forward = _timed_candidates(pipeline)
        for _ in range(max(3, runs // 10)):
            _request(pipeline, body, forward)
        samples: dict[str, list[float]] = defaultdict(list)
        for _ in range(runs):
            for stage, value in _request(pipeline, body, forward).items():
                samples[stage].append(value)
    finally:
        torch.set_num_threads(previous)
    return samples, str(pipeline.device)


def _timed_candidates(pipeline: "Pipeline") -> Callable[[], float]:
    """Put a clock around the network; the function that comes back gives the milliseconds of its last call."""
    import torch

    candidates, last = pipeline.network.candidates, 0.0

    def timed(*args: Any) -> Any:
        nonlocal last
        start = _now()
        found = candidates(*args)
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        last = _now() - start
        return found

    pipeline.network.candidates = timed  # type: ignore[assignment, method-assign]  # for this measurement alone
    return lambda: last


def _request(pipeline: "Pipeline", body: bytes, forward: Callable[[], float]) -> dict[str, float]:
    """One request; milliseconds of each stage."""
    start = _now()
    job = pipeline.read({"body": body}, {"Content-Type": "image/jpeg"})
    read = _now()
    pipeline.infer([job])
    inferred = _now()
    answer = pipeline.respond(job)
    end = _now()
    if answer.status != 200:
        raise ToolError(f"the picture gets no answer but {answer.body.decode()}; give another with --image")
    (item,) = job.items
    times = {stage: item.timing_ms.get(key, 0.0) for stage, key in STAGES.items() if key}
    times[FORWARD] = forward()
    times["read form and options"] = read - start - times["decode"] - times["letterbox"]
    times["batch, to float"] = inferred - read - times[FORWARD] - times["select, undo letterbox"]
    times["answer"] = end - inferred
    stages = {stage: times[stage] for stage in STAGES}
    return stages | {OVERHEAD: end - start - times[FORWARD], "whole request": end - start}


def _now() -> float:
    return time.perf_counter() * 1000


def _summary(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "median": round(statistics.median(ordered), 3),
        "p90": round(ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)], 3),
    }
