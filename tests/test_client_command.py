"""`marina predict` from its flags to its exit code, against a server of our own."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.client.command import add_arguments, run
from tools.errors import ToolError
from tools.video.frames import Frame, VideoFile
from tools.video.writer import VideoWriter

FOUND = {"label": "dog", "index": 3, "score": 0.9, "box": [4, 4, 24, 24]}


class Server(BaseHTTPRequestHandler):
    """Finds one dog in every picture, and says no to what is no JPEG. before: called with each request."""

    seen: list[Any]
    before: Callable[[], None] = staticmethod(lambda: None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.headers)
        self.before()
        if body.endswith(b"\xff\xd9"):
            content: dict[str, Any] = {"model": "m", "version": "1", "width": 32, "height": 32, "detections": [FOUND]}
        else:
            content = {"code": 400, "type": "InvalidImage", "message": "the picture is torn"}
        text = json.dumps(content).encode()
        self.send_response(content.get("code", 200))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    kind = type("Own", (Server,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        kind.url = f"http://127.0.0.1:{running.server_port}"
        yield kind
        running.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, the second one torn, a video of six frames, and one more picture of the first one's name."""
    source = tmp_path / "source"
    (source / "more").mkdir(parents=True)
    for name in ("a.jpg", "c.jpg", "more/a.jpg"):
        Image.new("RGB", (32, 32), "white").save(source / name)
    (source / "b.jpg").write_bytes(b"\xff\xd8torn")
    with VideoWriter(source / "d.mp4", 32, 32, Fraction(10)) as writer:
        for index in range(6):
            writer.write(Frame(index, index / 10, np.full((32, 32, 3), 255, np.uint8)))
    return source


def predict(server: Any, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*map(str, arguments), "--url", server.url, "--model", "m"]))


def test_everything_at_once(server, folder, tmp_path, capfd):
    out = tmp_path / "out"
    flags = ("--format", "yolo", "--save", out, "--save-crops", "--vid-stride", 2, "--track", "--line-width", 3)
    assert predict(server, folder, folder / "more" / "a.jpg", *flags) == 1
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == [
        "a-2.jpg",
        "a.jpg",
        "c.jpg",
        "crops/dog/a-1.jpg",
        "crops/dog/a-2-1.jpg",
        "crops/dog/c-1.jpg",
        *(f"crops/dog/d/{frame:06d}-1.jpg" for frame in (0, 2, 4)),
        "d.mp4",
        "labels/a-2.txt",
        "labels/a.txt",
        "labels/c.txt",
        *(f"labels/d/{frame:06d}.txt" for frame in (0, 2, 4)),
    ]
    with VideoFile(out / "d.mp4") as video:
        assert (len(list(video)), video.rate) == (3, 5)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"marina: {folder}/b.jpg: the picture is torn (400 InvalidImage)",
        "marina: 6 pictures, 6 detections; 1 without an answer",
    ]


def test_of_several_sources_one_that_is_missing_is_told_and_the_others_are_asked_about(server, folder, capfd):
    (folder / "list.txt").write_text("gone.jpg\nc.jpg\n")
    assert predict(server, folder / "a.jpg", folder / "none.jpg", folder / "list.txt", "--format", "jsonl") == 1
    said = capfd.readouterr()
    assert ["error" in json.loads(line) for line in said.out.splitlines()] == [False, True, True, False]
    assert said.err.splitlines()[0].startswith(f"marina: {folder}/none.jpg: is not there; give a picture")
    assert said.err.splitlines()[-1] == "marina: 2 pictures, 2 detections; 2 without an answer"


def test_a_single_source_that_is_missing_is_one_line(server, folder):
    with pytest.raises(ToolError, match=r"none.jpg is not there; give a picture"):
        predict(server, folder / "none.jpg")
    assert server.seen == []


def test_flags_become_options_and_the_token_is_sent(server, folder, tmp_path, capfd):
    (tmp_path / "token").write_text("s3cret\n")
    flags = ("--conf", 0.4, "--iou", 0.5, "--max-det", 7, "--agnostic-nms")
    flags = (*flags, "--token-file", tmp_path / "token", "--format", "jsonl", "--classes", "dog,cat")
    assert predict(server, *flags, folder / "a.jpg") == 0
    (headers,) = server.seen
    sent = {name: value for name, value in headers.items() if name.startswith("Marina-")}
    assert sent == {
        "Marina-Format": "detections",
        "Marina-Score-Threshold": "0.4",
        "Marina-Iou-Threshold": "0.5",
        "Marina-Max-Detections": "7",
        "Marina-Classes": "dog,cat",
        "Marina-Class-Agnostic": "true",
    }
    assert headers["Authorization"] == "Bearer s3cret"
    assert json.loads(capfd.readouterr().out)["detections"] == [FOUND]


