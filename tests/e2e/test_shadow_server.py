"""A candidate in the shadow of a served model: the same weights at another threshold, on a TorchServe of its own."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http
from e2e.conftest import free_port, recipe_with, run_gateway

from tools.archive.build import build_archive
from tools.cli import main
from tools.gateway.auth import new_key
from tools.gateway.settings import Bounds, Server, Settings, Shadow, Video
from tools.serve.server import TorchServe
from tools.shadow.report import Report, Reports

pytestmark = pytest.mark.e2e

PATIENCE_S = 120
# Beside the live model's 0.4, so that all that it finds is found by the live model too.
THRESHOLD = 0.93
BOUNDS = Bounds(min_pictures=20, max_failed=0.2, max_latency=1000)
# Of few detections.
WIDE_BOUNDS = BOUNDS.model_copy(update={"max_lost": 0.6, "max_gained": 0.6, "max_moved": 0.6})


@pytest.fixture(scope="module")
def candidate(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """Serves `strict` 2.0."""
    folder = tmp_path_factory.mktemp("candidate")
    recipe = recipe_with(
        folder / "recipe",
        repository / "archives" / "shapes",
        name="strict",
        version="2.0",
        postprocess={"score_threshold": THRESHOLD, "class_agnostic": True},
        golden=[{"image": "golden/scene.jpg"}],
    )
    build_archive(recipe, folder / "store" / "strict.mar")
    with TorchServe(folder / "store", port=0) as server:
        yield server


class Gateway:
    """Before `live`, with all that it answers seen by the candidate."""

    def __init__(self, live: TorchServe, candidate: TorchServe, folder: Path, bounds: Bounds):
        folder.mkdir()
        self.key, line = new_key("tester")
        (folder / "keys").write_text(line)
        self.key_file = folder / "key"
        self.key_file.write_text(self.key)
        self.settings = Settings(
            backends=[Server(url=live.url, token_file=live.token_file, models=["shapes"])],
            keys_file=folder / "keys",
            port=free_port(),
            storage=str(folder / "uploads"),
            video=Video(folder=folder / "jobs"),
            shadow_folder=folder / "shadows",
            shadows=[
                Shadow(
                    model="shapes",
                    candidate="strict/2.0",
                    url=candidate.url,
                    token_file=candidate.token_file,
                    share=1.0,
                    queue=1000,
                    bounds=bounds,
                    capture=str(folder / "kept"),
                )
            ],
        )
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self.headers = {"Authorization": f"Bearer {self.key}"}

    def detect(self, picture: bytes, path: str = "detect", **fields: str) -> httpx.Response:
        answer = httpx.post(
            f"{self.url}/{path}", files={"file": picture}, data=fields, headers=self.headers, timeout=PATIENCE_S
        )
        answer.raise_for_status()
        return answer

    def infer(self, pictures: list[bytes]) -> None:
        """By KServe v2."""
        given = tritonclient.http.InferInput("pictures", [len(pictures)], "BYTES")
        given.set_data_from_numpy(np.array(pictures, dtype=object))
        with tritonclient.http.InferenceServerClient(
            self.url.removeprefix("http://"), network_timeout=PATIENCE_S
        ) as client:
            client.infer("shapes", [given], headers=dict(self.headers))

    @property
    def report(self) -> Report:
        answer = httpx.get(f"{self.url}/shadow", headers=self.headers, timeout=PATIENCE_S)
        answer.raise_for_status()
        (found,) = Reports.model_validate_json(answer.content).shadows
        return found

    def until(self, condition: Callable[[Report], object]) -> Report:
        deadline = time.monotonic() + PATIENCE_S
        while not condition(found := self.report):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found

    def command(self, *arguments: str) -> int:
        return main(["shadow", "--url", self.url, "--token-file", str(self.key_file), *arguments])


def found_by(server: TorchServe, name: str, picture: bytes) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {server.token}", "Marina-Format": "detections", "Content-Type": "image/jpeg"}
    answer = httpx.post(server.prediction_url(name), content=picture, headers=headers, timeout=PATIENCE_S)
    answer.raise_for_status()
    return answer.json()["detections"]


def are_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """But for the last digits, which batches round otherwise."""
    if [row["label"] for row in one] != [row["label"] for row in other]:
        return False
    return all(
        np.allclose([a["score"], *a["box"]], [b["score"], *b["box"]], atol=0.01)
        for a, b in zip(one, other, strict=True)
    )


def test_a_stricter_candidate_is_seen_through_and_harms_nothing_when_it_dies(
    shapes_server: TorchServe,
    candidate: TorchServe,
    pictures: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    live = [found_by(shapes_server, "shapes", picture) for picture in pictures]
    kept = [[row for row in rows if row["score"] > THRESHOLD] for rows in live]
    assert all(are_same(found_by(candidate, "strict", one), rows) for one, rows in zip(pictures, kept, strict=True))
    lost, total = sum(map(len, live)) - sum(map(len, kept)), sum(map(len, live))
    assert 0 < lost < total

    # With a threshold of the request's own they are the same.
    gateway = Gateway(shapes_server, candidate, tmp_path / "one", WIDE_BOUNDS)
    with run_gateway(gateway.settings):
        for picture in pictures * 7:
            gateway.detect(picture, score_threshold="0.5")
        found = gateway.until(lambda report: report.compared == 21)
        assert (found.agreed.count, found.captured, found.verdict.verdict) == (21, 0, "promote"), found
        assert gateway.command("--require-verdict") == 0
        assert "verdict: promote" in capsys.readouterr().out

    gateway = Gateway(shapes_server, candidate, tmp_path / "two", BOUNDS)
    with run_gateway(gateway.settings):
        assert httpx.get(f"{gateway.url}/shadow").status_code == 401
        # Once each in every way, the picture with boxes among them.
        for picture in pictures:
            gateway.detect(picture)
            gateway.detect(picture, "uploads")
            assert gateway.detect(picture, format="image").headers["content-type"] == "image/jpeg"
        gateway.infer(pictures)
        found = gateway.until(lambda report: report.compared == 12)
        assert (found.failed.count, found.unreachable, found.dropped) == (0, 0, 0)
        assert (found.overall.live, found.overall.lost.count) == (4 * total, 4 * lost)
        assert (found.overall.gained.count, found.overall.moved.count, found.overall.rescored.count) == (0, 0, 0)
        for row in found.classes:
            assert row.live == 4 * sum(one["label"] == row.label for rows in live for one in rows)
        same = sum(len(one) == len(other) for one, other in zip(live, kept, strict=True))
        assert found.agreed.count == 4 * same
        assert (found.verdict.verdict, found.verdict.more_pictures) == ("hold", 8)
        assert found.live and found.candidate and (found.live.version, found.candidate.version) == ("1.0", "2.0")
        _check_kept(tmp_path / "two" / "kept", live, kept)

    # Another start goes on counting.
    with run_gateway(gateway.settings):
        for picture in pictures * 3:
            gateway.detect(picture)
        found = gateway.until(lambda report: report.compared == 21)
        assert found.overall.lost.count == 7 * lost and found.verdict.verdict == "reject"
        assert gateway.command() == 0 and gateway.command("--require-verdict") == 1
        assert "verdict: reject" in capsys.readouterr().out

        candidate.close()
        for _ in range(3):
            assert are_same(gateway.detect(pictures[1]).json()["detections"], live[1])
        found = gateway.until(lambda report: report.unreachable == 3)
        assert found.compared == 21 and httpx.get(f"{gateway.url}/readyz").status_code == 200
        metrics = httpx.get(f"{gateway.url}/metrics", headers=gateway.headers).text
        assert 'marina_gateway_shadow_pictures_total{model="shapes",outcome="unreachable"} 3.0' in metrics


def _check_kept(folder: Path, live: list[list[dict[str, Any]]], kept: list[list[dict[str, Any]]]) -> None:
    """Each picture with a difference once, with both answers."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    assert documents and all(document["reasons"] == ["disagreement"] for document in documents)
    for document in documents:
        (which,) = (index for index, rows in enumerate(live) if are_same(rows, document["detections"]))
        assert len(kept[which]) < len(live[which])
        shadow = document["shadow"]
        assert (shadow["model"], shadow["version"]) == ("strict", "2.0")
        assert are_same(shadow["detections"], kept[which])
    assert len({document["image"] for document in documents}) == len(documents) <= len(live)
