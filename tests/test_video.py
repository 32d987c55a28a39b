"""Videos in every state, streams that die, and what is written of them. The files are real ones, made here."""

import asyncio
import gc
import io
import json
import re
import shutil
import socket
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import ExifTags, Image, ImageOps

from tools.errors import ToolError
from tools.video import frames as frames_module
from tools.video.frames import Frame, LiveStream, VideoFile, stream
from tools.video.overlay import Overlay
from tools.video.run import Cancelled, Summary, annotate
from tools.video.writer import VideoWriter

BITS = 10
SOUND_RATE = 44_100


def numbered(number, width=160, height=96):
    """A picture that says its number: a grey stripe for each bit, so that no coder loses it; brighter at the top."""
    stripes = [(number >> bit & 1) * 200 + 20 for bit in range(BITS)]
    row = np.array(stripes, np.uint8)[np.arange(width) * BITS // width]
    pixels = np.broadcast_to(row[None, :, None], (height, width, 3)).copy()
    pixels[: height // 2] += 30
    return pixels


def number_of(pixels):
    """The number on a picture, read near its lower border, where no test draws."""
    width = pixels.shape[1]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum((int(pixels[-8, middle, 0]) > 120) << bit for bit, middle in enumerate(middles))


def make_video(path, count=30, *, size=(160, 96), rate=30, codec="libx264", sound=None, seconds=None, **how):
    """seconds: the times of the frames, evenly by `rate` without. sound: a codec; a tone of 440 Hz of 0.5 s more."""
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=options) as container:
        video = container.add_stream(codec, rate)
        video.width, video.height = size
        video.pix_fmt = how.get("pix_fmt", "yuv420p")
        video.codec_context.time_base = Fraction(1, 90_000) if codec == "libx264" else 1 / Fraction(rate)
        video.codec_context.gop_size = 10
        if "rotation" in how:
            video.set_display_rotation(how["rotation"], hflip=how.get("mirrored", False))
        heard = (
            container.add_stream(sound, 48_000 if sound == "libopus" else SOUND_RATE, layout="stereo")
            if sound
            else None
        )
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size))
            frame.time_base = video.codec_context.time_base
            time = seconds[number] if seconds else number / Fraction(rate)
            frame.pts = round(time / frame.time_base)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if heard:
            samples = np.arange(round((count / rate + 0.5) * SOUND_RATE))
            wave = (np.sin(samples * 2 * np.pi * 440 / SOUND_RATE) * 8000).astype(np.int16)
            tone = av.AudioFrame.from_ndarray(wave.repeat(2)[None], format="s16", layout="stereo")
            tone.sample_rate, tone.pts = SOUND_RATE, 0
            container.mux(heard.encode(tone))
            container.mux(heard.encode())
    return path


def silence():
    frame = av.AudioFrame.from_ndarray(np.zeros((2, 11_520), np.float32), format="fltp", layout="stereo")
    frame.sample_rate = SOUND_RATE
    return frame


