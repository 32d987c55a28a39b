"""Baselines and drift: that unchanged traffic raises nothing, a changed world raises within 500 pictures, and that
`marina drift` and the rules for Prometheus say the same."""

import json
import random
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import assert_one_line
from PIL import Image

from handlers.baseline import BASELINE, QUANTITIES, Baseline, Distribution, parse_baseline
from handlers.brightness import brightness
from handlers.errors import BadArchive
from handlers.geometry import letterbox, plan_letterbox
from handlers.metrics import HISTOGRAM_OF, WATCHED, Figures, plain
from handlers.settings import Preprocess
from tools.archive.build import build_archive
from tools.archive.inspect import as_table, inspect_archive
from tools.archive.reader import PROVENANCE, open_archive
from tools.archive.recipe import load_recipe
from tools.cli import main
from tools.data.draw import CLASSES, draw_scene
from tools.errors import ToolError
from tools.evaluate.sources import archive_source
from tools.watch import baseline as making
from tools.watch.baseline import baseline_json, baseline_of, find_baseline_pictures, shortage
from tools.watch.drift import Shift, compare
from tools.watch.looks import Look, find_pictures, look_at

DOCKER = Path(__file__).resolve().parent.parent / "docker"
RULES = DOCKER / "compose" / "prometheus" / "drift.yml"
WINDOW = 500
Counts = dict[str, Counter[str]]


def draw(folder: Path, count: int, seed: int, classes: Sequence[str] = CLASSES, light: float = 1.0) -> Path:
    """Pictures of shapes, as `marina data draw` draws them, in a folder of their own."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        width, height = (int(side) for side in rng.integers(128, 321, 2))
        picture, _ = draw_scene(rng, width, height, 0 if rng.random() < 0.05 else 8, tuple(classes))
        Image.fromarray((np.asarray(picture) * light).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drift") / "pictures", 100, 1)


@pytest.fixture(scope="module")
def archive(repository: Path, pictures: Path) -> Path:
    path = pictures.with_name("shapes.mar")
    return build_archive(load_recipe(repository / "archives/shapes"), path, baseline=pictures).path


@pytest.fixture(scope="module")
def baseline(archive: Path) -> Baseline:
    with open_archive(archive) as opened:
        return parse_baseline(opened.read(BASELINE))


@pytest.fixture(scope="module")
def looks(archive: Path, pictures: Path) -> list[Look]:
    """Unchanged traffic: real answers to other pictures than the baseline's, and to those."""
    others = draw(pictures.with_name("others"), 60, 2)
    with archive_source(archive) as source:
        return list(look_at(source.pipeline, [*find_pictures(pictures, ""), *find_pictures(others, "")], "looking"))


def count(baseline: Baseline, looks: Sequence[Look]) -> Counts:
    return {
        name: Counter(known.bucket(value) for look in looks for value in look.get(name, ()))
        for name, known in baseline.quantities.items()
    }


def drifted(shifts: Sequence[Shift]) -> list[str]:
    return [shift.quantity for shift in shifts if shift.drifted]


# --- Brightness


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 255))
def test_brightness_leaves_the_padding_out(height: int, width: int, level: int) -> None:
    plan = plan_letterbox(height, width, Preprocess(size=320, shape="square"), 32)
    image = torch.full((3, height, width), level, dtype=torch.uint8)
    assert brightness(letterbox(image, plan), plan) == pytest.approx(level / 255, abs=1e-3)
    assert brightness(image, None) == pytest.approx(level / 255, abs=1e-6)


def test_brightness_is_luma() -> None:
    image = torch.zeros(3, 640, 480, dtype=torch.uint8)
    for channel, share in enumerate((0.299, 0.587, 0.114)):
        lit = image.clone()
        lit[channel] = 255
        assert brightness(lit, None) == pytest.approx(share, abs=1e-6)
    # A grid of pixels tells what all of them do.
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1080, 1920), dtype=np.uint8))
    assert brightness(noise, None) == pytest.approx(0.5, abs=0.01)


# --- The baseline


NUMBERS = st.lists(st.floats(0, 50) | st.sampled_from([0.0, 1.0, 0.307, 2.074]), min_size=100, max_size=300)


