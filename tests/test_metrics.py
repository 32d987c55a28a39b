"""What a worker counts, as far as the lines that TorchServe reads; the files that declare it."""

import base64
import io
import json
import logging
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import ts
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_folder import encode, scene
from tiny_archive import write_archive
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handlers import metrics
from handlers.baseline import Baseline, Distribution
from handlers.detection_handler import DetectionHandler
from handlers.metrics import COUNTERS, HISTOGRAMS, SCORE, STAGES, Figures
from handlers.options import Options
from handlers.pipeline import Answer, Item, Job
from model_defs.contract import Detections
from tools.errors import ToolError
from tools.serve import config, process
from tools.serve.server import TorchServe

PATIENCE_S = 60
DOCKER = Path(config.__file__).parents[2] / "docker"
STOCK = Path(ts.__file__).parent / "configs" / "metrics.yaml"
# org.pytorch.serve.wlm.WorkerLifeCycle, org.pytorch.serve.metrics.Metric and java.util.Scanner of TorchServe 0.12.
MARKED = re.compile(r"(INFO > )?(\[METRICS])(.*)")
LINE = re.compile(
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?", re.ASCII
)
LINE_ENDS = re.compile("\r\n|[\n\r\u2028\u2029\u0085]")

BASELINE = Baseline(
    100,
    {
        "megapixels": Distribution((60, 40), 12.5, edges=(0.25,)),
        "class": Distribution((90, 10), 15.5, classes=("a", "(others)")),
    },
)
OPTIONS = Options(0.25, 0.45, 300, class_agnostic=False, classes=None, format="detections")
Figure = tuple[str, tuple[tuple[str, str], ...]]


def read_as_torchserve(text: str) -> list[tuple[str, float, tuple[tuple[str, str], ...]]]:
    found = []
    for line in LINE_ENDS.split(text):
        if marked := MARKED.fullmatch(line):
            read = LINE.fullmatch(marked[3])
            assert read and read[6] == "COUNTER", f"TorchServe cannot read {line!r}"
            # Of a value that is empty or holds a colon it takes nothing.
            pairs = [tuple(pair.rstrip(":").split(":")) for pair in read[4].split(",")]
            assert all(len(pair) == 2 for pair in pairs), line
            assert read[7] == socket.gethostname()
            found.append((read[1], float(read[3]), tuple(pairs)))
    return found


class Printed:
    """What the worker has printed by way of TorchServe's metrics."""

    def __init__(self, sink: io.StringIO):
        self.sink = sink

    def totals(self) -> dict[Figure, float]:
        totals: dict[Figure, float] = defaultdict(float)
        for name, value, pairs in read_as_torchserve(self.sink.getvalue()):
            totals[name, pairs] += value
        return totals

    def of(self, name: str, **wanted: str) -> float:
        return sum(
            value for (found, pairs), value in self.totals().items() if found == name and wanted.items() <= {*pairs}
        )

    def wait_for(self, **wanted: float) -> None:
        """Until these are the sums of all that has been printed of these counters."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := {name: self.of(name) for name in wanted}) != wanted:
            assert time.monotonic() < deadline, f"{found}, not {wanted}"
            time.sleep(0.01)


@contextmanager
def printing() -> Iterator[Printed]:
    """As in a worker, all of which goes by way of logging, to one stream."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("ts.metrics.caching_metric")
    logger.addHandler(handler)
    level, logger.level, logger.propagate = logger.level, logging.INFO, False
    yield Printed(sink)
    logger.level, logger.propagate = level, True
    logger.removeHandler(handler)


@pytest.fixture
def printed() -> Iterator[Printed]:
    with printing() as printed:
        yield printed


@cache
def counters(path: Path = DOCKER / "metrics.yaml") -> MetricsCacheYamlImpl:
    declared = MetricsCacheYamlImpl(str(path))
    declared.initialize_cache()
    return declared


def print_all(figures: Figures) -> None:
    for counter, amount, of in figures.take():
        counters().get_metric(counter).add_or_update(amount, list(of))


def answered(scores: list[float], label: int = 0, **timing_ms: float) -> tuple[Job, Answer]:
    found = Detections(torch.zeros(len(scores), 4), torch.full((len(scores),), label), torch.tensor(scores))
    item = Item(OPTIONS, height=480, width=640, brightness=0.25, usual=True, detections=found, timing_ms=timing_ms)
    return Job([item]), Answer(b"", "")


# --- The files


def test_declared_as_the_handlers_count() -> None:
    text = config.metrics_yaml(process.torchserve_metrics())
    assert (DOCKER / "metrics.yaml").read_text() == text, (
        "write what config.metrics_yaml gives into docker/metrics.yaml"
    )
    declared = yaml.safe_load(text)
    ours = {each["name"]: each for each in declared["model_metrics"].pop("counter")}
    assert declared == yaml.safe_load(STOCK.read_text())
    assert {name: tuple(each["dimensions"]) for name, each in ours.items()} == {
        name: counter.dimensions for name, counter in COUNTERS.items()
    }