def sound_packets(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def copy_video(source, output, *, sound=True, **options):
    with VideoFile(source, **options) as video:
        audio_from = source if sound else None
        with VideoWriter(output, video.width, video.height, video.rate, audio_from) as writer:
            for frame in video:
                writer.write(frame)
    return output


def run_annotate(video, ask, writer=None, overlay=None, jsonl=None, **how):
    progress = how.get("progress", lambda done: None)
    cancelled = how.get("cancelled", lambda: False)
    return asyncio.run(annotate(video, ask, writer, overlay, jsonl, how.get("concurrency", 4), progress, cancelled))


async def nothing(body):
    return []


def found(label="thing", box=(8.0, 20.0, 60.0, 60.0), score=0.9, index=0):
    return {"label": label, "index": index, "score": score, "box": list(box)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 60, sound="aac")


# What comes out of files


def test_every_frame_comes_in_order_with_its_time(clip):
    with VideoFile(clip) as video:
        assert (video.width, video.height, video.rate, video.frames, video.has_audio) == (160, 96, 30, 60, True)
        for number, frame in enumerate(video):
            assert frame.index == number == number_of(frame.pixels)
            assert frame.seconds == pytest.approx(number / 30, abs=1e-6)
            assert frame.pixels.dtype == np.uint8 and frame.pixels.shape == (96, 160, 3)
        assert number == 59 and video.damaged is None


def test_a_stride_takes_every_nth_frame_and_divides_the_rate(clip):
    with VideoFile(clip, stride=7) as video:
        assert (video.rate, video.frames) == (Fraction(30, 7), 9)
        assert [(frame.index, number_of(frame.pixels)) for frame in video] == [(n, n) for n in range(0, 60, 7)]


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(tmp_path, rotation, mirrored):
    plain = list(VideoFile(make_video(tmp_path / "plain.mp4", 2)))[1]
    path = make_video(tmp_path / "turned.mp4", 2, rotation=rotation, mirrored=mirrored)
    with VideoFile(path) as video:
        frame = list(video)[1]
        assert frame.pixels.shape == (video.height, video.width, 3)
    with av.open(str(path)) as container:
        turned = next(container.decode(video=0))
        assert turned.rotation % 360 == rotation or mirrored
    expected = np.rot90(plain.pixels, rotation // 90)
    assert np.array_equal(frame.pixels, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_frames_with_exif_as_cameras_write_it_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(numbered(5))
    picture.save(tmp_path / "frame.jpg", quality=95, exif=exif)
    path = tmp_path / "camera.mjpeg"
    path.write_bytes((tmp_path / "frame.jpg").read_bytes() * 3)
    with Image.open(tmp_path / "frame.jpg") as image, VideoFile(path) as video:
        upright = np.asarray(ImageOps.exif_transpose(image)).astype(int)
        frames = list(video)
    assert len(frames) == 3 and frames[0].pixels.shape == upright.shape
    assert np.abs(frames[0].pixels - upright).mean() < 5


def test_times_of_a_variable_rate_are_kept(tmp_path):
    times = [0.0, 0.1, 0.15, 0.9, 1.0, 1.05, 2.5]
    source = make_video(tmp_path / "variable.mp4", len(times), seconds=times)
    with VideoFile(copy_video(source, tmp_path / "out.mp4")) as written:
        assert [(number_of(frame.pixels)) for frame in written] == list(range(len(times)))
    with VideoFile(tmp_path / "out.mp4") as written:
        assert [frame.seconds for frame in written] == pytest.approx(times, abs=1e-4)


def test_times_that_run_backwards_are_put_in_order(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 160, 96, Fraction(30)) as writer:
        for number, seconds in enumerate((0.0, 0.5, 0.4, 0.4, 1.0)):
            writer.write(Frame(number, seconds, numbered(number)))
    with VideoFile(tmp_path / "out.mp4") as written:
        times = [frame.seconds for frame in written]
    assert times == sorted(set(times)) and len(times) == 5 and times[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("suffix", "codec", "said"),
    [("mp4", "libx264", "cut|of 120 frames"), ("avi", "mpeg4", "cut|of 120 frames"), ("mkv", "libx264", r"of 4\.0 s")],
)
def test_a_broken_tail_ends_the_frames_and_is_told(tmp_path, suffix, codec, said):
    path = make_video(tmp_path / f"whole.{suffix}", 120, codec=codec)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    jsonl = io.StringIO()
    with VideoFile(cut) as video, VideoWriter(tmp_path / "out.mp4", 160, 96, video.rate, cut) as writer:
        summary = run_annotate(video, nothing, writer, None, jsonl)
        assert summary.damaged is not None and video.damaged == summary.damaged
        assert str(cut) in summary.damaged and "\n" not in summary.damaged
        assert pytest.approx(summary.frames, abs=50) == 60
    with VideoFile(tmp_path / "out.mp4") as written:
        numbers = [number_of(frame.pixels) for frame in written]
        # What is shown last is not what was coded last: near the cut, one frame may be there without its neighbour.
        assert numbers[:-3] == list(range(summary.frames - 3)) and numbers == sorted(set(numbers))
    assert len(jsonl.getvalue().splitlines()) == summary.frames
    assert re.search(said, summary.damaged)


def test_a_file_cut_between_two_frames_is_told_by_their_count(tmp_path):
    path = make_video(tmp_path / "whole.mp4", 40)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[30]])
    with VideoFile(path) as video:
        assert 20 < len(list(video)) <= 30
    assert video.damaged is not None and video.damaged.endswith(": it ends after 30 of 40 frames")


def test_bytes_spoiled_in_the_middle_do_not_end_a_video(tmp_path):
    path = make_video(tmp_path / "clip.ts", 120)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    path.write_bytes(content)
    with VideoFile(path) as video:
        numbers = [number_of(frame.pixels) for frame in video]
    assert numbers[0] == 0 and numbers[-1] == 119 and len(numbers) > 90


def test_a_file_without_a_video_stream(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        heard = container.add_stream("aac", SOUND_RATE)
        container.mux(heard.encode(silence()))
        container.mux(heard.encode())
    with pytest.raises(ToolError, match=r"song\.m4a has no video stream"):
        VideoFile(path)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        heard = container.add_stream("aac", SOUND_RATE)
        cover = container.add_stream("png", 1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(0, 16, 16))))
        container.mux(cover.encode())
        container.mux(heard.encode(silence()))
        container.mux(heard.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ToolError, match="no video stream"):
        VideoFile(path)