@settings(max_examples=25)
@given(NUMBERS)
def test_buckets_are_tenths_of_the_values(values: list[float]) -> None:
    known = baseline_of([{"brightness": [value]} for value in values]).quantities["brightness"]
    assert sum(known.counts) == len(values) and len(known.counts) == len(known.buckets)
    assert list(known.edges) == sorted(set(known.edges))
    rounded = Counter(round(value, 3) for value in values)
    for (low, high), held in zip(pairwise((-1.0, *known.edges, 1e9)), known.counts, strict=True):
        assert held == sum(times for value, times in rounded.items() if low < value <= high)
        # More than two tenths only where it is one value.
        inside = [value for value in rounded if low < value <= high]
        assert held <= len(values) / 5 + 1 or len(inside) == 1


def test_what_all_pictures_have_gets_a_bucket_of_its_own() -> None:
    known = baseline_of([{"megapixels": [0.3072]}] * 200).quantities["megapixels"]
    assert known.edges == (0.306, 0.307) and known.counts == (0, 200, 0)
    (shift,) = compare(Baseline(200, {"megapixels": known}), {"megapixels": Counter({known.bucket(0.25): 150})})
    assert shift.drifted


def test_pictures_without_a_detection_are_counted_apart() -> None:
    looks: list[Look] = [{"detections": [0 if number % 25 == 0 else 5 + number % 7]} for number in range(200)]
    known = baseline_of(looks).quantities["detections"]
    assert dict(zip(known.buckets, known.counts, strict=True))["0.0"] == 8


def test_rare_classes_go_together() -> None:
    names = ["a"] * 90 + ["b"] * 6 + ["c"] * 4
    known = baseline_of([{"class": [name]} for name in names]).quantities["class"]
    assert known.classes == ("a", "b", "(others)") and known.counts == (90, 6, 4)
    assert known.bucket("never seen") == "(others)"


def test_detections_that_resemble_one_another_count_for_less() -> None:
    rng = random.Random(0)
    alone: list[Look] = [{"score": [rng.random()]} for _ in range(500)]
    together: list[Look] = [{"score": look["score"] * 10} for look in alone]
    chance, ten_times = (baseline_of(looks).quantities["score"].chance for looks in (alone, together))
    assert ten_times == pytest.approx(10 * chance, rel=0.01)
    # A picture tells at least as much as its only value.
    assert chance == pytest.approx(making._chi_square(9, 4.107), rel=0.01)


def test_too_few_values_are_no_baseline(tmp_path: Path) -> None:
    looks: list[Look] = [{"brightness": [number / 100], "score": [0.5] if number < 99 else []} for number in range(100)]
    assert list(baseline_of(looks).quantities) == ["brightness"]
    (note,) = shortage(baseline_of(looks))
    assert "100 pictures, too few to tell the drift of megapixels, detections, score, class" in note
    assert not baseline_of([{"brightness": [0.5], "score": [0.5] * 9}] * 99).quantities
    for wrong, told in ((tmp_path / "none", "is not there"), (tmp_path, "has no picture in it")):
        with pytest.raises(ToolError, match=told) as error:
            find_baseline_pictures(wrong)
        assert_one_line(error.value)


def test_pictures_of_a_data_set_are_those_that_no_network_was_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert main(["data", "draw", "--output", str(folder), "--pictures", "3", "4", "2", "--workers", "1"]) == 0
    assert Counter(file.parent.name for file in find_baseline_pictures(folder)) == {"valid": 4, "test": 2}


def test_a_baseline_is_read_as_it_was_written(baseline: Baseline) -> None:
    assert parse_baseline(baseline_json(baseline)) == baseline
    document = json.loads(baseline_json(baseline))
    for damage in (
        b"[]",
        b"{",
        json.dumps(document | {"quantities": {"sharpness": document["quantities"]["score"]}}).encode(),
        json.dumps(document | {"quantities": {"score": {"counts": [1], "chance": 1, "edges": [2, 1]}}}).encode(),
    ):
        with pytest.raises(BadArchive, match=BASELINE) as error:
            parse_baseline(damage)
        assert_one_line(error.value)


def test_an_archive_has_its_baseline_and_shows_it(archive: Path, baseline: Baseline, looks: list[Look]) -> None:
    assert baseline.pictures == 100 and tuple(baseline.quantities) == QUANTITIES
    with open_archive(archive) as opened:
        written = opened.read(BASELINE)
        provenance = json.loads(opened.read(PROVENANCE))
    assert BASELINE in provenance["entries"] and provenance["baseline"]["pictures"] == 100
    # The same pictures once more: the same bytes.
    assert baseline_json(baseline_of(looks[:100])) == written
    report = inspect_archive(archive)
    assert report["baseline"]["pictures"] == 100
    table = as_table(report)
    assert "baseline    100 pictures" in table and "brightness: to 0." in table and "class: circle " in table
    json.dumps(report)