def test_the_container_reads_them() -> None:
    assert "\nmetrics_config=/opt/torchserve/metrics.yaml\n" in (DOCKER / "config.properties").read_text()
    dockerfile = (DOCKER / "Dockerfile").read_text().replace("\\\n", "")
    assert re.search(r"^COPY .* metrics\.yaml .*/opt/torchserve/$", dockerfile, re.MULTILINE)


def test_a_metrics_port_in_use_is_one_line(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.mar", "a")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ToolError, match=f"port {port} on 127.0.0.1 is in use"):
            TorchServe(tmp_path, port=0, metrics_port=port).start()


# --- The lines


FORGED = "x\n[METRICS]marina_answers.Count:9|#model:m,version:1,type:ok|#type:COUNTER|#hostname:h,1"


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
@example(
    ["a,b", "a|#type:GAUGE", "a|#hostname:h,1,2", "#", ":", '"', "é", "猫", "a%2Cb", "a:b", FORGED, "\u2028x", "\\"]
)
def test_no_label_forges_or_loses_a_metric(labels: list[str]) -> None:
    known = Baseline(100, {"class": Distribution(tuple(range(len(labels))), 1.5, classes=tuple(labels))})
    figures = Figures("m", "1.0", labels, known)
    figures.add([answered([0.5] * (index + 1), index) for index in range(len(labels))])
    with printing() as printed:
        print_all(figures)
    read = read_as_torchserve(printed.sink.getvalue())
    assert len(read) == sum(1 for _ in Figures("m", "1.0", labels, known).take())
    found = [(value, dict(pairs)["label"]) for name, value, pairs in read if name == "marina_detections"]
    assert [value for value, _ in found] == list(range(1, len(labels) + 1))
    assert len({label for _, label in found}) == len(labels)


def test_a_plain_label_stays_as_it_is() -> None:
    increases = Figures("m", "1.0", ["__background__", "traffic light", "chien-loup é 猫", "a:b"]).take()
    assert [of[-1] for counter, _, of in increases if counter == "marina_detections"] == [
        "traffic light",
        "chien-loup é 猫",
        "a%3Ab",
    ]


# --- The sums


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, float("nan"), float("inf")])))
def test_histogram(scores: list[float]) -> None:
    figures = Figures("m", "1.0", ["a"])
    for score in scores:
        figures.add([answered([score])])
    sums = {(counter, of[2:]): amount for counter, amount, of in figures.take()}
    # As in the answers, which are of 32 bits.
    finite = [score for score in torch.tensor(scores).tolist() if abs(score) < float("inf")]
    for edge in HISTOGRAMS[SCORE].edges:
        assert sums["marina_score_bucket", (str(edge),)] == sum(score <= edge for score in finite)
    assert sums["marina_score_bucket", ("+Inf",)] == sums["marina_score_count", ()] == len(finite)
    assert sums["marina_score_sum", ()] == pytest.approx(sum(finite), abs=1e-5)


def test_all_is_there_from_the_start_with_zeros_and_then_what_increased() -> None:
    figures = Figures("m", "1.0", ["a", "b"], BASELINE)
    first = list(figures.take())
    assert {increase.counter for increase in first} == set(COUNTERS)
    assert {increase.counter for increase in first if increase.amount} == {
        *("marina_baseline", "marina_baseline_chance", "marina_baseline_workers")
    }
    of_stages = {increase.of[2] for increase in first if increase.counter == "marina_stage_seconds_count"}
    assert of_stages == set(STAGES)
    assert list(figures.take()) == []
    figures.add([answered([0.5, 0.75], 1, decode=1.5), answered([], decode=2.0)])
    increases = [(counter, amount, of[2:]) for counter, amount, of in figures.take() if "_bucket" not in counter]
    assert increases == [
        ("marina_answers", 2, ("ok",)),
        ("marina_watched", 2, ("megapixels", "+Inf")),
        ("marina_detections", 2, ("b",)),
        ("marina_watched", 2, ("class", "(others)")),
        ("marina_batch_pictures_sum", 2, ()),
        ("marina_batch_pictures_count", 1, ()),
        ("marina_stage_seconds_sum", 0.0035, ("decode",)),
        ("marina_stage_seconds_count", 2, ("decode",)),
        ("marina_picture_megapixels_sum", 0.6144, ()),
        ("marina_picture_megapixels_count", 2, ()),
        ("marina_picture_brightness_sum", 0.5, ()),
        ("marina_picture_brightness_count", 2, ()),
        ("marina_picture_detections_sum", 2, ()),
        ("marina_picture_detections_count", 2, ()),
        ("marina_score_sum", 1.25, ()),
        ("marina_score_count", 2, ()),
    ]


def test_nothing_is_taken_from_the_middle_of_a_batch() -> None:
    figures = Figures("m", "1.0", ["a"])
    list(figures.take())
    taken: list[str] = []
    taker = threading.Thread(target=lambda: taken.extend(increase.counter for increase in figures.take()))

    class Timing(dict[str, float]):
        def items(self):
            taker.start()
            taker.join(0.2)
            assert taker.is_alive()
            return super().items()

    job, answer = answered([0.5])
    job.items[0].timing_ms = Timing(decode=1.0)
    figures.add([(job, answer)])
    taker.join()
    assert {"marina_answers", "marina_detections", "marina_score_count", "marina_stage_seconds_count"} <= set(taken)
    assert list(figures.take()) == []