def test_a_file_without_frames(tmp_path, clip):
    content = clip.read_bytes()
    path = tmp_path / "empty.mp4"
    path.write_bytes(content[: content.index(b"mdat") + 4])  # the index is in front
    with pytest.raises(ToolError, match=r"empty\.mp4 has no frame"):
        VideoFile(path)


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 100, b"\x00" * 5000])
def test_a_file_that_is_no_video(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ToolError, match=r"clip\.mp4 cannot be opened as a video"):
        VideoFile(path)


def test_a_missing_file_and_names_that_look_like_addresses(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolError, match="no such file"):
        VideoFile(tmp_path / "none.mp4")
    odd = tmp_path / "concat:a|b.mp4"
    odd.write_bytes(clip.read_bytes())
    assert len(list(VideoFile(odd))) == 60


@pytest.mark.parametrize(
    "list_of_files",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{0}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{0}'\n"],
)
def test_a_list_that_names_other_files_is_not_followed(tmp_path, list_of_files):
    make_video(tmp_path / "secret.ts", 5)
    path = tmp_path / "clip.mp4"
    path.write_text(list_of_files.format("secret.ts"))
    with pytest.raises(ToolError, match="cannot be opened"):
        VideoFile(path)


def test_frames_of_absurd_size_are_refused_before_they_are_decoded(clip, monkeypatch):
    monkeypatch.setattr(frames_module, "MAX_PIXELS", 160 * 96 - 1)
    with pytest.raises(ToolError, match="160x96, more than 15359 pixels"):
        VideoFile(clip)


def test_a_stride_of_nothing(clip):
    with pytest.raises(ToolError, match="stride of 0"):
        VideoFile(clip, stride=0)


def test_a_closed_video_has_no_more_frames(clip):
    with VideoFile(clip) as video:
        next(video)
    assert list(video) == []


# What is written


def test_a_video_of_300_frames_comes_back_annotated_whole_and_with_its_sound(tmp_path):
    source = make_video(tmp_path / "source.mp4", 300, sound="aac")
    output, jsonl, done = tmp_path / "out.mp4", io.StringIO(), []

    async def ask(body):
        image = Image.open(io.BytesIO(body))
        assert image.format == "JPEG" and image.size == (160, 96)
        assert image.quantization[0][0] == 2  # libjpeg's for a quality of 95
        number = number_of(np.asarray(image.convert("RGB")))
        await asyncio.sleep(0.006 if number % 5 == 0 else 0)  # answers come out of order
        return [found(str(number))]

    with VideoFile(source) as video, VideoWriter(output, video.width, video.height, video.rate, source) as writer:
        summary = run_annotate(video, ask, writer, Overlay([]), jsonl, progress=done.append)
        assert not output.exists()

    assert summary == Summary(300, 300, None) and done == list(range(1, 301))
    lines = [json.loads(line) for line in jsonl.getvalue().splitlines()]
    assert [line["frame"] for line in lines] == list(range(300))
    assert [line["detections"] for line in lines] == [[found(str(number))] for number in range(300)]
    assert [line["seconds"] for line in lines] == pytest.approx([number / 30 for number in range(300)], abs=1e-5)
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (300, 30, 160, 96)
        assert stream.duration * stream.time_base == 10
    assert sound_packets(output) == sound_packets(source)
    content = output.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with VideoFile(output) as written:
        for number, frame in enumerate(written):
            assert number_of(frame.pixels) == number
            red, green, blue = frame.pixels[40, 8].astype(int)
            assert red > blue + 80 and green > blue + 40  # the box, in the orange of class 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out.mp4", "source.mp4"]


