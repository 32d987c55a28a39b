"""The client against a real TorchServe, and a real gateway before it, over every protocol."""

import argparse
import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from e2e.conftest import SIZES
from numpy.random import default_rng

from tools.client import retry
from tools.client.client import Client
from tools.client.command import add_arguments, run
from tools.client.errors import ServerRefused
from tools.data.draw import draw_scene
from tools.gateway.settings import Settings
from tools.serve.server import TorchServe
from tools.video.frames import Frame, VideoFile
from tools.video.writer import VideoWriter

pytestmark = pytest.mark.e2e
WAYS = ("rest", "grpc", "kserve by rest", "kserve by grpc")


@pytest.fixture(scope="module")
def ways(shapes_server: TorchServe, shapes_gateway: tuple[Settings, str]) -> Mapping[str, Mapping[str, Any]]:
    """What the client must be told, for each way in."""
    token = shapes_server.token
    settings, key = shapes_gateway
    return {
        "rest": {"url": shapes_server.url, "protocol": "rest", "token": token},
        "grpc": {"url": f"grpc://127.0.0.1:{shapes_server.grpc_port}", "protocol": "grpc", "token": token},
        "kserve by rest": {"url": f"http://127.0.0.1:{settings.port}", "protocol": "kserve", "token": key},
        "kserve by grpc": {"url": f"grpc://127.0.0.1:{settings.grpc_port}", "protocol": "kserve", "token": key},
    }


def test_all_ways_in_give_the_same_detections(ways, pictures):
    answers = {}
    for way, how in ways.items():
        with Client(model="shapes", **how, options={"score_threshold": 0.05}) as client:
            timed = list(client.predict_many(pictures))
        assert all(answer.timing_ms.keys() == timed[0].timing_ms.keys() != set() for answer in timed), way
        answers[way] = [replace(answer, timing_ms={}) for answer in timed]
    assert all(answer.detections for answer in answers["rest"])
    assert [(answer.width, answer.height) for answer in answers["rest"]] == list(SIZES)
    for way in WAYS:
        assert answers[way] == answers["rest"], way


@pytest.mark.parametrize("way", WAYS)
def test_options_reach_the_model(ways, pictures, way):
    with Client(model="shapes", **ways[way]) as client:
        plain = client.predict(pictures[1])
    label = plain.detections[0].label
    with Client(
        model="shapes", version="1.0", **ways[way], options={"classes": [label], "max_detections": 1}
    ) as client:
        assert client.predict(pictures[1]).detections == plain.detections[:1]


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_picture_is_refused_and_the_others_are_answered(ways, pictures, way):
    torn = pictures[0][:200]
    with Client(model="shapes", **ways[way]) as client:
        with pytest.raises(ServerRefused) as caught:
            client.predict(b"no picture")
        errors = [answer.error for answer in client.predict_many([torn, *pictures, b"no picture"])]
    assert caught.value.status == 415
    assert [error is None for error in errors] == [False, True, True, True, False]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("picture", "status", "kind"),
    [
        (b"", 400, "EmptyBody"),
        (b"xx", 415, "UnsupportedMedia"),
        (b"\xff\xd8\xff", 400, "InvalidImage"),
        (b"BM" + bytes(90), 400, "InvalidImage"),
    ],
)
def test_a_refusal_bears_one_name_whichever_way_in(ways, way, picture, status, kind):
    with Client(model="shapes", **ways[way]) as client, pytest.raises(ServerRefused) as caught:
        client.predict(picture)
    assert (caught.value.status, caught.value.kind, caught.value.of_picture) == (status, kind, True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "wrong",
    [{"token": "wrong"}, {"token": None}, {"model": "nope"}, {"version": "9"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_token_or_model_ends_the_run(ways, pictures, way, wrong):
    with Client(**{"model": "shapes", **ways[way], **wrong}) as client, pytest.raises(ServerRefused) as caught:
        list(client.predict_many(pictures))
    if "token" in wrong:
        assert caught.value.status in (400, 401, 403)
        assert "--token-file" in str(caught.value)
    else:
        assert caught.value.status == 404


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_class_is_refused(ways, pictures, way):
    told = pytest.raises(ServerRefused, match=r"unknown class 'unicorn'.*circle")
    with Client(model="shapes", **ways[way], options={"classes": "unicorn"}) as client, told:
        client.predict(pictures[0])


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_picture_too_large_for_the_server_is_refused_alone(ways, pictures, way):
    huge = pictures[0] + bytes(40_000_000)
    with Client(model="shapes", **ways[way]) as client:
        first, second = client.predict_many([huge, pictures[0]])
    assert "413" in str(first.error)
    assert second.error is None


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_full_queue_is_waited_for(ways, shapes_server, pictures, way, monkeypatch):
    """TorchServe's queue holds 100 requests; it says 503 to more, over gRPC INTERNAL."""
    processes = psutil.Process(shapes_server.pid).children(recursive=True)
    workers = [process for process in processes if "model_service_worker" in " ".join(process.cmdline())]
    refused = threading.Event()
    jitter = retry.random.uniform
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: refused.set() or jitter(low, high))

    def let_go() -> None:
        refused.wait(60)
        for worker in workers:
            worker.resume()

    for worker in workers:
        worker.suspend()  # the fastest machine has a full queue then
    threading.Thread(target=let_go).start()
    with Client(model="shapes", **ways[way], concurrency=140, retries=20, timeout=120) as client:
        answers = list(client.predict_many([pictures[2]] * 140))  # the quickest one
    assert {answer.error for answer in answers} == {None}
    assert refused.is_set()


@pytest.mark.parametrize("way", WAYS)
def test_the_command_on_a_folder_with_a_video_and_a_torn_file(ways, pictures, way, tmp_path: Path, capfd):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a.jpg").write_bytes(pictures[0])
    (source / "b.jpg").write_bytes(pictures[0][:200])
    with VideoWriter(source / "c.mp4", 160, 120, Fraction(10)) as writer:
        pixels = np.asarray(draw_scene(default_rng(3), 160, 120)[0])
        for index in range(4):
            writer.write(Frame(index, index / 10, np.roll(pixels, 4 * index, axis=1)))
    (tmp_path / "token").write_text(ways[way]["token"])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = ["--url", ways[way]["url"], "--protocol", ways[way]["protocol"], "--token-file", str(tmp_path / "token")]
    flags += ["--model", "shapes", "--save", str(out), "--format", "jsonl", "--track"]
    assert run(parser.parse_args([str(source), *flags])) == 1
    said = capfd.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [(Path(line["source"]).name, line.get("frame"), "error" in line) for line in lines] == [
        ("a.jpg", None, False),
        ("b.jpg", None, True),
        *(("c.mp4", frame, False) for frame in range(4)),
    ]
    assert "5 pictures" in said.err and "1 without an answer" in said.err
    assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "c.mp4"]
    with VideoFile(out / "c.mp4") as video:
        assert len(list(video)) == 4
