"""What people ask about, as pictures and frames one after the other.

    "photos/"  "photos/*.jpg"  "list.txt"  "bus.jpg"  "https://…/bus.jpg"      pictures
    "door.mp4"  "https://…/door.mp4"  a page of YouTube (with yt-dlp)          every frame of a video
    "rtsp://…"  "0", a webcam  "screen", "screen:x,y,w,h"                      the newest frames of a live source

A video behind an address is fetched first; one that its server gives no length of is live. A folder gives its
pictures and videos by name, not those of folders in it; a glob with `**` does. A list holds one source a line, paths
relative to the list.
"""

import glob
import io
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from tools.client.answer import Answer
from tools.data.check import LIMITS
from tools.errors import ToolError
from tools.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from tools.video.frames import LiveStream, VideoFile

PICTURES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VIDEOS = frozenset(
    {".asf", ".avi", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}
)
LISTS = frozenset({".txt", ".streams"})
LIVE_SUFFIXES = frozenset({".m3u8", ".mjpg", ".mjpeg"})
LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtp", "udp", "srt")
LIVE_TYPES = ("multipart/x-mixed-replace", "application/vnd.apple.mpegurl", "application/x-mpegurl")
YOUTUBE = ("youtube.com", "youtu.be")
LIVE_RATE = Fraction(30)  # frames a second of a saved live source, whose own times are kept
JPEG_QUALITY = 95
FETCH_TIMEOUT_S = 30.0
LONGEST_NAME = 200  # of a source that is none

# Paths, URLs and names of live sources as text, or encoded pictures: one or many.
Given: TypeAlias = str | Path | bytes | Iterable[str | Path | bytes]


class Unreadable(ToolError):
    """One source cannot be read; others may."""


@dataclass(frozen=True, eq=False)
class Film:
    """What the frames of one video or live source share. rate: frames a second. audio_from: the file with its sound.
    frames: where they come from."""

    source: str
    rate: Fraction
    audio_from: Path | None
    frames: "VideoFile | LiveStream"

    @property
    def dropped(self) -> int:
        """Frames of a live source that came faster than they could be taken."""
        return getattr(self.frames, "dropped", 0)


@dataclass(frozen=True, eq=False)
class Shot:
    """One picture or frame. load: its encoded bytes, read or made when called; raises Unreadable. film, frame,
    seconds, pixels (uint8 `[H, W, 3]`, RGB, upright): of a frame."""

    source: str
    load: Callable[[], bytes]
    film: Film | None = None
    frame: int | None = None
    seconds: float | None = None
    pixels: "np.ndarray | None" = None

    def told(self, answer: Answer) -> Answer:
        """`answer`, with what it is about; its time to the microsecond."""
        seconds = None if self.seconds is None else round(self.seconds, 6)
        return replace(answer, source=self.source, frame=self.frame, seconds=seconds)

    def failed(self, reason: str) -> Answer:
        return self.told(Answer(self.source, error=reason))


@dataclass(frozen=True)
class Source:
    """One picture, video or live source, or one that is none; remote: a video behind an address. place: a path, URL,
    number of a webcam or part of the screen. reason: why it is none."""

    kind: Literal["picture", "video", "remote", "live", "none"]
    place: str | Path | bytes
    reason: str = ""

    @property
    def name(self) -> str:
        return "picture" if isinstance(self.place, bytes) else str(self.place)


def one_shot(source: str | Path | bytes) -> Shot:
    """Of a single picture. Raises ToolError for what is none."""
    found = list(find_sources(source))
    if len(found) != 1 or found[0].kind != "picture":
        raise ToolError(f"{source!r} is no single picture; use predict_many")
    return _picture(found[0])