def test_a_stride_divides_the_rate_of_the_output_and_keeps_length_and_sound(clip, tmp_path):
    output = copy_video(clip, tmp_path / "out.mp4", stride=3)
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.duration * stream.time_base) == (20, 10, 2)
    assert sound_packets(output) == sound_packets(clip)
    with VideoFile(output) as written:
        assert [number_of(frame.pixels) for frame in written] == list(range(0, 60, 3))


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001) / 7, Fraction(1, 2), Fraction(240)])
def test_any_constant_rate_stays_exactly_that(tmp_path, rate):
    with VideoWriter(tmp_path / "out.mp4", 160, 96, rate) as writer:
        for number in range(9):
            writer.write(Frame(number, float(number / rate), numbered(number)))
    with VideoFile(tmp_path / "out.mp4") as written:
        assert (written.rate, written.frames, written.has_audio) == (rate, 9, False)


def test_the_milliseconds_of_matroska_become_the_rate_that_they_mean(tmp_path):
    with VideoFile(copy_video(make_video(tmp_path / "clip.mkv", 30), tmp_path / "out.mp4")) as written:
        assert written.rate == 30
        assert [frame.seconds for frame in written] == pytest.approx([number / 30 for number in range(30)], abs=1e-6)


def test_colours_survive(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:] = 200, 40, 90
    with VideoWriter(tmp_path / "out.mp4", 64, 64, Fraction(1)) as writer:
        writer.write(Frame(0, 0.0, pixels))
    frame = next(VideoFile(tmp_path / "out.mp4"))
    assert np.abs(frame.pixels.astype(int) - (200, 40, 90)).max() <= 4


