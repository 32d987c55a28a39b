"""Frames of video files, each in its turn, and of live sources, the newest first."""

import contextlib
import itertools
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tools.errors import ToolError

# FFmpeg also reads play lists, which name other files and addresses; a file from a stranger must not choose those.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,mjpeg,flv,asf,ogg,gif,mxf"
MAX_PIXELS = 8192 * 8192
UNKNOWN_RATE = Fraction(25)
MICROSECONDS = 1_000_000  # of container times, FFmpeg's AV_TIME_BASE

SCHEMES = frozenset({"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "rtp"})
OPEN_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
SCREEN_RATE = 30  # grabs a second; more than any detector here takes

Decode = Callable[[], np.ndarray]  # run only for a frame that somebody takes


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video.

    index: its place in the source, from 0; frames that a stride or a live source left out count too.
    seconds: since the source's start. pixels: uint8 `[H, W, 3]`, RGB, upright (display matrix applied).
    """

    index: int
    seconds: float
    pixels: np.ndarray


def open_file(path: Path, name: str | None = None) -> InputContainer:
    """A container of the closed list of formats, which reads nothing but this file. name: for messages. Raises
    ToolError."""
    try:
        # "file:" keeps a name such as "concat:a|b" from being taken for an address.
        return av.open(
            f"file:{path.absolute()}", options={"protocol_whitelist": "file", "format_whitelist": FORMATS}, mode="r"
        )
    except (av.FFmpegError, ValueError) as error:
        raise ToolError(f"{name or path} cannot be opened as a video ({_reason(error)})") from error


def start_of(container: InputContainer) -> Fraction:
    """Seconds at which the first of its streams starts: where picture and sound share their zero."""
    return Fraction(container.start_time or 0, MICROSECONDS)


class VideoFile:
    """The frames of a video file, an iterator to be gone through once, from any thread.

        with VideoFile(Path("clip.mp4"), stride=2) as video:
            for frame in video: ...

    width, height: of the upright frames. rate: frames a second and frames: their count where the file tells it,
    both of the frames that come out, so with a stride divided by it. damaged: one line once something could not
    be decoded, None before; what can be decoded comes out all the same.

    name: for messages, the path where it is not given.

    Raises ToolError where the file cannot be opened, has no video stream, or no frame of it can be decoded.
    """

    def __init__(self, path: Path, stride: int = 1, name: str | None = None):
        if stride < 1:
            raise ToolError(f"a stride of {stride} frames is not possible; give 1 or more")
        self.path = path
        self.name = name or str(path)
        self.damaged: str | None = None
        self._stride = stride
        self._lock = threading.Lock()
        self._seen = 0  # frames decoded
        self._container = open_file(path, name)
        self._closed = False
        try:
            self._stream = _video_stream(self._container, self.name)
            self._start = start_of(self._container)
            source_rate = self._stream.average_rate or self._stream.guessed_rate or UNKNOWN_RATE
            self._source_rate = Fraction(source_rate)
            decoded = self._decode()
            first = next(decoded, None)
            if first is None:
                raise ToolError(
                    f"{self.name} has no frame that can be decoded" + (f" ({self.damaged})" * bool(self.damaged))
                )
        except BaseException:
            self._container.close()
            raise
        self._matrix = _display_matrix(first)
        self._size = first.width, first.height
        self._reformatter = VideoReformatter()
        self.height, self.width = _upright(np.empty((first.height, first.width, 0)), self._matrix).shape[:2]
        self.rate = self._source_rate / stride
        self.frames = -(-self._stream.frames // stride) if self._stream.frames else None
        self.has_audio = bool(self._container.streams.audio)
        self._decoded = itertools.chain([first], decoded)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        # A reader thread may still be in here when another one closes the video.
        with self._lock:
            if self._closed:
                raise StopIteration
            for decoded in self._decoded:
                index, self._seen = self._seen, self._seen + 1
                if index % self._stride == 0:
                    pixels = _rgb(decoded, self._matrix, self._size, self._reformatter)
                    return Frame(index, self._seconds(decoded, index), pixels)
            raise StopIteration

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _seconds(self, frame: av.VideoFrame, index: int) -> float:
        # The last frames, which the decoder held back, come without a time base.
        time_base = frame.time_base or self._stream.time_base
        if frame.pts is None or time_base is None:
            return float(index / self._source_rate)
        return float(frame.pts * time_base - self._start)

    def _decode(self) -> Iterator[av.VideoFrame]:
        for packet in itertools.chain(self._packets(), [None]):
            try:
                yield from self._stream.decode(packet)
            except av.FFmpegError as error:
                self._note(_reason(error))

    def _packets(self) -> Iterator[av.Packet]:
        """Whole packets only: a decoder makes a grey or torn frame of half a one."""
        count, latest = 0, 0.0
        try:
            for packet in self._container.demux(self._stream):
                if packet.dts is None and not packet.size:
                    continue  # the mark of the end, which `_decode` gives itself, after an error too
                count += 1
                latest = max(latest, float((packet.pts or 0) * packet.time_base))
                if packet.is_corrupt:
                    self._note("a packet is cut")
                else:
                    yield packet
        except av.FFmpegError as error:
            self._note(_reason(error))
        if count < self._stream.frames:
            self._note(f"it ends after {count} of {self._stream.frames} frames")
        if (promised := _promised_seconds(self._stream)) > latest + 1:
            self._note(f"it ends after {latest:.1f} of {promised:.1f} s")

    def _note(self, reason: str) -> None:
        self.damaged = self.damaged or f"{self.name} is damaged near frame {self._seen}: {reason}"


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue  # the cover of a song
        if stream.width * stream.height > MAX_PIXELS:
            raise ToolError(f"{name} has frames of {stream.width}x{stream.height}, more than {MAX_PIXELS} pixels")
        return stream
    raise ToolError(f"{name} has no video stream; give a video")


def _promised_seconds(stream: VideoStream) -> float:
    """What Matroska's muxers write as a tag, where other containers count frames; 0 without it."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    if match is None:
        return 0.0
    hours, minutes, seconds = map(float, match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the frame's display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV refuses all of it where there is a kind that it does not know, such as EXIF, and tells but the turn.
        return _turned(frame.rotation)
    if side_data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(side_data, np.int32).tolist()
    return a, b, c, d


def _turned(degrees: int) -> tuple[int, int, int, int]:
    """The display matrix of a turn, counterclockwise."""
    cos, sin = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    return cos, -sin, sin, cos


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turned to the nearest quarter and mirrored as the display matrix says."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _rgb(
    frame: av.VideoFrame, matrix: tuple[int, int, int, int], size: tuple[int, int], reformatter: VideoReformatter
) -> np.ndarray:
    """size: width and height before turning, to which a frame of another size is scaled. reformatter: of the whole
    video, since a new one takes longer to set up than a frame to convert."""
    pixels = reformatter.reformat(frame, *size, format="rgb24").to_ndarray()
    return np.ascontiguousarray(_upright(pixels, matrix))


def _reason(error: Exception) -> str:
    """Without the address that FFmpeg puts behind it, which may hold a password."""
    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    return (getattr(error, "strerror", None) or str(error)).lower()


class LiveStream:
    """Frames of a live source as they come, an iterator; a slow consumer gets the newest, never a stale one.

    dropped: frames that came and were replaced by a newer one before anybody took them. seconds of a frame are
    those since the first one came. A source that dies after its first frame is opened again after pauses of 1, 2,
    4, … 30 s, each told in one line on stderr; one that never gave a frame raises ToolError, as does any that dies
    without `reconnect`. A source of a known length, a file behind an address, ends the iteration at its end.
    """

    damaged: str | None = None  # a live source has no tail that could be missing

    def __init__(self, name: str, pictures: Callable[[], Generator[Decode]], *, reconnect: bool):
        """name: for messages, without secrets. pictures: opens the source and gives what decodes to uint8 RGB."""
        self.name = name
        self.dropped = 0
        self._pictures = pictures
        self._reconnect = reconnect
        self._received = 0
        self._first_at = 0.0
        self._newest: tuple[int, float, Decode] | None = None
        self._failure: Exception | None = None
        self._ended = False
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name=f"frames of {name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._ended)
            if self._newest is None or self._closed.is_set():
                failure, self._failure = self._failure, None
                raise failure or StopIteration
            (index, seconds, decode), self._newest = self._newest, None
        return Frame(index, seconds, decode())

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        # FFmpeg cannot be woken from a read; the thread ends by itself at the read's time-out.
        self._thread.join(timeout=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        failure: Exception | None = None
        try:
            self._read_on()
        except Exception as error:  # noqa: BLE001  # raised again where the frames are taken
            failure = error
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify_all()

    def _read_on(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._closed.is_set():
            received = self._received
            try:
                with contextlib.closing(self._pictures()) as pictures:
                    for picture in pictures:
                        if self._closed.is_set():
                            return
                        self._put(picture)
                return
            except _Lost as error:
                if self._closed.is_set():
                    return
                if not self._received or not self._reconnect:
                    raise ToolError(f"{self.name}: {error}; check that it is there and gives pictures") from error
                pause = FIRST_PAUSE_S if self._received > received else min(pause * 2, LONGEST_PAUSE_S)
                print(f"{self.name}: {error}; trying again in {pause:g} s", file=sys.stderr)
            self._closed.wait(pause)

    def _put(self, decode: Decode) -> None:
        now = time.monotonic()
        with self._changed:
            if not self._received:
                self._first_at = now
            self.dropped += self._newest is not None
            self._newest = self._received, now - self._first_at, decode
            self._received += 1
            self._changed.notify_all()


class _Lost(Exception):
    """A live source that ended or cannot be opened, in words."""


def stream(source: str, reconnect: bool = True) -> LiveStream:
    """A network stream (rtsp://, http://, …), a camera ("0" or "/dev/video0") or the screen ("screen",
    "screen:x,y,width,height" in pixels). Raises ToolError for anything else."""
    if source == "screen" or source.startswith("screen:"):
        return LiveStream(source, partial(_screen, _region(source)), reconnect=False)
    if source.isdecimal() or source.startswith("/dev/"):
        device = f"/dev/video{source}" if source.isdecimal() else source
        return LiveStream(f"camera {device}", partial(_av_frames, device, format="v4l2"), reconnect=reconnect)
    address = urlsplit(source)
    if address.scheme not in SCHEMES or not address.netloc:
        raise ToolError(
            f"{source!r} is no live source; give an address ({', '.join(sorted(SCHEMES))}), "
            "a camera (0 or /dev/video0) or screen[:x,y,width,height]"
        )
    return LiveStream(
        without_secrets(source), partial(_av_frames, source, options={"rtsp_transport": "tcp"}), reconnect=reconnect
    )


def without_secrets(source: str) -> str:
    """An address without user, password and query; anything else as it is."""
    address = urlsplit(source)
    if address.scheme not in SCHEMES or not address.netloc:
        return source
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"


def _av_frames(address: str, **how: Any) -> Generator[Decode]:
    try:
        with av.open(address, timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S), **how) as container:
            if not container.streams.video:
                raise _Lost("it has no video stream")
            reformatter = VideoReformatter()
            for packet in container.demux(container.streams.video[0]):
                # Who joins in the middle gets packets that nothing can be made of before the next key frame.
                with contextlib.suppress(av.error.InvalidDataError):
                    for frame in packet.decode():
                        size = frame.width, frame.height
                        yield partial(_rgb, frame, _display_matrix(frame), size, reformatter)
            if container.duration is None:
                raise _Lost("it ended")
    except av.FFmpegError as error:
        raise _Lost(f"no picture ({_reason(error)})") from error


def _region(source: str) -> dict[str, int] | None:
    if source == "screen":
        return None
    match = re.fullmatch(r"screen:(\d+),(\d+),([1-9]\d*),([1-9]\d*)", source)
    if match is None:
        raise ToolError(f"{source!r} is no screen region; give screen:x,y,width,height in pixels")
    return dict(zip(("left", "top", "width", "height"), map(int, match.groups()), strict=True))


def _screen(region: dict[str, int] | None) -> Generator[Decode]:
    import mss

    try:
        with mss.MSS() as screen:
            while True:
                shot = screen.grab(region or screen.monitors[1])
                yield partial(np.array, np.frombuffer(shot.rgb, np.uint8).reshape(shot.height, shot.width, 3))
                time.sleep(1 / SCREEN_RATE)
    except mss.ScreenShotError as error:
        raise _Lost(f"it cannot be read ({error})") from error