class Shots:
    """The pictures and frames of sources, each read when its turn comes: an iterator, to be gone through once.

    stride: every how many frames of a video. A video that cannot be read, or breaks off, gives a shot that cannot be
    loaded. Raises what going through `sources` raises.
    """

    def __init__(self, sources: Iterable[Source], stride: int = 1):
        self._stride = stride
        self._shots = self._all(sources)
        self._open: VideoFile | LiveStream | None = None
        self._closed = False
        self._fetched = ExitStack()  # folders, each with a video

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Shot:
        return next(self._shots)

    def close(self) -> None:
        """Ends the iteration, from whatever thread: one that waits for a frame gets none. What was fetched goes."""
        self._closed = True
        if self._open is not None:
            self._open.close()
        self._fetched.close()

    def _all(self, sources: Iterable[Source]) -> Iterator[Shot]:
        for source in sources:
            if self._closed:
                return
            if source.kind == "picture":
                yield _picture(source)
            elif source.kind == "none":
                yield _broken(source.name, source.reason)
            else:
                yield from self._frames(source)

    def _frames(self, source: Source) -> Iterator[Shot]:
        from tools.video.frames import VideoFile, without_secrets

        name = without_secrets(source.name) if source.kind == "remote" else source.name
        try:
            with self._opened(source, name) as frames:
                self._open = frames
                if self._closed:
                    return
                name = frames.name
                audio_from = frames.path if isinstance(frames, VideoFile) and frames.has_audio else None
                film = Film(name, getattr(frames, "rate", LIVE_RATE), audio_from, frames)
                for frame in frames:
                    yield Shot(name, partial(_encode, frame.pixels), film, frame.index, frame.seconds, frame.pixels)
                if frames.damaged:
                    yield _broken(name, frames.damaged)
        except ToolError as error:
            yield _broken(name, str(error))
        finally:
            self._open = None

    def _opened(self, source: Source, name: str) -> "VideoFile | LiveStream":
        from tools.video.frames import VideoFile, stream

        if source.kind == "live":
            return stream(source.name)
        if source.kind == "video":
            return VideoFile(Path(source.name), self._stride)
        path = self._fetch_video(source.name, name)
        return VideoFile(path, self._stride, name) if path else stream(source.name)

    def _fetch_video(self, url: str, name: str) -> Path | None:
        """None for one of a length that its server does not know, as of a camera. Raises ToolError."""
        import httpx

        path = Path(self._fetched.enter_context(tempfile.TemporaryDirectory(prefix="marina-"))) / "video"
        try:
            with httpx.stream("GET", url, timeout=FETCH_TIMEOUT_S, follow_redirects=True) as response:
                response.raise_for_status()
                length = response.headers.get("Content-Length", "")
                if not length.isdecimal():
                    return None
                with path.open("wb") as file, Progress(f"fetching {name}", int(length)) as progress:
                    for part in response.iter_bytes():
                        if self._closed:
                            break
                        file.write(part)
                        progress.advance(len(part))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ToolError(f"{name} cannot be fetched ({_why(error)})") from error
        except OSError as error:
            raise ToolError(
                f"{name} cannot be kept in {tempfile.gettempdir()} ({error.strerror}); make room there or set TMPDIR"
            ) from error
        return path


def _why(error: Exception) -> str:
    """httpx adds advice for programmers to a status."""
    response = getattr(error, "response", None)
    return f"{response.status_code} {response.reason_phrase}" if response else str(error) or type(error).__name__


def _broken(name: str, reason: str) -> Shot:
    def load() -> bytes:
        raise Unreadable(reason.removeprefix(name).lstrip(": "))

    return Shot(name, load)


def _encode(pixels: "np.ndarray") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def find_sources(given: Given) -> Iterator[Source]:
    """What each of `given` stands for; of several, or in a list, one that is nothing is a source of kind `none`.

    Raises ToolError, naming it, for a single one.
    """
    if isinstance(given, bytes):
        yield Source("picture", given)
    elif isinstance(given, str | Path):
        yield from _find(str(given))
    else:
        for one in given:
            yield from find_sources(one) if isinstance(one, bytes) else _find_or_none(str(one))


def _find_or_none(text: str) -> Iterator[Source]:
    try:
        yield from _find(text)
    except ToolError as error:
        yield Source("none", text[:LONGEST_NAME], str(error).removeprefix(f"source {text} "))


def _find(text: str) -> Iterator[Source]:
    try:
        yield from _look(text)
    except (OSError, ValueError) as error:  # of a name that no file can have, a folder that may not be read
        raise ToolError(f"source {text[:LONGEST_NAME]!r} cannot be read ({error})") from error


def _look(text: str) -> Iterator[Source]:
    path = Path(text)
    scheme, separator, _ = text.partition("://")
    if separator:
        yield _of_url(text, scheme.lower())
    elif path.is_dir():
        yield from _in_folder(path)
    elif path.is_file():
        yield from _in_list(path) if path.suffix.lower() in LISTS else [_of_file(path)]
    elif text.isdecimal() or text == "screen" or text.startswith(("screen:", "/dev/video")):
        yield Source("live", text)
    elif glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        files = [one for one in found if one.is_file() and one.suffix.lower() in PICTURES | VIDEOS]
        if not files:
            raise ToolError(f"{text} matches no pictures or videos; see that the shell has not changed it")
        yield from map(_of_file, files)
    else:
        raise ToolError(f"source {text} is not there; give a picture, folder, glob, list, URL, video or live source")


