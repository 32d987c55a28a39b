"""`marina bench protocols` on a real TorchServe and a real gateway."""

import json
from pathlib import Path

import pytest

from handlers.settings import parse_settings
from tools.archive.reader import open_archive
from tools.bench.protocols.compare import Picture, described_model, measure, torchserve_address
from tools.bench.protocols.gateway import gateway_before
from tools.bench.protocols.ways import all_ways
from tools.cli import main
from tools.errors import ToolError
from tools.serve.server import TorchServe

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]


@pytest.fixture(scope="module")
def pictures(pictures: list[bytes]) -> list[Picture]:
    return [Picture(f"{index}.jpg", body) for index, body in enumerate(pictures)]


def test_every_way_is_measured_and_finds_the_same(
    shapes_server: TorchServe, pictures: list[Picture], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in pictures:
        (tmp_path / picture.name).write_bytes(picture.body)
    arguments = ["bench", "protocols", str(shapes_server.archives[0].path), "--rounds", "1", "--image"]
    arguments += [str(tmp_path / picture.name) for picture in pictures]
    arguments += ["--report", str(tmp_path / "a.json"), "--chart", str(tmp_path / "a.png")]

    assert main([*arguments, "--concurrency", "1", "2"]) == 0

    report = json.loads((tmp_path / "a.json").read_text())
    assert report["pictures"] == ["0.jpg", "1.jpg", "2.jpg"]
    rows = report["rows"]
    assert len(rows) == 20 and [row["connections"] for row in rows] == [1] * 10 + [2] * 10
    assert all(row["calls"] == 3 and row["difference"] is None for row in rows)
    one = {row["way"]: row for row in rows[:10]}
    assert one["REST picture"]["bytes_out"] == round(sum(len(picture.body) for picture in pictures) / 3)
    assert one["v2 gRPC tensor, raw"]["bytes_out"] > 100 * one["v2 gRPC BYTES"]["bytes_out"]
    assert (
        one["v2 REST tensor"]["bytes_back"]
        > one["v2 gRPC tensor"]["bytes_back"]
        > 50 * one["gRPC picture"]["bytes_back"]
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert shown.out.count("v2 gRPC BYTES") == 2
    assert str(shapes_server.token) not in shown.out + (tmp_path / "a.json").read_text()


def test_no_way_answers_what_is_no_picture(shapes_server: TorchServe, pictures: list[Picture]) -> None:
    with open_archive(shapes_server.archives[0].path) as archive:
        settings = parse_settings(archive.config["handler"])
    notes = Picture("notes.txt", b"no picture")
    with gateway_before(shapes_server, "shapes") as gateway:
        for way in all_ways(torchserve_address(shapes_server), gateway, described_model(gateway, settings)):
            with pytest.raises(ToolError, match=rf"^{way.name}, notes\.txt: .*(no|none of) JPEG, PNG"):
                measure([way], [pictures[0], notes], [1], 1)