# --- Drift


def test_the_index_is_the_population_stability_index() -> None:
    known = Distribution((60, 30, 9), 0.0, edges=(1.0, 2.0))
    (shift,) = compare(Baseline(99, {"score": known}), {"score": {"1.0": 50, "2.0": 70, "+Inf": 80}})
    p, q = np.array([50.5, 70.5, 80.5]) / 201.5, np.array([60.5, 30.5, 9.5]) / 100.5
    assert shift.index == pytest.approx(float(((p - q) * np.log(p / q)).sum()))
    assert shift.most == "1.0" and shift.values == 200


def test_5000_unchanged_pictures_raise_nothing(looks: list[Look]) -> None:
    """Of the answers to 160 real pictures, taken again and again, since 5,000 would take minutes: baseline and traffic
    then have the very same distribution. Twenty baselines, each beside 5,000 pictures in windows of 500."""
    for seed in range(20):
        rng = random.Random(seed)
        known = baseline_of(rng.choices(looks, k=400))
        values = [[(name, known.quantities[name].bucket(v)) for name in look for v in look[name]] for look in looks]
        for window in range(10):
            together = Counter(chain.from_iterable(rng.choices(values, k=WINDOW)))
            counts: Counts = {name: Counter() for name in known.quantities}
            for (name, bucket), times in together.items():
                counts[name][bucket] = times
            shifts = compare(known, counts)
            assert [shift.index is None for shift in shifts] == [False] * len(QUANTITIES)
            assert not drifted(shifts), (seed, window)


def test_chance_is_told_from_change_in_few_and_in_many_pictures(looks: list[Look]) -> None:
    rng = random.Random(0)
    known = baseline_of(rng.choices(looks, k=300))
    assert not any(drifted(compare(known, count(known, rng.choices(looks, k=100)))) for _ in range(50))
    assert not drifted(compare(known, count(known, rng.choices(looks, k=20_000))))
    shifts = compare(known, count(known, looks[:99]))
    assert [shift.index for shift in shifts if shift.quantity == "brightness"] == [None]
    assert not drifted(shifts)