def _of_file(path: Path) -> Source:
    return Source("video" if path.suffix.lower() in VIDEOS else "picture", path)


def _in_folder(folder: Path) -> Iterator[Source]:
    files = sorted(one for one in folder.iterdir() if one.is_file() and one.suffix.lower() in PICTURES | VIDEOS)
    if not files:
        raise ToolError(f"folder {folder} holds no pictures or videos; folders in it take a glob: '{folder}/**/*.jpg'")
    yield from map(_of_file, files)


def _in_list(path: Path) -> Iterator[Source]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"list {path} cannot be read ({error}); it holds one source a line") from error
    given = [line for line in lines if line and not line.startswith("#")]
    if not given:
        raise ToolError(f"list {path} is empty; write one source a line")
    for line in given:
        local = path.parent / line
        if local.is_file() and local.suffix.lower() in LISTS:
            raise ToolError(f"list {path} names another list, {line}; name what is in it")
        named = "://" in line or line.isdecimal() or line.startswith("screen")
        yield from _find_or_none(line if named and not local.exists() else str(local))


def _of_url(url: str, scheme: str) -> Source:
    if scheme in LIVE_SCHEMES:
        return Source("live", url)
    if scheme not in ("http", "https"):
        raise ToolError(f"source {url} has an unknown scheme; known: http, https, {', '.join(LIVE_SCHEMES)}")
    parts = urllib.parse.urlsplit(url)
    if (parts.hostname or "").removeprefix("www.").removeprefix("m.") in YOUTUBE:
        return _of_url(_youtube(url), "https")
    suffix = Path(parts.path).suffix.lower()
    if suffix in LIVE_SUFFIXES | VIDEOS:
        return Source("live" if suffix in LIVE_SUFFIXES else "remote", url)
    return Source("picture", url) if suffix in PICTURES else _by_content(url)


def _by_content(url: str) -> Source:
    """What an address is whose name does not tell, as its server says."""
    import httpx

    try:
        with httpx.stream("GET", url, timeout=FETCH_TIMEOUT_S, follow_redirects=True) as response:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ToolError(f"source {url} cannot be fetched ({_why(error)})") from error
    if kind in LIVE_TYPES:
        return Source("live", url)
    return Source("remote" if kind.startswith("video/") else "picture", url)


def _youtube(url: str) -> str:
    """Where the video of a page lies, as a file of pictures and sound."""
    try:
        import yt_dlp  # type: ignore[import-untyped]  # it has none
    except ModuleNotFoundError as error:
        raise ToolError(f"source {url} needs yt-dlp; pip install yt-dlp, or give a file") from error
    settings = {"quiet": True, "no_warnings": True, "format": "best[ext=mp4]/best", "noplaylist": True}
    try:
        with yt_dlp.YoutubeDL(settings) as resolver:
            return str(resolver.extract_info(url, download=False)["url"])
    except (yt_dlp.utils.YoutubeDLError, KeyError) as error:
        raise ToolError(f"source {url} cannot be resolved by yt-dlp ({error})") from error


def _picture(source: Source) -> Shot:
    if isinstance(source.place, bytes):
        body = source.place
        return Shot(source.name, lambda: body)
    if isinstance(source.place, Path):
        return Shot(source.name, partial(_read, source.place))
    return Shot(source.name, partial(_fetch, source.place))


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LIMITS.max_bytes:
            raise Unreadable(f"the file has {size:,} bytes, more than the {LIMITS.max_bytes:,} that are sent")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"the file cannot be read ({error.strerror})") from error


def _fetch(url: str) -> bytes:
    import httpx

    try:
        with httpx.stream("GET", url, timeout=FETCH_TIMEOUT_S, follow_redirects=True) as response:
            response.raise_for_status()
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > LIMITS.max_bytes:
                    raise Unreadable(f"the picture has more than the {LIMITS.max_bytes:,} bytes that are sent")
            return bytes(body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreadable(f"the picture cannot be fetched ({_why(error)})") from error