def test_odd_sizes_are_padded_by_the_last_row_and_column(tmp_path):
    source = make_video(tmp_path / "odd.mkv", 3, size=(161, 97), pix_fmt="yuv444p")
    with VideoFile(source) as video:
        assert (video.width, video.height) == (161, 97)
    with VideoFile(copy_video(source, tmp_path / "out.mp4")) as written:
        assert (written.width, written.height) == (162, 98)
        last = [frame.pixels for frame in written][-1].astype(int)
    assert number_of(last) == 2
    assert np.abs(last[-1] - last[-3]).max() < 40 and np.abs(last[:, -1] - last[:, -3]).max() < 40


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "pcm_s16le"), ("mkv", "pcm_s16le"), ("ts", "mp2")])
def test_sound_that_mp4_cannot_hold_becomes_aac(tmp_path, suffix, codec):
    video_codec = "mpeg4" if suffix == "avi" else "libx264"
    source = make_video(tmp_path / f"clip.{suffix}", 30, codec=video_codec, sound=codec)
    output = copy_video(source, tmp_path / "out.mp4")
    with av.open(str(output)) as container:
        heard = container.streams.audio[0]
        assert heard.codec_context.name == "aac"
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(heard)])
    rate = heard.codec_context.sample_rate
    assert len(samples) / rate == pytest.approx(1.5, abs=0.1)
    spectrum = np.abs(np.fft.rfft(samples[rate // 4 : rate // 4 + rate]))
    assert spectrum.argmax() * rate / rate == pytest.approx(440, abs=2)


@pytest.mark.parametrize("codec", ["mp3", "ac3", "flac", "libopus"])
def test_sound_that_mp4_can_hold_is_not_touched(tmp_path, codec):
    source = make_video(tmp_path / "clip.mkv", 30, sound=codec)
    assert sound_packets(copy_video(source, tmp_path / "out.mp4")) == sound_packets(source)


@pytest.mark.parametrize("codec", ["aac", "mp3"])
def test_sound_and_picture_keep_their_distance(tmp_path, codec):
    source = make_video(tmp_path / "clip.ts", 30, sound=codec)
    output = copy_video(source, tmp_path / "out.mp4")
    distances = []
    for path in (source, output):
        with av.open(str(path)) as container:
            picture, heard = container.streams.video[0], container.streams.audio[0]
            distances.append(float(picture.start_time * picture.time_base - heard.start_time * heard.time_base))
    assert distances[0] > 0.01
    assert distances[1] == pytest.approx(distances[0], abs=0.002)


def test_another_size_of_frame_is_scaled(tmp_path):
    other = np.full((201, 99, 3), 40, np.uint8)
    other[:, 50:] = 200
    with VideoWriter(tmp_path / "out.mp4", 160, 96, Fraction(30)) as writer:
        writer.write(Frame(0, 0.0, np.full((96, 160, 3), 40, np.uint8)))
        writer.write(Frame(1, 0.1, other))
    with VideoFile(tmp_path / "out.mp4") as video:
        first, second = (frame.pixels for frame in video)
    assert first.shape == second.shape == (96, 160, 3)
    halves = [round(half.mean(), -1) for pixels in (first, second) for half in (pixels[:, :70], pixels[:, 90:])]
    assert halves == [40, 40, 40, 200]


def test_a_video_of_no_frame_is_not_written(tmp_path):
    with pytest.raises(ToolError, match="there was no frame"), VideoWriter(tmp_path / "o.mp4", 16, 16, Fraction(1)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(ToolError, match=r"none/out\.mp4 cannot be written \(No such file or directory\)"),
        VideoWriter(tmp_path / "none" / "out.mp4", 16, 16, Fraction(1)),
    ):
        pass


def test_what_is_written_plays_in_a_browser(clip, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("NO CHROMIUM: nothing is checked in a browser")
    from playwright.sync_api import sync_playwright

    copy_video(clip, tmp_path / "out.mp4")
    (tmp_path / "page.html").write_text('<video src="out.mp4" muted></video>')
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*quiet, "--disable-component-update"])
        page = browser.new_page()
        page.goto(f"file://{tmp_path}/page.html")
        played = page.evaluate(
            """async () => {
                const video = document.querySelector("video");
                const ended = new Promise((done, fail) => { video.onended = done; video.onerror = fail; });
                video.playbackRate = 4;
                await video.play();
                await ended;
                const frames = video.getVideoPlaybackQuality().totalVideoFrames;
                return [video.videoWidth, video.videoHeight, video.duration, video.error, frames > 0];
            }"""
        )
        browser.close()
    assert played == [160, 96, pytest.approx(2.5, abs=0.1), None, True]


# Ways in which annotating ends early


def _annotate_onto(tmp_path, clip, ask, **how):
    """Whatever ends it: no new file is left, and what was there before is as it was."""
    output = tmp_path / "out.mp4"
    output.write_bytes(b"what was there")
    with VideoFile(clip) as video, VideoWriter(output, 160, 96, video.rate, clip) as writer:
        try:
            return run_annotate(video, ask, writer, Overlay([]), **how)
        finally:
            assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def place(tmp_path):
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"what was there"


def test_cancelling_leaves_no_file(place, clip):
    done = []
    with pytest.raises(Cancelled):
        _annotate_onto(place, clip, nothing, progress=done.append, cancelled=lambda: len(done) == 20)
    assert done == list(range(1, 21))


def test_cancelling_does_not_wait_for_an_answer_that_never_comes(place, clip):
    asked, ended = [], []

    async def never(body):
        asked.append(body)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(body)

    with pytest.raises(Cancelled):
        _annotate_onto(place, clip, never, cancelled=lambda: len(asked) == 4)
    assert len(ended) == 4


def test_a_cancelled_task_leaves_no_file(place, clip):
    async def task_cancelled():
        first = asyncio.Event()
        with VideoFile(clip) as video, VideoWriter(place / "out.mp4", 160, 96, video.rate) as writer:
            work = annotate(video, nothing, writer, None, None, 4, lambda done: first.set(), lambda: False)
            task = asyncio.create_task(work)
            await first.wait()
            task.cancel()
            await task

    (place / "out.mp4").write_bytes(b"what was there")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(task_cancelled())


def test_an_error_of_the_server_is_raised_and_leaves_no_file(place, clip, caplog):
    asked = []

    async def refuse(body):
        asked.append(body)
        if len(asked) == 1:
            while len(asked) < 4:
                await asyncio.sleep(0.001)  # the other three have failed by then
        raise ToolError("the server refused")

    with pytest.raises(ToolError, match="the server refused"):
        _annotate_onto(place, clip, refuse)
    gc.collect()
    assert caplog.text == ""  # asyncio would complain here of errors that nobody took


@pytest.mark.parametrize("concurrency", [1, 4])
def test_as_many_requests_as_allowed_are_under_way_and_no_more(clip, concurrency):
    under_way = asked = 0

    async def ask(body):
        nonlocal under_way, asked
        under_way, asked = under_way + 1, asked + 1
        assert under_way <= concurrency
        while under_way < concurrency and asked < concurrency:
            await asyncio.sleep(0.001)  # the first ones wait for one another
        await asyncio.sleep(0.001)
        under_way -= 1
        return []

    with VideoFile(clip) as video:
        assert run_annotate(video, ask, concurrency=concurrency) == Summary(60, 0, None)


def test_a_slow_first_answer_does_not_let_frames_pile_up(clip):
    """Of 60 frames no more than twice the concurrency are read while the first one is not answered."""
    asked = []

    async def ask(body):
        asked.append(body)
        if len(asked) == 1:
            for _ in range(50):
                await asyncio.sleep(0.002)
            assert len(asked) <= 6
        return []

    with VideoFile(clip) as video:
        assert run_annotate(video, ask, concurrency=3).frames == 60


# Live sources


class Camera:
    """An MJPEG server that sends frames when it is told to, and hangs up when it is told to."""

    def __init__(self, port=0):
        self.pictures = []
        self.hang_up = threading.Event()
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                sent = 0
                while not camera.hang_up.wait(0.005):
                    while sent < len(camera.pictures):
                        self.wfile.write(camera.pictures[sent])
                        sent += 1

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def show(self, *numbers):
        """As large as those of real cameras: FFmpeg looks at some thousand bytes before it knows what they are."""
        for number in numbers:
            body = io.BytesIO()
            Image.fromarray(numbered(number)).save(body, "JPEG", quality=95, comment=b"a camera" * 1000)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body.getvalue())}\r\n\r\n"
            self.pictures.append(head.encode() + body.getvalue() + b"\r\n")

    def die(self):
        self.hang_up.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def camera():
    cameras = []

    def start(port=0):
        cameras.append(Camera(port))
        return cameras[-1]

    yield start
    for one in cameras:
        one.die()


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_stream_that_dies_is_opened_again_and_says_so(camera, capsys, monkeypatch):
    monkeypatch.setattr(frames_module, "FIRST_PAUSE_S", 0.05)
    first = camera()
    first.show(5)
    with stream(f"http://user:secret@127.0.0.1:{first.port}/live?token=hidden") as frames:
        frame = next(frames)
        assert (frame.index, frame.seconds, number_of(frame.pixels)) == (0, 0.0, 5)
        first.die()
        said = []
        wait_until(lambda: said.append(capsys.readouterr().err) or "".join(said).count("\n") >= 3)
        second = camera(first.port)
        second.show(6)
        frame = next(frames)
        assert (frame.index, number_of(frame.pixels)) == (1, 6) and frame.seconds > 0
    lines = "".join(said).splitlines()
    assert [re.sub(r"\(.*\)", "", line) for line in lines[:3]] == [
        f"http://127.0.0.1:{first.port}/live: no picture ; trying again in {pause} s" for pause in (0.05, 0.1, 0.2)
    ]
    assert "secret" not in str(lines) and "hidden" not in str(lines)