# --- The handler


@pytest.fixture
def ask(small_model, monkeypatch):
    """Of a handler whose server declares metrics in the file given: a function that has it answer one batch."""
    monkeypatch.setattr(metrics, "PERIOD_S", 0.05)
    threads = torch.get_num_threads()
    folder, model_config = small_model

    def start(path: Path = DOCKER / "metrics.yaml"):
        context = Context("small", str(folder), {}, 8, None, ts.__version__, True, counters(path), model_config)
        handler = DetectionHandler()
        handler.initialize(context)

        def ask(*requests: tuple[object, dict[str, str]]) -> list[bytes]:
            context.request_processor = [RequestProcessor(headers) for _, headers in requests]
            context.request_ids = {index: str(index) for index in range(len(requests))}
            return handler.handle([{"body": body} for body, _ in requests], context)

        return handler, ask

    yield start
    torch.set_num_threads(threads)


PICTURE = bytearray(encode(scene(240, 320)))
DETECTIONS = {"Marina-Format": "detections"}


def test_the_figures_are_those_of_the_answers(ask, printed: Printed) -> None:
    _, ask = ask()
    # Refused together, so that the first one's detections are no answer.
    two = {"instances": [{"b64": base64.b64encode(body).decode()} for body in (PICTURE, b"text")]}
    bodies = [
        *ask((PICTURE, DETECTIONS), (b"text", {}), (PICTURE, DETECTIONS | {"Marina-Max-Detections": "2"}), (two, {})),
        *ask((PICTURE, {"Marina-Format": "?"})),
        *ask((b"", {"explain": "True"}), (b"", {"describe": "True"})),
    ]
    answers = [json.loads(body) for body in bodies]
    # No further request: the last ones arrive too.
    printed.wait_for(marina_answers=6, marina_score_count=302, marina_batch_pictures_count=2)
    outcomes = defaultdict(int)
    for answer in answers[:6]:
        outcomes[answer.get("type", "ok")] += 1
    assert outcomes == {"ok": 2, "UnsupportedMedia": 2, "InvalidOption": 2}
    for outcome in ("ok", *(error.__name__ for error in metrics.RequestError.__subclasses__())):
        assert printed.of("marina_answers", type=outcome, model="small", version="1.0") == outcomes[outcome]
    good = [answers[0], answers[2]]
    found = [row for answer in good for row in answer["detections"]]
    assert len(found) == 302
    for label in {row["label"] for row in found}:
        wanted = sum(row["label"] == label for row in found)
        assert printed.of("marina_detections", label=label.replace(",", "%2C")) == wanted
    assert printed.of("marina_score_count") == printed.of("marina_score_bucket", le="+Inf") == len(found)
    assert printed.of("marina_score_sum") == pytest.approx(sum(row["score"] for row in found), abs=1e-3)
    for stage in STAGES:
        seconds = sum(answer["timing_ms"][stage] for answer in good) / 1000
        assert printed.of("marina_stage_seconds_count", stage=stage) == 3
        assert printed.of("marina_stage_seconds_sum", stage=stage) > seconds
    # A batch without a picture is none.
    assert printed.of("marina_batch_pictures_bucket", le="+Inf") == 2
    assert printed.of("marina_batch_pictures_sum") == 6


def test_a_server_without_our_declarations_hears_nothing(ask, printed: Printed, tmp_path: Path) -> None:
    threads = threading.active_count()
    _, ask_stock = ask(STOCK)
    assert threading.active_count() == threads
    assert len(json.loads(ask_stock((PICTURE, {}))[0])) == 300
    assert printed.sink.getvalue() == ""
    # One that knows an older form of some of them hears the others.
    declared = yaml.safe_load((DOCKER / "metrics.yaml").read_text())
    by_name = {each["name"]: each for each in declared["model_metrics"]["counter"]}
    by_name["marina_answers"]["dimensions"] = ["model"]
    declared["model_metrics"]["counter"] = [by_name["marina_answers"], by_name["marina_detections"]]
    (tmp_path / "metrics.yaml").write_text(yaml.safe_dump(declared))
    _, ask_older = ask(tmp_path / "metrics.yaml")
    assert len(json.loads(ask_older((PICTURE, {}))[0])) == 300
    printed.wait_for(marina_detections=300)
    assert {name for name, _ in printed.totals()} == {"marina_detections"}
    assert "Failed" not in printed.sink.getvalue()


def test_no_figure_is_worth_an_answer(ask, caplog: pytest.LogCaptureFixture) -> None:
    handler, ask = ask(STOCK)
    handler.worker.figures = None
    assert len(json.loads(ask((PICTURE, {}))[0])) == 300
    assert "a batch is missing from the metrics" in caplog.text
