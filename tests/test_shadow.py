"""Two answers compared, what their counts say, and a candidate behind the answers that may be dead or late."""

import argparse
import asyncio
import io
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from handlers.request import TENSOR
from handlers.settings import Limits
from tools.cli import main
from tools.data.draw import draw_scene
from tools.errors import ToolError
from tools.evaluate.metrics import iou
from tools.gateway import shadowing
from tools.gateway.command import add_arguments, read_settings
from tools.gateway.metrics import Figures
from tools.gateway.settings import Bounds, Server, Settings
from tools.gateway.settings import Shadow as ShadowSettings
from tools.gateway.shadowing import ShadowedBackend
from tools.shadow import keeper as keeper_module
from tools.shadow.keeper import Keeper
from tools.shadow.matching import Counts, Tolerance, compare, pairs
from tools.shadow.record import Identity, Record, read_record, write_record
from tools.shadow.report import Report, Reports, make_report, needed, share_of

TOLERANCE = Tolerance(iou=0.5, moved_iou=0.9, score_change=0.1)
SIDE = 100.0

corners = st.floats(0, 50, width=32)
sides = st.floats(1, 50, width=32)
boxes = st.lists(st.tuples(corners, corners, sides, sides), max_size=8).map(
    lambda found: np.array([(x, y, x + w, y + h) for x, y, w, h in found], dtype=np.float64).reshape(-1, 4)
)


def row(place: int, label: str = "cat", score: float = 0.8, shift: float = 0.0) -> dict[str, Any]:
    """A square of SIDE, each place far from every other."""
    left = 1000.0 * place + shift
    return {"label": label, "index": 0, "score": score, "box": [left, 0.0, left + SIDE, SIDE]}


@given(boxes, boxes, st.floats(0.1, 1))
def test_pairs_are_one_to_one_near_enough_and_leave_nothing_over_that_fits(
    one: np.ndarray, other: np.ndarray, least: float
) -> None:
    found = list(pairs(one, other, least))
    rows, columns = [row for row, _, _ in found], [column for _, column, _ in found]
    assert len(set(rows)) == len(rows) and len(set(columns)) == len(columns)
    overlap = iou(one, other)
    assert all(overlap[row, column] == share >= least for row, column, share in found)
    assert [share for _, _, share in found] == sorted((share for _, _, share in found), reverse=True)
    overlap[rows] = 0
    overlap[:, columns] = 0
    assert not (overlap >= least).any()


@given(boxes)
def test_an_answer_agrees_with_itself(found: np.ndarray) -> None:
    rows = [{"label": "cat", "index": 0, "score": 0.5, "box": box} for box in found.tolist()]
    counts = compare(rows, rows, TOLERANCE)
    assert all(each.agree and each.kept == len(rows) and each.drift == 0 for each in counts.values())


@given(*[st.integers(0, 5)] * 5)
def test_what_was_taken_away_added_moved_and_rescored_is_counted(
    same: int, lost: int, gained: int, moved: int, rescored: int
) -> None:
    live = [row(place) for place in range(same + moved + rescored + lost)]
    candidate = [row(place) for place in range(same)]
    # IoU 90 / 110.
    candidate += [row(same + place, shift=10) for place in range(moved)]
    candidate += [row(same + moved + place, score=0.5) for place in range(rescored)]
    candidate += [row(100 + place) for place in range(gained)]
    counts = compare(live, candidate[::-1], TOLERANCE).get("cat", Counts())
    assert (counts.live, counts.candidate) == (len(live), len(candidate))
    assert (counts.lost, counts.gained, counts.moved, counts.rescored) == (lost, gained, moved, rescored)
    assert counts.drift == pytest.approx(-0.3 * rescored)
    assert counts.agree == (lost + gained + moved + rescored == 0)


def test_a_box_of_another_class_is_another_object() -> None:
    counts = compare([row(0, "cat")], [row(0, "dog")], TOLERANCE)
    assert (counts["cat"].lost, counts["cat"].gained) == (1, 0)
    assert (counts["dog"].lost, counts["dog"].gained) == (0, 1)