def test_pauses_grow_to_the_longest_and_shrink_after_a_frame(capsys, monkeypatch):
    monkeypatch.setattr(frames_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(frames_module, "LONGEST_PAUSE_S", 0.03)
    said = []
    opened = 0

    def pictures():
        nonlocal opened
        opened += 1
        if opened in (1, 9):
            yield lambda: numbered(opened)
        raise frames_module._Lost("gone")

    with LiveStream("camera", pictures, reconnect=True):
        wait_until(lambda: said.append(capsys.readouterr().err) or "".join(said).count("camera: gone") >= 11)
    pauses = [0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.03, 0.03, 0.001, 0.002]
    lines = [line for line in "".join(said).splitlines() if line.startswith("camera:")]
    assert lines[:10] == [f"camera: gone; trying again in {pause:g} s" for pause in pauses]


def test_what_goes_wrong_in_the_reader_is_raised_where_frames_are_taken():
    def pictures():
        yield lambda: numbered(1)
        raise ModuleNotFoundError("No module named 'mss'", name="mss")

    with LiveStream("camera", pictures, reconnect=True) as frames, pytest.raises(ModuleNotFoundError):
        list(frames)


def test_a_slow_consumer_gets_the_newest_frame_and_the_others_are_counted(camera):
    live = camera()
    live.show(0)
    with stream(f"http://127.0.0.1:{live.port}/") as frames:
        assert number_of(next(frames).pixels) == 0 and frames.dropped == 0
        live.show(*range(1, 40))
        wait_until(lambda: frames.dropped == 38)
        frame = next(frames)
        assert (frame.index, number_of(frame.pixels), frames.dropped) == (39, 39, 38)


def test_a_stream_that_is_not_there_or_dies_for_good(camera):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        stream(f"http://me:secret@127.0.0.1:{port}/a") as frames,
        pytest.raises(ToolError, match=rf"^http://127\.0\.0\.1:{port}/a: no picture \(connection refused\)"),
    ):
        next(frames)
    assert list(frames) == []
    live = camera()
    live.show(0)
    with stream(f"http://127.0.0.1:{live.port}/", reconnect=False) as frames:
        next(frames)
        live.die()
        with pytest.raises(ToolError, match="no picture"):
            next(frames)


