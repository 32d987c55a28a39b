"""Pictures of few bytes that cost a careless decoder seconds or gigabytes. Each is a function of a generator."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

from PIL import Image

Bomb = Callable[[Random], bytes]

EXIF = b"Exif\0\0"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *before: bytes, interlaced: bool = False) -> bytes:
    """Grey, of 8 bits; rows: packed. before: chunks ahead of them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header), *before, png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@cache
def _zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes))
    return packed + packer.flush()


def png_of_the_largest_size(rng: Random) -> bytes:
    """Legal: it costs what the limit on pixels allows."""
    return png(7000, 7000, _zeros(48), interlaced=rng.random() < 0.5)


def png_beyond(rng: Random) -> bytes:
    side = rng.choice((7100, 60_000, 0x7FFFFFFF))
    return png(side, side, _zeros(48))


def png_with_long_texts(rng: Random) -> bytes:
    kind, head = rng.choice(((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\x01\0\0\0"), (b"iCCP", b"a\0\0")))
    return png(8, 8, zlib.compress(bytes(72)), *[png_chunk(kind, head + _zeros(48))] * rng.choice((1, 20)))


def png_of_many_chunks(rng: Random) -> bytes:
    return png(8, 8, zlib.compress(bytes(72)), *[png_chunk(rng.choice((b"abCd", b"tEXt", b"fdAT")), b"")] * 20_000)


@cache
def _progressive() -> tuple[bytes, bytes]:
    """A JPEG of the largest size without its end, and its last scan, which holds nothing."""
    sink = io.BytesIO()
    Image.new("L", (7000, 7000), 128).save(sink, "JPEG", progressive=True, quality=50)
    body = sink.getvalue()[:-2]
    return body, body[body.rindex(b"\xff\xda") :]


def jpeg_of_many_scans(rng: Random) -> bytes:
    """Every scan goes over all pixels once more."""
    body, scan = _progressive()
    return body + scan * rng.choice((300, 3000)) + b"\xff\xd9"


@cache
def _small_jpeg() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 10, 20)).save(sink, "JPEG")
    return sink.getvalue()


def jpeg_of_many_segments(rng: Random) -> bytes:
    """Pillow puts those of EXIF together one by one."""
    segment = rng.choice(
        (EXIF + b"a", b"", b"ICC_PROFILE\0\1\1a", b"Photoshop 3.0\0", b"http://ns.adobe.com/xap/1.0/\0")
    )
    marker = rng.choice((b"\xff\xe1", b"\xff\xe2", b"\xff\xed", b"\xff\xfe"))
    body = _small_jpeg()
    return body[:2] + (marker + struct.pack(">H", len(segment) + 2) + segment) * 60_000 + body[2:]


def directory(entries: int, size: int) -> bytes:
    """A TIFF's head and a directory, all of whose values lie in the same bytes."""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    start = len(head) + 12 * entries + 4
    rows = b"".join(struct.pack("<HHII", tag, 7, size, start) for tag in range(entries))
    return head + rows + bytes(4) + bytes(size)


def tiff_of_shared_values(rng: Random) -> bytes:
    return directory(rng.choice((1000, 60_000)), rng.choice((1000, 100_000)))


def jpeg_of_shared_values(rng: Random) -> bytes:
    """The same as its EXIF, in as many segments as that takes."""
    exif = directory(20_000, 100_000)
    parts = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + EXIF + part for part in parts)
    body = _small_jpeg()
    return body[:2] + segments + body[2:]


def png_of_shared_values(rng: Random) -> bytes:
    return png(8, 8, zlib.compress(bytes(72)), png_chunk(b"eXIf", directory(20_000, 100_000)))


def gif_of_long_comments(rng: Random) -> bytes:
    """In many small blocks, which a decoder may put together one by one."""
    block = b"\1a" if rng.random() < 0.5 else b"\xff" + bytes(255)
    comments = b"!\xfe" + block * (1_500_000 // len(block)) + b"\0"
    screen, frame = struct.pack("<HHBBB", 8, 8, 0x80, 0, 0), struct.pack("<HHHHB", 0, 0, 8, 8, 0)
    return b"GIF89a" + screen + bytes(6) + comments + b"," + frame + b"\x02\x02\x4c\x01\x00;"


def webp_of_a_large_canvas(rng: Random) -> bytes:
    side = rng.choice((16382, 7000)).to_bytes(3, "little")
    data = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + side + side
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


BOMBS: tuple[Bomb, ...] = (
    png_of_the_largest_size,
    png_beyond,
    png_with_long_texts,
    png_of_many_chunks,
    jpeg_of_many_scans,
    jpeg_of_many_segments,
    jpeg_of_shared_values,
    png_of_shared_values,
    tiff_of_shared_values,
    gif_of_long_comments,
    webp_of_a_large_canvas,
)
