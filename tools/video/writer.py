"""Videos that every player and browser shows: H.264 with the sound of their source, in MP4."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.video.frames import Frame, open_file, start_of

# Codecs that MP4 has a registered place for and players read there (https://mp4ra.org/registered-types/codecs).
SOUND_OF_MP4 = frozenset({"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"})
MILLISECOND = 0.001
AAC_RATE = 48_000
PIXELS_A_THREAD = 2_000_000  # x264 codes so many, of full HD, at 100 frames a second, faster than they are detected on
TICKS_PER_SECOND = 90_000  # at least; that of MPEG systems, fine enough for any variable rate


class VideoWriter:
    """An MP4 file (H.264, yuv420p, index in front) that appears when the block ends well, and not otherwise.

        with VideoWriter(Path("out.mp4"), 640, 480, Fraction(30)) as writer:
            writer.write(frame)

    width, height: of the frames; the last column or row is doubled where one is odd, as yuv420p needs. rate: frames
    a second, for the coder's plans; each frame is shown at its own time. audio_from: a video file whose first sound
    track is taken over as it is, or as AAC where MP4 cannot hold its codec; its times and the frames' share one zero.

    Raises ToolError where the file cannot be written, or no frame was.
    """

    def __init__(self, path: Path, width: int, height: int, rate: Fraction, audio_from: Path | None = None):
        self.path = path
        self._size = width, height
        self._rate = rate.limit_denominator(TICKS_PER_SECOND)
        # A whole number of ticks a frame, so that a constant rate stays exactly that.
        per_second = self._rate.numerator * -(-TICKS_PER_SECOND // self._rate.numerator)
        self._tick = Fraction(1, per_second)
        self._audio_from = audio_from
        self._last = -1
        # One for all frames: a new one takes longer to set up than a frame to convert.
        self._reformatter = VideoReformatter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(replacing(self.path))
            except OSError as error:
                raise ToolError(f"{self.path} cannot be written ({error.strerror})") from error
            # By its name: FFmpeg opens the file a second time to move the index to the front.
            self._container = stack.enter_context(
                av.open(file.name, "w", format="mp4", container_options={"movflags": "+faststart"})
            )
            self._stream = self._container.add_stream("libx264", self._rate, options={"preset": "veryfast"})
            self._stream.width, self._stream.height = (side + side % 2 for side in self._size)
            self._stream.pix_fmt = "yuv420p"
            coder = self._stream.codec_context
            # What asks the detector needs the other cores; each thread of x264 costs work of its own.
            coder.thread_count = 1 + self._size[0] * self._size[1] // PIXELS_A_THREAD
            coder.time_base = self._tick
            coder.colorspace, coder.color_range = Colorspace.ITU709, ColorRange.MPEG
            coder.color_primaries, coder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            self._sound = _Sound(stack, self._audio_from, self._container) if self._audio_from else None
            self._stack = stack.pop_all()
        return self

    def write(self, frame: Frame) -> None:
        """PyAV scales a frame of another size to the video's, as of a camera that came back with one."""
        height, width = frame.pixels.shape[:2]
        pixels = frame.pixels
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )
        # Times of a damaged source may stand still or run backwards; those of a video must not.
        self._last = max(self._last + 1, round(self._exact(frame.seconds) / self._tick))
        picture.pts, picture.time_base = self._last, self._tick
        try:
            self._container.mux(self._stream.encode(picture))
            if self._sound:
                self._sound.mux(until=frame.seconds)
        except av.FFmpegError as error:
            raise self._failed(error) from error

    def _exact(self, seconds: float) -> Fraction:
        """Matroska rounds times to milliseconds: what lies that near to the constant rate means it."""
        steady = round(seconds * self._rate) / self._rate
        return steady if abs(steady - seconds) <= MILLISECOND else Fraction(seconds)

    def _finish(self) -> None:
        if self._last < 0:
            raise ToolError(f"{self.path} is not written: there was no frame")
        try:
            self._container.mux(self._stream.encode(None))
            if self._sound:
                self._sound.mux(until=float("inf"))
            self._container.close()
        except av.FFmpegError as error:
            raise self._failed(error) from error

    def _failed(self, error: av.FFmpegError) -> ToolError:
        return ToolError(f"{self.path} cannot be written ({error.strerror})")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException:
                self._stack.__exit__(*sys.exc_info())
                raise
        # A full disk hinders the end too, and the first word on it counts.
        with contextlib.suppress(av.FFmpegError) if kind is not None else contextlib.nullcontext():
            self._stack.__exit__(kind, error, trace)


class _Sound:
    """The first sound track of a file on its way into another, none where the file has none."""

    def __init__(self, stack: contextlib.ExitStack, source: Path, output: OutputContainer):
        self._container = stack.enter_context(open_file(source))
        self._output = output
        self._start = start_of(self._container)
        self._waiting: Packet | None = None
        self._packets: Iterator[Packet] = iter(())
        for source_track in self._container.streams.audio[:1]:
            if source_track.codec_context.codec.canonical_name in SOUND_OF_MP4:
                self._packets = self._copies(source_track, output.add_stream_from_template(source_track))
            else:
                layout = "mono" if source_track.codec_context.channels == 1 else "stereo"
                self._packets = self._coded(source_track, output.add_stream("aac", AAC_RATE, layout=layout))

    def mux(self, until: float) -> None:
        """What is heard up to this second, so that sound and picture lie side by side in the file."""
        while (packet := self._waiting or next(self._packets, None)) is not None:
            self._waiting = packet
            if packet.pts is not None and packet.pts * packet.time_base > until:
                return
            self._waiting = None
            self._output.mux(packet)

    def _copies(self, source: AudioStream, track: AudioStream) -> Iterator[Packet]:
        latest = None
        for packet in self._whole(source):
            packet.pts, packet.dts = (self._shifted(time, packet.time_base) for time in (packet.pts, packet.dts))
            # A damaged source may run backwards, which no MP4 can.
            if packet.dts is not None and (latest is None or packet.dts > latest):
                latest = packet.dts
                packet.stream = track
                yield packet

    def _coded(self, source: AudioStream, track: AudioStream) -> Iterator[Packet]:
        for heard in self._heard(source):
            # What the decoder held back to the end comes without a time base.
            heard.time_base = heard.time_base or source.time_base
            heard.pts = self._shifted(heard.pts, heard.time_base)
            yield from track.encode(heard)
        yield from track.encode(None)

    def _heard(self, source: AudioStream) -> Iterator[av.AudioFrame]:
        for packet in itertools.chain(self._whole(source), [None]):
            with contextlib.suppress(av.FFmpegError):
                yield from source.decode(packet)

    def _whole(self, source: AudioStream) -> Iterator[Packet]:
        """Packets up to the end or where the file breaks off, which the reader of its frames reports."""
        with contextlib.suppress(av.FFmpegError):
            yield from (packet for packet in self._container.demux(source) if packet.size and not packet.is_corrupt)

    def _shifted(self, time: int | None, time_base: Fraction | None) -> int | None:
        return None if time is None or time_base is None else time - round(self._start / time_base)