def drift(archive: Path, capsys: pytest.CaptureFixture[str], *more: object) -> tuple[int, dict[str, Any]]:
    code = main(["drift", str(archive), *map(str, more), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_halved_brightness_is_drift(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dark = draw(tmp_path / "dark", 100, 3, light=0.5)
    code, document = drift(archive, capsys, "--pictures", dark, "--fail-above", 0.25)
    assert code == 1 and document["drift"] and document["pictures"] == 100 <= WINDOW
    found = {each["quantity"]: each for each in document["quantities"]}
    assert found["brightness"]["drift"] and found["brightness"]["index"] > 1
    assert not found["megapixels"]["drift"]


def test_too_few_pictures_pass_no_gate(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = draw(tmp_path / "few", 3, 5)
    code, document = drift(archive, capsys, "--pictures", few)
    assert code == 0 and document["drift"] is None
    assert main(["drift", str(archive), "--pictures", str(few), "--fail-above", "0.25"]) == 1
    told = capsys.readouterr()
    assert told.out.endswith("drift: unknown\n") and "too few pictures" in told.err


@pytest.mark.parametrize("bound", ["nan", "-1"])
def test_a_bound_that_nothing_can_pass_or_miss_is_refused(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bound: str
) -> None:
    assert main(["drift", str(archive), "--pictures", str(tmp_path), f"--fail-above={bound}"]) == 1
    assert "give 0 or more" in capsys.readouterr().err


def test_a_class_that_stays_away_is_drift(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = draw(tmp_path / "without", 100, 4, [name for name in CLASSES if name != "star"])
    assert main(["drift", str(archive), "--pictures", str(without), "--fail-above", "0.25"]) == 1
    table = capsys.readouterr().out
    assert "100 pictures beside 100 of the baseline" in table
    (line,) = (line for line in table.splitlines() if line.startswith("class"))
    assert "star: 1" in line and line.endswith("DRIFT")
    assert "drift: " in table.splitlines()[-1] and "class" in table.splitlines()[-1]


def test_what_cannot_be_compared_is_one_line(
    archive: Path, tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
    with open_archive(archive) as opened:
        names = [name for name in opened.names() if name != BASELINE]
        with_none = tmp_path / "none.mar"
        with ZipFile(with_none, "w") as file:
            for name in names:
                file.writestr(name, opened.read(name))
    empty = tmp_path / "empty.mar"
    with ZipFile(with_none) as source, ZipFile(empty, "w") as file:
        for name in source.namelist():
            file.writestr(name, source.read(name))
        file.writestr(BASELINE, baseline_json(baseline_of([{}, {}])))
    for arguments, told in (
        ((empty, "--pictures", bad), "2 pictures are too few"),
        ((with_none, "--pictures", bad), "has no baseline; build it with"),
        ((archive, "--pictures", tmp_path / "gone"), "is not there"),
        ((archive, "--pictures", bad), "a.jpg is refused"),
        ((archive, "--metrics", "http://127.0.0.1:9/metrics"), "gives no metrics"),
        ((archive, "--pictures", bad, "--seconds", "3"), "--seconds 3"),
    ):
        assert main(["drift", *map(str, arguments)]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("marina: ") and told in error


# --- A server's figures


class Metrics(BaseHTTPRequestHandler):
    """Tells one text after another, the last one again and again."""

    texts: list[str]

    def do_GET(self) -> None:  # the name that http.server calls
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Metrics]]]:
    class Own(Metrics):
        texts: list[str] = []  # noqa: RUF012  # one server a class

    serving = HTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/metrics", Own
    serving.shutdown()
    serving.server_close()


def as_metrics(counts: Mapping[str, Mapping[str, float]], baseline: Baseline, version: str = "1.0") -> str:
    lines = [f"# TYPE {WATCHED} counter"]
    for name, known in baseline.quantities.items():
        for bucket in known.buckets:
            labels = f'model="shapes",version="{version}",quantity="{name}",bucket="{plain(bucket)}",Hostname="h"'
            lines.append(f"{WATCHED}{{{labels},}} {float(counts.get(name, {}).get(bucket, 0))}")
    return "\n".join(lines) + "\n"


def test_a_servers_figures_are_compared(
    archive: Path,
    baseline: Baseline,
    looks: list[Look],
    server: tuple[str, type[Metrics]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, told = server
    same = count(baseline, random.Random(0).choices(looks, k=WINDOW))
    dark = {name: Counter(counts) for name, counts in same.items()}
    dark["brightness"][baseline.quantities["brightness"].bucket(0.1)] += WINDOW
    dark["detections"]["0.0"] += WINDOW
    other_version = as_metrics(dark, baseline, "2.0")
    told.texts = [as_metrics(same, baseline) + other_version]
    code, document = drift(archive, capsys, "--metrics", url, "--fail-above", 0.1)
    assert code == 0 and document["pictures"] == WINDOW and not document["drift"]
    # Between two looks, what came before does not count.
    told.texts = [as_metrics(same, baseline), as_metrics(dark, baseline)]
    code, document = drift(archive, capsys, "--metrics", url, "--seconds", 0.01, "--fail-above", 0.1)
    assert code == 1 and document["pictures"] == WINDOW
    (shift,) = (each for each in document["quantities"] if each["quantity"] == "brightness")
    assert max(each["traffic"] for each in shift["shares"].values()) == 1.0


def test_figures_that_cannot_be_compared_are_one_line(
    archive: Path, baseline: Baseline, server: tuple[str, type[Metrics]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, told = server
    other = Baseline(1, baseline.quantities | {"brightness": Distribution((1, 2), 3.0, edges=(0.5,))})
    full = as_metrics({"score": {"+Inf": 5}}, baseline)
    for texts, error in (
        ([as_metrics({}, baseline, "2.0")], "tells nothing of shapes 1.0 with a baseline"),
        ([as_metrics({}, other)], "counts by another baseline"),
        (["<html>"], "Prometheus' form"),
        ([full, as_metrics({}, baseline)], "started anew"),
    ):
        told.texts = texts
        assert main(["drift", str(archive), "--metrics", url, "--seconds", "0.01"]) == 1
        assert error in capsys.readouterr().err


def test_a_worker_tells_its_baseline_and_counts_in_its_buckets(baseline: Baseline) -> None:
    first = {(name, of[2:]): amount for name, amount, of in Figures("shapes", "1.0", CLASSES, baseline).take()}
    assert first["marina_baseline_workers", ()] == 1
    for quantity, known in baseline.quantities.items():
        assert first["marina_baseline_chance", (quantity,)] == known.chance
        for bucket, held in zip(known.buckets, known.counts, strict=True):
            assert first["marina_baseline", (quantity, bucket)] == held
            assert first[WATCHED, (quantity, bucket)] == 0
    assert HISTOGRAM_OF.keys() == set(QUANTITIES) - {"class"}
    assert not [name for name, *_ in Figures("shapes", "1.0", CLASSES).take() if "baseline" in name or name == WATCHED]


def test_probes_and_options_of_their_own_are_no_traffic(archive: Path, pictures: Path, baseline: Baseline) -> None:
    picture = (pictures / "000.jpg").read_bytes()
    with open_archive(archive) as opened:
        golden = opened.read("golden/scene.jpg")
    with archive_source(archive) as source:
        pipeline = source.pipeline
        figures = Figures("shapes", "1.0", pipeline.labels, baseline)
        list(figures.take())
        requests: list[tuple[bytes, dict[str, str]]] = [
            (picture, {}),
            (picture, {"Marina-Format": "coco"}),
            (picture, {"Marina-Score-Threshold": "0.6"}),
            (picture, {"Marina-Classes": "star"}),
            (golden, {}),
        ]
        jobs = [pipeline.read({"body": bytearray(body)}, headers) for body, headers in requests]
        pipeline.infer(jobs)
        figures.add([(job, pipeline.respond(job)) for job in jobs])
    told = list(figures.take())
    assert sum(amount for name, amount, of in told if name == WATCHED and of[2] == "brightness") == 2
    assert [amount for name, amount, _ in told if name == "marina_picture_brightness_count"] == [5]


# --- Prometheus' rules


def test_the_operators_rules_are_the_same() -> None:
    rule = yaml.safe_load((DOCKER / "k8s" / "base" / "drift.yaml").read_text())
    assert rule["spec"] == yaml.safe_load(RULES.read_text())


def series(baseline: Baseline, counts: Counts, model: str, version: str, workers: int) -> list[dict[str, str]]:
    """What a server tells in 20 minutes in which so many pictures come every five minutes."""
    labels = f'model="{model}", version="{version}"'
    found = [(f"marina_baseline_workers{{{labels}}}", f"{workers}x80")]
    for name, known in baseline.quantities.items():
        found.append((f'marina_baseline_chance{{{labels}, quantity="{name}"}}', f"{known.chance * workers}x80"))
        for bucket, held in zip(known.buckets, known.counts, strict=True):
            of = f'{labels}, quantity="{name}", bucket="{bucket}"'
            found.append((f"marina_baseline{{{of}}}", f"{held * workers}x80"))
            found.append((f"{WATCHED}{{{of}}}", f"0+{counts[name][bucket] / 20}x80"))
    return [{"series": name, "values": values} for name, values in found]


def test_rules_raise_what_the_command_raises(baseline: Baseline, looks: list[Look], tmp_path: Path) -> None:
    """Two versions served at once by two workers and one, one of them unchanged; and too few pictures of a third."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("PROMETHEUS' RULES NOT TRIED: no promtool (Debian's package prometheus)")
    same = random.Random(0).choices(looks, k=WINDOW)
    changed: list[Look] = [
        {
            "brightness": [float(look["brightness"][0]) / 2],
            "class": [name for name in look.get("class", []) if name != "star"],
            **{name: look.get(name, []) for name in ("megapixels", "detections", "score")},
        }
        for look in same
    ]
    shifts = {shift.quantity: shift for shift in compare(baseline, count(baseline, changed))}
    assert drifted([*shifts.values()]) == ["brightness", "class"]
    told = [
        *series(baseline, count(baseline, same), "shapes", "1.0", 2),
        *series(baseline, count(baseline, changed), "shapes", "2.0", 1),
        *series(baseline, count(baseline, changed[:20]), "quiet", "1.0", 1),
    ]
    raised = [
        {"labels": f'{{model="shapes", version="2.0", quantity="{name}"}}', "value": 1}
        for name in ("brightness", "class")
    ]
    firing = 'count by (model, version, quantity) (ALERTS{alertname="Drift", alertstate="firing", window="5m"})'
    checks = [{"expr": firing, "eval_time": "6m30s", "exp_samples": raised}]
    for name, shift in shifts.items():
        of = f'{{model="shapes", version="2.0", quantity="{name}", window="5m"}}'
        for record, value in (("index", shift.index), ("chance", shift.chance)):
            near = f"count(abs(marina:drift:{record}{of} / {value} - 1) < 0.001)"
            checks.append({"expr": near, "eval_time": "15m", "exp_samples": [{"labels": "{}", "value": 1}]})
    suite = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": told, "promql_expr_test": checks}],
    }
    (tmp_path / "suite.yml").write_text(yaml.safe_dump(suite))
    done = subprocess.run([promtool, "test", "rules", str(tmp_path / "suite.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
