"""A served model, asked over HTTP, is judged as its archive is."""

from pathlib import Path

import pytest

from tools.data.dataset import read_dataset
from tools.data.drawn_set import DrawSettings, draw_dataset
from tools.evaluate.evaluation import RATES, evaluate
from tools.evaluate.sources import ServerSource, archive_source
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e


def test_a_server_and_its_archive_get_the_same_figures(shapes_server: TorchServe, tmp_path: Path) -> None:
    draw_dataset(DrawSettings(output=tmp_path / "set", pictures=[0, 0, 12], workers=1))
    dataset = read_dataset(tmp_path / "set")
    (served,) = shapes_server.archives
    with archive_source(served.path) as source:
        local = evaluate(source, dataset, "test")
    remote = evaluate(ServerSource(shapes_server.prediction_url("shapes"), shapes_server.token), dataset, "test")
    for one, other in zip(local.counts, remote.counts, strict=True):
        assert one.tolist() == other.tolist()
    for rate in RATES:
        assert remote.values()[rate] == local.values()[rate] > 0.5
    assert remote.confusion.tolist() == local.confusion.tolist()
    assert remote.curves.best(2) == pytest.approx(local.curves.best(2), abs=0.002)
    assert remote.speed()["inference"] > 0 and "cannot ask for more" in remote.setting
    assert remote.notes == []
