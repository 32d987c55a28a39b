"""What the client takes for a picture, a video or a live source, and how it goes through them."""

import io
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools.client.sources import Shots, Unreadable, find_sources, one_shot
from tools.errors import ToolError
from tools.video.frames import Frame
from tools.video.writer import VideoWriter


def kinds(*sources: str | Path) -> list[tuple[str, str]]:
    return [(one.kind, Path(one.name).name) for one in find_sources(sources)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, a video, a text, and a folder with one more picture."""
    for name in ("b.PNG", "a.jpg", "clip.mp4", "notes.md", "deep/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Ten frames at 5 a second, each of one brightness: 20 times its number."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, Fraction(5)) as writer:
        for index in range(10):
            writer.write(Frame(index, index / 5, np.full((48, 64, 3), 20 * index, np.uint8)))
    return path


def test_a_folder_gives_its_pictures_and_videos_by_name(folder):
    assert kinds(folder) == [("picture", "a.jpg"), ("picture", "b.PNG"), ("video", "clip.mp4")]


def test_a_glob_goes_into_folders(folder):
    assert kinds(f"{folder}/**/*.jpg") == [("picture", "a.jpg"), ("picture", "c.jpg")]
    assert kinds(f"{folder}/*") == [("picture", "a.jpg"), ("picture", "b.PNG"), ("video", "clip.mp4")]


def test_a_list_names_sources_relative_to_itself(folder):
    (folder / "deep" / "list.txt").write_text("# mine\nc.jpg\n\n../a.jpg\nrtsp://camera/1\n0\nscreen:1,2,3,4\n")
    assert [one.kind for one in find_sources(folder / "deep" / "list.txt")] == ["picture"] * 2 + ["live"] * 3


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("0", "live"),
        ("/dev/video0", "live"),
        ("screen", "live"),
        ("screen:0,0,64,48", "live"),
        ("rtsp://user:secret@camera/1", "live"),
        ("https://example.org/a/stream.m3u8", "live"),
        ("https://example.org/a.mp4?x=1", "remote"),
        ("https://example.org/a%20b.JPG?size=large", "picture"),
    ],
)
def test_names_tell_what_a_source_is(source, kind):
    (found,) = find_sources(source)
    assert (found.kind, found.place) == (kind, source)


def test_a_file_goes_before_a_live_source_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").write_bytes(b"x")
    (tmp_path / "a[1].jpg").write_bytes(b"x")
    assert kinds("0", "a[1].jpg") == [("picture", "0"), ("picture", "a[1].jpg")]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere.jpg", "is not there"),
        ("*.nothing", "matches no pictures"),
        ("file:///etc/passwd", "unknown scheme"),
        ("nul\0.jpg", "is not there|cannot be read"),
        ("x" * 5000, "is not there|cannot be read"),
        ("https://youtu.be/abc", "needs yt-dlp"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(source, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolError, match=text):
        list(find_sources(source))


def test_of_several_those_that_are_nothing_say_so_and_the_others_go_on(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "list.txt").write_text("gone.jpg\na.jpg\nfile:///etc/passwd\n")
    (folder / "empty").mkdir()
    given = ["nowhere.jpg", "a.jpg", "empty", "*.nothing", "nul\0.jpg", "x" * 5000, "list.txt"]
    told = []
    for shot in Shots(find_sources(given)):
        try:
            told.append((shot.source, shot.load().decode()))
        except Unreadable as error:
            told.append((shot.source, str(error)))
    sources = ["nowhere.jpg", "a.jpg", "empty", "*.nothing", "nul\0.jpg", "x" * 200, "gone.jpg", "a.jpg"]
    assert [source for source, _ in told] == [*sources, "file:///etc/passwd"]
    assert told[0][1].startswith("is not there; give") and told[6][1].startswith("is not there; give")
    assert told[1][1] == told[7][1] == "x"
    assert "holds no pictures" in told[2][1] and "matches no pictures" in told[3][1] and "scheme" in told[8][1]


@pytest.mark.parametrize(("content", "text"), [("", "is empty"), ("list.txt\n", "another list")])
def test_bad_lists_and_empty_folders_are_refused(tmp_path, content, text):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ToolError, match=text):
        list(find_sources(tmp_path / "list.txt"))
    with pytest.raises(ToolError, match="holds no pictures"):
        list(find_sources(tmp_path))


@given(st.text(max_size=40))
def test_any_text_is_a_source_or_refused(text):
    if "://" not in text:
        with suppress(ToolError):
            list(find_sources(text))


@pytest.fixture
def web() -> Iterator[str]:
    """Answers any path with the path as the body, of the content type in its query; 404 for /gone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, kind = self.path.partition("?")
            self.send_response(404 if path.startswith("/gone") else 200)
            self.send_header("Content-Type", kind or "image/jpeg")
            self.end_headers()
            self.wfile.write(path.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_content_type_tells_where_the_name_does_not(web):
    urls = {
        "image/png": "picture",
        "multipart/x-mixed-replace;boundary=x": "live",
        "video/mp4": "remote",
        "": "picture",
    }
    assert [one.kind for one in find_sources(f"{web}/camera?{kind}" for kind in urls)] == list(urls.values())


def test_a_picture_is_fetched_when_its_turn_comes(web):
    assert one_shot(f"{web}/a.jpg").load() == b"/a.jpg"
    gone = one_shot(f"{web}/gone.jpg")
    with pytest.raises(Unreadable, match="404"):
        gone.load()
    with pytest.raises(ToolError, match="cannot be fetched"):
        one_shot("http://127.0.0.1:1/camera")


def test_a_video_gives_its_frames_as_jpeg(clip):
    shots = list(Shots(find_sources(clip)))
    assert [shot.frame for shot in shots] == list(range(10))
    assert [shot.seconds for shot in shots] == pytest.approx([index / 5 for index in range(10)])
    assert {shot.film for shot in shots} == {shots[0].film}
    assert shots[0].film.rate == 5
    assert {shot.source for shot in shots} == {str(clip)}
    with Image.open(io.BytesIO(shots[7].load())) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
        assert abs(np.asarray(image).mean() - 140) < 4


@pytest.fixture
def files(tmp_path: Path) -> Iterator[str]:
    """The address of the folder, whose server does not know of parts of files."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_of_a_video_behind_an_address_no_frame_is_lost(clip, files, tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "made"))
    url = f"{files}/clip.mp4"
    shots = Shots(find_sources(f"{url}?key=secret"), stride=3)
    taken = []
    for shot in shots:
        time.sleep(0.05)
        taken.append(shot)
    assert [shot.frame for shot in taken] == [0, 3, 6, 9]
    assert {shot.source for shot in taken} == {url} and taken[0].film.dropped == 0
    shots.close()
    assert not list((tmp_path / "made").iterdir())


def test_a_video_behind_an_address_that_cannot_be_had_is_one_line(files, tmp_path):
    (tmp_path / "none.mp4").write_bytes(b"no video")
    for name, said in (("gone.mp4", r"^cannot be fetched \(404 File not found\)$"), ("none.mp4", r"^cannot be opened")):
        (shot,) = Shots(find_sources(f"{files}/{name}"))
        with pytest.raises(Unreadable, match=said):
            shot.load()


def test_a_stride_leaves_frames_out(clip):
    shots = list(Shots(find_sources(clip), stride=4))
    assert [shot.frame for shot in shots] == [0, 4, 8]
    assert shots[0].film.rate == Fraction(5, 4)


def test_videos_that_are_none_or_break_off_say_so_and_the_others_go_on(clip, tmp_path):
    (tmp_path / "none.mp4").write_bytes(b"no video at all")
    (tmp_path / "torn.mp4").write_bytes(clip.read_bytes()[:-100])
    shots = list(Shots(find_sources([tmp_path / "none.mp4", tmp_path / "torn.mp4", clip])))
    none, *first, torn = shots[:-10]
    assert [shot.frame for shot in shots[-10:]] == list(range(10))
    assert [shot.frame for shot in first] == list(range(len(first)))
    with pytest.raises(Unreadable, match=r"^cannot be opened"):
        none.load()
    with pytest.raises(Unreadable, match=r"^is damaged near frame"):
        torn.load()


def test_closed_shots_give_no_more(clip):
    shots = Shots(find_sources([clip, clip]))
    assert next(shots).frame == 0
    shots.close()
    assert list(shots) == []


def test_of_many_pictures_none_is_read_before_its_turn(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    looked = []
    shots = Shots(find_sources(looked.append(index) or str(tmp_path / "a.jpg") for index in range(5)))
    assert [next(shots).load() for _ in range(3)] == [b"x"] * 3
    assert looked == [0, 1, 2]