def test_of_two_boxes_the_nearer_one_is_the_same() -> None:
    counts = compare([row(0, score=0.8)], [row(0, score=0.9, shift=20), row(0, score=0.8, shift=1)], TOLERANCE)["cat"]
    assert (counts.kept, counts.moved, counts.rescored, counts.gained) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_the_literature(count: int, total: int, low: float, high: float) -> None:
    share = share_of(count, total)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.01, 0.99))
def test_as_many_as_are_needed_decide_it(total: int, part: float, most: float) -> None:
    share = share_of(round(part * total), total)
    assert share.share is not None
    assert 0 <= share.low <= share.share <= share.high <= 1
    wanted = needed(share, most)
    if not math.isclose(wanted, total, rel_tol=1e-6):
        assert (share.low <= most <= share.high) == (total < wanted)


LIVE = Identity(name="m", version="1.0", checksum="a")
NEXT = Identity(name="n", version="2.0", checksum="b")
BOUNDS = Bounds(min_pictures=100)


def record(pictures: int, counts: dict[str, Counts], failed: int = 0, times: float = 1.0) -> Record:
    """Of pictures on all of which together there is what `counts` says."""
    found = Record(live=LIVE, candidate=NEXT, tolerance=TOLERANCE)
    for _ in range(pictures):
        found.totals.add({}, 20.0, 20.0 * times)
    found.totals.classes = counts
    found.totals.failed = failed
    return found


def judged(found: Record, bounds: Bounds = BOUNDS) -> Report:
    return make_report(found, "m", "n/2.0", 0.1, bounds, 0)


def counts_of(lost: int, gained: int, kept: int, moved: int = 0) -> Counts:
    return Counts(live=kept + lost, candidate=kept + gained, kept=kept, moved=moved)


GOOD = {"cat": counts_of(10, 10, 990)}


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        (record(99, GOOD), "hold", "99 of 100 pictures"),
        (record(1000, GOOD), "promote", "lost: 1.0 % (0.5 … 1.8) of the live model's detections"),
        (record(1000, {"cat": counts_of(200, 0, 800)}), "reject", "lost: 20.0 %"),
        (record(1000, {"cat": counts_of(0, 200, 800)}), "reject", "gained: 20.0 %"),
        (record(1000, {"cat": counts_of(0, 0, 800, moved=400)}), "reject", "moved: 50.0 %"),
        (record(1000, GOOD, failed=50), "reject", "failed: 4.8 %"),
        (record(0, {}, failed=100), "reject", "failed: 100.0 %"),
        (record(1000, GOOD, times=2.0), "reject", "latency: 2.00 times"),
        (record(1000, GOOD | {"dog": counts_of(10, 0, 0)}), "reject", "lost dog: 100.0 %"),
        (record(1000, GOOD | {"dog": counts_of(0, 10, 0)}), "reject", "gained dog: 100.0 %"),
        (record(1000, GOOD | {"dog": counts_of(1, 0, 1)}), "promote", ""),
        (record(1000, {"cat": counts_of(11, 0, 100)}), "hold", "lost: 9.9 %"),
        (record(1000, {}), "hold", "lost: none"),
    ],
)
def test_verdicts(found: Record, verdict: str, reason: str) -> None:
    said = judged(found).verdict
    assert said.verdict == verdict and any(line.startswith(reason) for line in said.reasons), said


def test_the_live_archive_itself_is_no_candidate() -> None:
    found = record(1000, GOOD)
    found.candidate = LIVE.model_copy(update={"name": "n"})
    assert judged(found).verdict.reasons == ["the candidate is the very archive that is live"]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(50, 400))
def test_with_as_many_more_pictures_of_the_same_kind_it_is_decided(lost: int, gained: int, kept: int) -> None:
    bounds = BOUNDS.model_copy(update={"max_class": 1.0, "max_failed": 1.0})
    found = record(200, {"cat": counts_of(lost, gained, kept)})
    said = judged(found, bounds).verdict
    if said.verdict == "hold" and said.more_pictures is not None and said.more_pictures < 10_000:
        times = math.ceil((200 + said.more_pictures) / 200 * 1.001)
        more = record(200 * times, {"cat": counts_of(lost * times, gained * times, kept * times)})
        assert judged(more, bounds).verdict.verdict != "hold"


