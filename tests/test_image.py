"""Bytes to upright RGB: every format and mode, every orientation, and everything that is no picture."""

import io
import random
import re
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import assert_one_line, encode, oriented, scene
from PIL import Image

from handlers.errors import ImageTooLarge, InvalidImage, RequestError, UnsupportedMedia
from handlers.image import decode, sniff
from handlers.settings import Limits

LIMITS = Limits()
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
PIXELS = scene(24, 40)


def image(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PIXELS).convert(mode)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sixteen_bits(colour: int) -> bytes:
    """A PNG of one row and two pixels, whose samples are 0x12ff and 0xfe00: rounding would show."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    return png(2, 1, 16, colour, b"\0" + b"\x12\xff" * samples + b"\xfe\x00" * samples)


@pytest.mark.parametrize("form", FORMATS)
def test_format_gives_its_pixels(form):
    source = image("P") if form == "GIF" else image()
    body = encode(source, form)
    found = decode(body, LIMITS)
    assert sniff(body) == form
    assert found.dtype == np.uint8
    expected = np.array(source.convert("RGB")).astype(int)
    assert np.abs(found - expected).max() <= (40 if form == "JPEG" else 0)
    assert np.abs(found - expected).mean() < 3


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("L", "JPEG"), ("L", "PNG"), ("L", "TIFF"), ("LA", "PNG"), ("1", "PNG"), ("1", "TIFF"), ("P", "PNG"),
        ("P", "BMP"), ("RGBA", "PNG"), ("RGBA", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("CMYK", "TIFF"),
    ],
)  # fmt: skip
def test_mode_becomes_rgb_by_value(mode, form):
    source = image(mode)
    expected = np.array(source.convert("RGB")).astype(int)
    assert np.abs(decode(encode(source, form), LIMITS) - expected).max() <= (40 if form == "JPEG" else 2)


def test_cmyk_jpeg_keeps_its_colours():
    found = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), LIMITS)
    red, green, blue = found.reshape(-1, 3).mean(axis=0)
    assert red > 240 > 20 > max(green, blue)


def test_alpha_is_dropped_not_blended():
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert np.array_equal(decode(encode(clear), LIMITS), PIXELS)
    palette = image("P")
    transparent = encode(palette, transparency=palette.getpixel((0, 0)))
    assert np.array_equal(decode(transparent, LIMITS), np.array(palette.convert("RGB")))


@pytest.mark.parametrize("colour", [0, 2, 4, 6], ids=["grey", "rgb", "grey-alpha", "rgba"])
def test_of_16_bits_the_upper_8_are_kept(colour):
    assert decode(sixteen_bits(colour), LIMITS).tolist() == [[[0x12] * 3, [0xFE] * 3]]


def test_16_bit_tiff_of_either_byte_order():
    grey = np.array([[0x12FF, 0xFE00]], dtype=np.uint16)
    little = encode(Image.fromarray(grey), "TIFF")
    big = encode(Image.frombytes("I;16B", (2, 1), grey.astype(">u2").tobytes()), "TIFF")
    assert decode(little, LIMITS).tolist() == decode(big, LIMITS).tolist() == [[[0x12] * 3, [0xFE] * 3]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_samples_are_refused(dtype):
    with pytest.raises(UnsupportedMedia, match="32-bit samples"):
        decode(encode(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"), LIMITS)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several(form):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    body = encode(frames[0], form, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(body)).n_frames == 3
    red, green, blue = decode(body, LIMITS).reshape(-1, 3).mean(axis=0)
    assert red > 240 > 10 > max(green, blue)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation_is_applied(form, orientation):
    picture = np.kron(np.arange(6).reshape(2, 3) * 50, np.ones((16, 16))).astype(np.uint8)
    picture = np.dstack([picture, 255 - picture, picture])
    found = decode(oriented(picture, orientation, form), LIMITS)
    assert found.shape == picture.shape
    assert np.abs(found.astype(int) - picture).max() <= (8 if form == "JPEG" else 0)


def test_orientation_of_every_mode():
    grey = np.array([[0x1200, 0x3400, 0x5600]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    for picture in (Image.fromarray(grey), image("1").crop((0, 0, 3, 1)), image("P").crop((0, 0, 3, 1)), image("LA")):
        assert decode(encode(picture, exif=exif), LIMITS).shape == (picture.width, picture.height, 3)


def test_broken_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    good = exif.tobytes()
    generator = random.Random(0)
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            broken[generator.randrange(6, len(broken))] = generator.randrange(256)
        assert sorted(decode(encode(image(), "JPEG", exif=bytes(broken)), LIMITS).shape) == [3, 24, 40]
    for broken in (good[:20], b"Exif\0\0", b"Exif\0\0nonsense"):
        assert decode(encode(image(), "JPEG", exif=broken), LIMITS).shape == (24, 40, 3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_truncated_picture_is_refused(form, part):
    body = encode(scene(64, 64), form)
    with pytest.raises(InvalidImage, match=f"the {form} picture is truncated or corrupt|WebP picture is truncated"):
        decode(body[: max(16, int(len(body) * part))], LIMITS)


@pytest.mark.parametrize("body", [b"", b"hello", b"<html>", b"%PDF-1.7", b"RIFF\0\0\0\0WAVE", b"\0" * 100])
def test_no_picture_is_refused(body):
    with pytest.raises(UnsupportedMedia, match="no JPEG, PNG, WebP, BMP, GIF or TIFF picture"):
        decode(body, LIMITS)


def test_bytes_are_limited():
    body = encode(image(), "BMP")
    assert decode(body + b"\0" * (20_000_000 - len(body)), LIMITS).shape == (24, 40, 3)
    with pytest.raises(ImageTooLarge, match="20000001 bytes, more than the 20000000 allowed"):
        decode(body + b"\0" * (20_000_001 - len(body)), LIMITS)


@pytest.mark.parametrize("form", FORMATS)
def test_pixels_are_limited(form):
    body = encode(image(), form)
    assert decode(body, Limits(max_pixels=24 * 40)).shape == (24, 40, 3)
    with pytest.raises(ImageTooLarge, match=re.escape("40x24 = 960 pixels, more than the 959 allowed")):
        decode(body, Limits(max_pixels=24 * 40 - 1))


def webp(chunk: bytes, data: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int, frame_width: int, frame_height: int) -> bytes:
    screen, frame = (
        struct.pack("<HHBBB", width, height, 0x80, 0, 0),
        struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0),
    )
    return b"GIF89a" + screen + b"\0\0\0\xff\xff\xff" + b"," + frame + b"\x02\x02\x4c\x01\x00;"


def tiff_with_tile(side: int) -> bytes:
    """8 x 8 pixels that lie in one compressed tile of `side` x `side`."""
    tags = {256: 8, 257: 8, 258: 8, 259: 5, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries).ljust(2000, b"\0")


BOMBS = {
    "png": png(60000, 60000),
    "png-header": png(60000, 60000)[:33],  # all that a client needs to send
    "png-just-above": png(10000, 5001),
    "webp-extended": webp(b"VP8X", bytes(4) + (16382).to_bytes(3, "little") * 2),
    "webp-lossless": webp(b"VP8L", b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(8)),
    "webp-whole": webp(b"VP8L", bytes.fromhex("2f27e3db05071011fd0f4444ff03")),  # 9000x6000, one colour
    "webp-lossy": webp(b"VP8 ", b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(8)),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff-tile": tiff_with_tile(30000),
    "gif-screen": gif(65535, 65535, 1, 1),
    "gif-frame": gif(1, 1, 65535, 65535),
    "jpeg": encode(image(), "JPEG").replace(struct.pack(">HH", 24, 40), b"\xff" * 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused(name):
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(BOMBS[name], LIMITS)


def test_bombs_take_no_memory(repository):
    """In a process that may allocate 100 MB more than it has after its imports; a decoder's canvas would take more."""
    script = """
    import resource, sys
    from pathlib import Path
    from PIL import Image
    from handlers.errors import ImageTooLarge
    from handlers.image import decode
    from handlers.settings import Limits
    Image.init()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100_000_000,) * 2)
    for line in sys.stdin:
        name, body = line.split()
        try:
            decode(bytes.fromhex(body), Limits())
        except ImageTooLarge:
            print(name)
    """
    lines = "\n".join(f"{name} {body.hex()}" for name, body in BOMBS.items())
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=repository, check=True, timeout=60)
    assert done.stdout.split() == list(BOMBS)


@given(data=st.data())
@settings(max_examples=300)
def test_mutated_pictures_are_decoded_or_refused(data):
    body = bytearray(data.draw(st.sampled_from(MUTABLE)))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body
    try:
        pixels = decode(bytes(body), Limits(max_pixels=1_000_000))
    except RequestError as error:
        assert_one_line(error)
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert min(pixels.shape) >= 1


MUTABLE = [
    *(encode(image("P") if form == "GIF" else image(), form) for form in FORMATS),
    encode(image(), "TIFF", compression="tiff_lzw"),
    encode(image(), "JPEG", progressive=True),
    oriented(PIXELS, 6, "JPEG"),
    sixteen_bits(0),
]