def test_a_file_of_settings_says_the_same(server, folder, tmp_path, capfd):
    (tmp_path / "marina.yaml").write_text("predict: {conf: 0.3, format: csv, token_file: token}")
    (tmp_path / "token").write_text("t")
    assert predict(server, folder / "a.jpg", "--config", tmp_path / "marina.yaml") == 0
    assert server.seen[0]["Marina-Score-Threshold"] == "0.3"
    assert capfd.readouterr().out.startswith("source,frame")


def test_tracks_are_numbered_anew_in_each_video(server, folder, capfd):
    assert predict(server, folder / "d.mp4", folder / "d.mp4", "--track", "--format", "jsonl") == 0
    frames = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [one["frame"] for one in frames] == [*range(6), *range(6)]
    tracks = [one["detections"][0].get("track") for one in frames]
    assert tracks[:6] == tracks[6:]
    assert tracks[5] is not None


def test_drawn_boxes_differ_by_the_flags(server, folder, tmp_path):
    drawn = {}
    for name, flags in {"all": (), "bare": ("--hide-labels", "--hide-scores"), "thick": ("--line-width", "6")}.items():
        assert predict(server, folder / "a.jpg", "--save", tmp_path / name, *flags) == 0
        with Image.open(tmp_path / name / "a.jpg") as image:
            drawn[name] = int((np.asarray(image) < 200).any(axis=2).sum())
    assert 0 < drawn["bare"] < drawn["all"] != drawn["thick"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--save-crops",), "say where with --save"),
        (("--format", "yolo"), "say where with --save"),
        (("--conf", "1.5"), "conf"),
        (("--concurrency", "0"), "concurrency"),
        (("--save", "."), "could be overwritten"),
        (("--save", "a.jpg"), "--save a.jpg cannot be a folder"),
        (("--save", "a.jpg/x"), "--save a.jpg/x cannot be a folder"),
        (("--token-file", "nowhere"), "token-file nowhere cannot be read"),
        (("--view",), "cannot open a window"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(server, folder, arguments, text, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(ToolError, match=text):
        predict(server, "a.jpg", *arguments)
    assert server.seen == []


def test_an_interrupt_leaves_a_whole_video_of_what_came_so_far(server, folder, tmp_path, capfd):
    main = threading.get_ident()
    done = threading.Event()

    def before() -> None:
        if len(server.seen) == 5:
            # Of two that are held at most this is one, so three are written.
            signal.pthread_kill(main, signal.SIGINT)
            done.wait(60)

    server.before = staticmethod(before)
    with pytest.raises(KeyboardInterrupt):
        predict(server, folder / "d.mp4", "--save", tmp_path / "out", "--concurrency", 1)
    done.set()
    assert "detections" in capfd.readouterr().err
    with VideoFile(tmp_path / "out" / "d.mp4") as video:
        assert 3 <= len(list(video)) <= 4


def test_an_interrupt_before_the_first_frame_is_written_is_no_error(server, folder, tmp_path, capfd, monkeypatch):
    def write(self: VideoWriter, frame: Frame) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        predict(server, folder / "d.mp4", "--save", tmp_path / "out")
    told = capfd.readouterr().err
    assert "there was no frame" in told and "1 pictures, " in told
    assert list((tmp_path / "out").iterdir()) == []


def test_a_server_that_goes_down_leaves_no_half_video(server, folder, tmp_path):
    def before() -> None:
        if len(server.seen) > 3:
            raise ConnectionResetError

    server.before = staticmethod(before)
    server.finish = lambda self: None
    with pytest.raises(ToolError, match="the connection was lost"):
        predict(server, folder / "d.mp4", "--save", tmp_path / "out", "--concurrency", 1)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_file()] == []


@pytest.mark.parametrize("arguments", [(), ("--format", "jsonl"), ("--format", "coco")])
def test_a_full_disk_is_one_line(server, folder, arguments, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(ToolError, match=r"the output cannot be written \(No space left on device\); make room"):
            predict(server, folder, *arguments)
        # Or Python would complain once more at its end.
        assert full.closed