def test_counts_outlive_the_gateway_and_none_by_another_tolerance(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.json"
    assert read_record(path, TOLERANCE).totals.compared == 0
    found = record(3, GOOD)
    write_record(path, found.model_dump_json().encode())
    assert read_record(path, TOLERANCE) == found
    assert [entry.name for entry in path.parent.iterdir()] == ["m.json"]
    assert read_record(path, TOLERANCE.model_copy(update={"iou": 0.6})).totals.compared == 0
    path.write_text('{"totals": 3}')
    with pytest.raises(ToolError, match=r"m\.json cannot be read \(it is no report of a shadow\); move it away"):
        read_record(path, TOLERANCE)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_scene(np.random.default_rng(seed), 96, 64)[0].save(buffer, "JPEG")
    return buffer.getvalue()


def said(model: str, version: str, rows: list[dict[str, Any]], ms: float = 10.0) -> dict[str, Any]:
    return {
        "model": model,
        "version": version,
        "width": 96,
        "height": 64,
        "detections": rows,
        "timing_ms": {"decode": 1.0, "inference": ms - 1.0},
    }


def test_a_difference_is_kept_once_and_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(str(tmp_path / "kept"), 2, Limits())
    live, candidate = said("m", "1.0", [row(0)]), said("n", "2.0", [row(0), row(1)])
    pictures = [jpeg(seed) for seed in range(3)]
    assert [keeper.keep(each, LIVE, live, 0.25, candidate) for each in [pictures[0], *pictures]] == [
        True,
        False,
        True,
        False,
    ]
    documents = sorted((tmp_path / "kept").glob("*/*.json"))
    assert len(documents) == 2 and len(list((tmp_path / "kept").glob("*/*.jpg"))) == 2
    content = json.loads(documents[0].read_text())
    assert content.pop("id") and content.pop("time")
    assert (documents[0].parent / content.pop("image")).read_bytes()[:2] == b"\xff\xd8"
    assert content == {
        "model": "m",
        "version": "1.0",
        "checksum": "a",
        "reasons": ["disagreement"],
        "width": 96,
        "height": 64,
        "detections": [row(0)],
        "score_threshold": 0.25,
        "blurred": False,
        "shadow": {"model": "n", "version": "2.0", "detections": [row(0), row(1)]},
    }


class Peer:
    """Speaks as a TorchServe does that has the live model `m` and the candidate `n`, each of the given rows.

    late: the candidate does not answer. dead: it answers so. busy: the live model does not describe itself. asked: of
    which model, with which options.
    """

    def __init__(self) -> None:
        self.rows = {"m": [row(0), row(1)], "n": [row(0), row(2, "dog")]}
        self.versions = {"m": "1.0", "n": "2.0"}
        self.late = False
        self.dead: int | None = None
        self.busy = False
        self.described = 0
        self.asked: list[tuple[str, dict[str, str]]] = []

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Peer"]:
        app = web.Application()
        app.router.add_post("/predictions/{model}", self.answer)
        app.router.add_post("/predictions/{model}/1.0", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def answer(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        if request.headers.get("describe"):
            self.described += 1
            if self.busy and model == "m":
                return web.Response(status=503)
            described = {"name": model, "version": self.versions[model], "checksum": f"of {self.versions[model]}"}
            return web.json_response(described | {"postprocess": {"score_threshold": 0.25}})
        self.asked.append((model, {k: v for k, v in request.headers.items() if k.startswith("Marina-")}))
        if model == "n" and self.dead:
            return web.json_response({"code": self.dead, "type": "No", "message": "no"}, status=self.dead)
        while model == "n" and self.late:
            await asyncio.sleep(0.01)
        if request.headers.get("Marina-Format") != "detections":
            return web.Response(body=b"drawn", content_type="image/jpeg")
        return web.json_response(said(model, self.versions[model], self.rows[model], 10 if model == "m" else 20))


def play(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadowing, "RETRY_S", 0.005)


class Gateway:
    """Before a Peer, its live model in the shadow of the other."""

    def __init__(self, peer: Peer, folder: Path, **changes: Any):
        shadow = ShadowSettings(model="m", candidate="n", **{"share": 1.0, "timeout_s": 0.2} | changes)
        settings = Settings(
            backends=[Server(url=peer.url, models=["m"])], no_auth=True, shadows=[shadow], shadow_folder=folder
        )
        self.figures = Figures()
        self.backend = ShadowedBackend(settings, self.figures)

    async def __aenter__(self) -> "Gateway":
        await self.backend.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.backend.close()

    async def ask(self, times: int = 1, form: str = "detections", picture: bytes = b"picture", **options: str) -> None:
        headers = {"Marina-Format": form} | {f"Marina-{name.title()}": value for name, value in options.items()}
        for _ in range(times):
            assert (await self.backend.predict("m", None, picture, "image/jpeg", headers)).status == 200

    @property
    def report(self) -> Report:
        (found,) = self.backend.reports()
        return found

    def metrics(self) -> str:
        return generate_latest(self.figures.registry).decode()


def test_traffic_is_compared_behind_the_answers(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Peer().up() as peer, Gateway(peer, tmp_path) as gateway:
            await gateway.ask(3)
            await gateway.ask(1, "image", classes="cat")
            # A version of the caller's own choice, and what is no picture.
            for version, kind in (("1.0", "image/jpeg"), (None, TENSOR)):
                await gateway.backend.predict("m", version, b"x", kind, {"Marina-Format": "detections"})
            await until(lambda: gateway.report.compared == 4)
            await asyncio.sleep(0.05)
            found = gateway.report
            assert (found.compared, found.agreed.count, found.failed.count, found.dropped, found.waiting) == (
                4,
                0,
                0,
                0,
                0,
            )
            assert (found.overall.live, found.overall.candidate) == (8, 8)
            cat, dog = found.classes
            assert (cat.lost.count, cat.lost.total, cat.gained.count, dog.gained.count, dog.lost.total) == (
                4,
                8,
                0,
                4,
                0,
            )
            assert found.latency and (found.latency.live_ms, found.latency.candidate_ms) == (10, 20)
            assert found.latency.ratio == 2
            # The one in another format was asked for once more, with its options.
            again = {"Marina-Format": "detections", "Marina-Classes": "cat"}
            assert [model for model, headers in peer.asked if headers == again] == ["m", "n"]
            assert sum(model == "n" for model, _ in peer.asked) == 4
            lines = gateway.metrics()
            assert 'marina_gateway_shadow_pictures_total{model="m",outcome="differing"} 4.0' in lines
            for label, change, number in (("cat", "lost", 4), ("cat", "steady", 4), ("dog", "gained", 4)):
                given = f'{{change="{change}",label="{label}",model="m"}} {number}.0'
                assert f"marina_gateway_shadow_detections_total{given}" in lines

    play(scene)


def test_of_a_share_of_nothing_nothing_is_seen(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Peer().up() as peer, Gateway(peer, tmp_path, share=0.0) as gateway:
            await gateway.ask(20)
            assert gateway.report.waiting == 0 and [model for model, _ in peer.asked] == ["m"] * 20
        assert not list(tmp_path.iterdir())

    play(scene)


@pytest.mark.parametrize("most", [{"queue": 2}, {"queue_bytes": 800}])
def test_a_candidate_that_hangs_is_late_and_the_rest_is_dropped(tmp_path: Path, most: dict[str, int]) -> None:
    async def scene() -> None:
        async with Peer().up() as peer, Gateway(peer, tmp_path, **most) as gateway:
            peer.late = True
            await gateway.ask(1)
            await until(lambda: len(peer.asked) == 2)
            await gateway.ask(10)
            assert (gateway.report.waiting, gateway.report.dropped) == (2, 8)
            await until(lambda: gateway.report.failed.count == 1)
            peer.late = False
            await until(lambda: gateway.report.compared + gateway.report.failed.count == 3)
            assert 'outcome="dropped"} 8.0' in gateway.metrics()

    play(scene)


def test_a_candidate_that_is_down_is_no_failure_and_is_found_again(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Peer().up() as peer, Gateway(peer, tmp_path) as gateway:
            for status in (503, 404):
                peer.dead = status
                await gateway.ask(3)
                await until(lambda: gateway.report.waiting == 0)
            await until(lambda: gateway.report.unreachable == 6)
            peer.dead = 500
            await gateway.ask(2)
            await until(lambda: gateway.report.failed.count == 2)
            peer.dead = None
            await gateway.ask(1)
            await until(lambda: gateway.report.compared == 1)
            assert gateway.report.failed.total == 3 and gateway.report.unreachable == 6

    play(scene)


def test_a_live_model_too_busy_to_say_what_it_is_stays_in_use(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Peer().up() as peer, Gateway(peer, tmp_path) as gateway:
            # At the start, and once more when the watch begins.
            await until(lambda: peer.described == 2)
            peer.busy = True
            await gateway.ask(1)
            await until(lambda: gateway.report.unreachable == 1)
            assert gateway.backend.up() == {"m": True}
            await gateway.ask(1)

    play(scene)


def test_without_its_server_the_live_model_answers_on(tmp_path: Path) -> None:
    async def scene() -> None:
        async with (
            Peer().up() as peer,
            Gateway(peer, tmp_path, url="http://127.0.0.1:9", token_file=tmp_path / "none") as gateway,
        ):
            await gateway.ask(3)
            await until(lambda: gateway.report.unreachable == 3)
            assert gateway.report.verdict.verdict == "hold" and gateway.report.candidate is None

    play(scene)


def test_counts_go_on_after_a_restart_until_a_model_is_another(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Peer().up() as peer:
            for _ in range(2):
                async with Gateway(peer, tmp_path) as gateway:
                    before = gateway.report.compared
                    await gateway.ask(2)
                    await until(lambda: gateway.report.compared == before + 2)  # noqa: B023  # called at once
            async with Gateway(peer, tmp_path) as gateway:
                await gateway.ask(1)
                await until(lambda: gateway.report.compared == 5)
                # The first picture shows it; from the next one on it counts.
                peer.versions["n"] = "3.0"
                await gateway.ask(3)
                await until(lambda: gateway.report.waiting == 0 and gateway.report.compared == 2)
                assert gateway.report.candidate and gateway.report.candidate.version == "3.0"
            async with Gateway(peer, tmp_path, moved_iou=0.8) as gateway:
                assert gateway.report.compared == 0

    play(scene)


def test_disagreements_are_captured_and_a_store_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with Peer().up() as peer:
            kept = tmp_path / "kept"
            async with Gateway(peer, tmp_path, capture=str(kept)) as gateway:
                await gateway.ask(1, picture=jpeg(0), classes="cat")
                await gateway.ask(1, picture=jpeg(1))
                await until(lambda: gateway.report.captured == 1)
                await gateway.ask(1, picture=b"no picture")
                await until(lambda: gateway.report.not_captured == 1)
                peer.rows["n"] = peer.rows["m"]
                await gateway.ask(1, picture=jpeg(2))
                await until(lambda: gateway.report.compared == 4)
                assert gateway.report.agreed.count == 1 and len(list(kept.glob("*/*.json"))) == 1
                released = threading.Event()
                monkeypatch.setattr(keeper_module, "write_item", lambda *_: released.wait(60))
                peer.rows["n"] = []
                for seed in (3, 4, 5):
                    await gateway.ask(1, picture=jpeg(seed))
                    await until(lambda: gateway.report.waiting == 0)
                try:
                    await until(lambda: gateway.report.compared == 7)
                    assert gateway.report.not_captured == 3
                finally:
                    released.set()

    play(scene)


@pytest.mark.parametrize(
    ("shadow", "told"),
    [
        ({"model": "x", "candidate": "n"}, "'x' is none of the models: m"),
        ({"model": "m", "candidate": "m"}, "is the live model itself"),
        ({"model": "m", "candidate": "n/"}, "NAME or NAME/VERSION"),
        ({"model": "m", "candidate": "n", "share": 1.5}, "less than or equal to 1"),
        ({"model": "m", "candidate": "n", "url": "ftp://x"}, "must be an address"),
        ({"model": "m", "candidate": "n", "capture": "kept"}, "neither an absolute folder nor s3://"),
        ({"model": "m", "candidate": "n", "bounds": {"max_lots": 0.1}}, "did you mean 'max_lost'"),
    ],
)
def test_settings_that_cannot_be_used(
    shadow: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"backends": [{"url": "http://x", "models": ["m"]}], "no_auth": True, "shadows": [shadow]}
    (tmp_path / "gateway.yaml").write_text(json.dumps({"gateway": content}))
    assert main(["gateway", "--config", str(tmp_path / "gateway.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and "shadows" in line


def test_paths_in_the_file_lie_beside_it(tmp_path: Path) -> None:
    shadow = {"model": "m", "candidate": "m", "url": "http://y", "token_file": "token"}
    content = {"backends": [{"url": "http://x", "models": ["m"]}], "no_auth": True, "shadows": [shadow]}
    (tmp_path / "gateway.yaml").write_text(json.dumps({"gateway": content | {"shadow_folder": "counts"}}))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = read_settings(parser.parse_args(["--config", str(tmp_path / "gateway.yaml")]))
    assert (settings.shadow_folder, settings.shadows[0].token_file) == (tmp_path / "counts", tmp_path / "token")


class Told:
    """A server that answers everything with `body` and `status`, and wants the key `k`."""

    def __init__(self) -> None:
        self.body, self.status = b"", 200


@pytest.fixture
def told() -> Iterator[tuple[Told, str]]:
    found = Told()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(found.status if self.headers["Authorization"] == "Bearer k" else 401)
            self.end_headers()
            self.wfile.write(found.body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_the_command_shows_reports_and_asks_for_a_verdict(
    told: tuple[Told, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = told
    (tmp_path / "key").write_text("k\n")
    command = ["shadow", "--url", url, "--token-file", str(tmp_path / "key")]
    good, bad = judged(record(1000, GOOD)), judged(record(1000, {"cat": counts_of(200, 0, 800)}))
    bad = bad.model_copy(update={"model": "other"})
    server.body = Reports(shadows=[good, bad]).model_dump_json().encode()
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "n 2.0 in the shadow of m 1.0" in text and "which model is right" in text
    assert "verdict: promote\n" in text and "verdict: reject\n" in text
    line = next(line for line in text.splitlines() if line.startswith("all")).split()
    assert line[:6] == ["all", "1000", "1000", "1.0", "%", "(0.5"]
    assert main([*command, "--require-verdict"]) == 1
    assert main([*command, "--require-verdict", "--model", "m"]) == 0
    capsys.readouterr()
    assert main([*command, "--json", "--model", "m"]) == 0
    assert Reports.model_validate_json(capsys.readouterr().out).shadows == [good]
    server.body = (
        Reports(shadows=[judged(record(10, GOOD)).model_copy(update={"candidate": None})]).model_dump_json().encode()
    )
    assert main([*command, "--require-verdict"]) == 1
    assert "verdict: hold; about 90 more pictures decide it" in capsys.readouterr().out


def test_the_command_says_why_there_is_no_report(
    told: tuple[Told, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = told
    (tmp_path / "key").write_text("k\n")
    with_key = ["--token-file", str(tmp_path / "key")]

    def line(*arguments: str) -> str:
        assert main(["shadow", "--url", *arguments]) == 1
        (found,) = capsys.readouterr().err.splitlines()
        return found

    assert "wants a key; give --token-file" in line(url)
    server.body = b'{"shadows": []}'
    assert "has no shadows" in line(url, *with_key)
    server.body = Reports(shadows=[judged(record(1, GOOD))]).model_dump_json().encode()
    assert "no shadow of model 'x'; it has those of m" in line(url, *with_key, "--model", "x")
    server.body = b"<html>"
    assert "gives no report of shadows" in line(url, *with_key)
    server.status = 404
    assert "tells nothing" in line(url, *with_key)
    assert "tells nothing" in line("http://127.0.0.1:9", *with_key)
    assert "tells nothing" in line("nothing", *with_key)
    assert "cannot be read" in line(url, "--token-file", str(tmp_path / "none"))