def test_a_silent_server_is_given_up(monkeypatch):
    monkeypatch.setattr(frames_module, "OPEN_TIMEOUT_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        stream(f"http://127.0.0.1:{silent.getsockname()[1]}/") as frames,
        pytest.raises(ToolError, match="no answer in time"),
    ):
        next(frames)


def test_a_file_behind_an_address_ends(clip):
    content = clip.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with stream(f"http://127.0.0.1:{server.server_address[1]}/clip.mp4") as frames:
        received = list(frames)
        assert number_of(received[-1].pixels) == 59 and len(received) + frames.dropped == 60
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("clip", "'clip' is no live source"),
        ("file:///etc/passwd", "is no live source"),
        ("http:///nowhere", "is no live source"),
        ("screen:1,2", "is no screen region"),
        ("screen:0,0,0,10", "is no screen region"),
    ],
)
def test_what_is_no_live_source(source, said):
    with pytest.raises(ToolError, match=said):
        stream(source)


def test_a_machine_without_a_camera_or_a_screen(monkeypatch):
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ToolError, match=r"^camera /dev/video98: no picture \(no such file or directory\)"):
        next(stream("98"))
    with pytest.raises(ToolError, match=r"^screen: it cannot be read \("):
        next(stream("screen"))


def test_the_screen_is_read_as_rgb(monkeypatch):
    """No machine that tests this need have a screen: `mss` is replaced by what it returns, blue first."""
    import mss

    class Screen:
        monitors = ({"left": 0, "top": 0, "width": 9, "height": 9}, {"left": 0, "top": 0, "width": 4, "height": 2})

        def __enter__(self):
            return self

        def __exit__(self, *details):
            pass

        def grab(self, region):
            return mss.ScreenShot(bytearray(bytes((3, 2, 1, 255)) * region["width"] * region["height"]), region)

    monkeypatch.setattr(mss, "MSS", Screen)
    for source, shape in (("screen", (2, 4, 3)), ("screen:1,2,3,5", (5, 3, 3))):
        with stream(source) as frames:
            pixels = next(frames).pixels
        assert pixels.shape == shape and (pixels == (1, 2, 3)).all()


def test_a_silent_live_source_can_be_cancelled():
    silence_ends = threading.Event()

    def pictures():
        yield lambda: numbered(1)
        silence_ends.wait()

    done = []
    with LiveStream("camera", pictures, reconnect=True) as frames, pytest.raises(Cancelled):
        run_annotate(frames, nothing, progress=done.append, cancelled=lambda: bool(done))
    silence_ends.set()
    assert done == [1]
