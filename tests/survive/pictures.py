"""Pictures that are broken in every way: seeds of our own drawing, and what changes their bytes.

All of it is a function of the generator that is given: the same seed makes the same bytes.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from numpy.random import default_rng
from PIL import Image, ImageOps
from survive.bombs import BOMBS, png_chunk

from tools.data.draw import draw_scene

Mutator = Callable[[Random, bytes], bytes]

ORIENTATION = 0x0112
# Where faults of arithmetic show.
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# Sides of a picture that lies about itself: none, just within 50 million pixels, far beyond.
SIDES = (0, 1, 7000, 7100, 16383, 32768, 65535)


def drawn_picture() -> bytes:
    """A JPEG with a few shapes."""
    return _encoded(_scene(3), "JPEG", quality=90)


def drawn_seeds() -> list[bytes]:
    """One of every form that the handler takes, and of some that it refuses."""
    scene = _scene(1)
    frames = [scene, _scene(2), ImageOps.invert(scene)]
    several = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    deep = np.asarray(scene.convert("L")).astype(np.uint16) * 257
    return [
        _encoded(scene, "JPEG", exif=exif),
        _encoded(scene, "JPEG", progressive=True, quality=60, comment=b"a comment"),
        _encoded(scene, "JPEG", restart_marker_rows=1, subsampling=2, dpi=(72, 72)),
        _encoded(scene.convert("CMYK"), "JPEG"),
        _encoded(scene.convert("L"), "JPEG"),
        _encoded(scene, "PNG", exif=exif, icc_profile=bytes(200)),
        *(_encoded(scene.convert(mode), "PNG") for mode in ("RGBA", "LA", "L", "1", "P")),
        _encoded(Image.fromarray(deep), "PNG"),
        _encoded(frames[0], "PNG", **several),
        _encoded(scene, "WEBP", quality=70, exif=exif),
        _encoded(scene.convert("RGBA"), "WEBP", lossless=True),
        _encoded(frames[0], "WEBP", **several),
        *(_encoded(scene.convert(mode), "BMP") for mode in ("RGB", "P", "1")),
        _encoded(scene.convert("P"), "GIF", comment=b"a comment"),
        _encoded(frames[0], "GIF", **several),
        _encoded(scene, "TIFF", exif=exif),
        _encoded(scene, "TIFF", compression="tiff_lzw"),
        _encoded(scene.convert("CMYK"), "TIFF", compression="tiff_deflate"),
        _encoded(Image.fromarray(deep), "TIFF"),
        _encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"),
    ]


def photographs(shared: Path) -> list[bytes]:
    """The real ones that lie beside a checkout; none where they do not."""
    return [path.read_bytes() for path in sorted((shared / "real" / "photos").glob("*.jpg"))]


def mutated(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """A seed, changed once to thrice; now and then one that is a bomb from the start."""
    if rng.random() < 0.02:
        return rng.choice(BOMBS)(rng)
    body = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        own = OF_FORM.get(form_of(body), ())
        change = rng.choice(own) if own and rng.random() < 0.6 else rng.choice(ANY)
        body = _spliced(rng, body, rng.choice(seeds)) if rng.random() < 0.03 else change(rng, body)
    return body


def form_of(body: bytes) -> str:
    if body[:4] == b"RIFF":
        return "WEBP"
    known = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"BM": "BMP", b"GI": "GIF", b"II": "TIFF", b"MM": "TIFF"}
    return known.get(body[:2], "")


def _scene(seed: int) -> Image.Image:
    return draw_scene(default_rng(seed), 96, 64)[0]


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


# Of any bytes


def flip_bits(rng: Random, body: bytes) -> bytes:
    changed = bytearray(body)
    for _ in range(rng.choice((1, 1, 4, 32))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng: Random, body: bytes) -> bytes:
    return body[: rng.randrange(len(body) + 1)]


def drop_span(rng: Random, body: bytes) -> bytes:
    start, end = _span(rng, body)
    return body[:start] + body[end:]


def repeat_span(rng: Random, body: bytes) -> bytes:
    start, end = _span(rng, body)
    return body[:start] + body[start:end] * rng.choice((2, 3, 20)) + body[end:]


def insert_noise(rng: Random, body: bytes) -> bytes:
    place = rng.randrange(len(body) + 1)
    return body[:place] + rng.randbytes(rng.choice((1, 4, 300))) + body[place:]


def set_number(rng: Random, body: bytes) -> bytes:
    """One that is at an edge of its type, most often in the header."""
    place = rng.randrange(min(len(body), 200 if rng.random() < 0.7 else len(body)) + 1)
    form = rng.choice(("<H", ">H", "<I", ">I", "B"))
    number = struct.pack(form, rng.choice(EDGES) % (1 << 8 * struct.calcsize(form)))
    return body[:place] + number + body[place + len(number) :]


def _span(rng: Random, body: bytes) -> tuple[int, int]:
    start = rng.randrange(len(body) + 1)
    return start, min(len(body), start + rng.choice((1, 2, 16, 500)))


def _spliced(rng: Random, body: bytes, other: bytes) -> bytes:
    return truncate(rng, body) + other[rng.randrange(len(other)) :]


ANY: tuple[Mutator, ...] = (flip_bits, flip_bits, truncate, drop_span, repeat_span, insert_noise, set_number)


# Of parts: a picture as a list of them


def _shuffled(rng: Random, parts: list[bytes]) -> bytes:
    """One of the parts lost, doubled, many times there, or elsewhere."""
    parts = list(parts)
    if len(parts) > 1:
        index = rng.randrange(1, len(parts))
        part = parts.pop(index)
        times = rng.choice((0, 2, 200 if len(part) < 1000 else 2, 1))
        place = rng.randrange(1, len(parts) + 1) if times == 1 else index
        parts[place:place] = [part] * times
    return b"".join(parts)


def jpeg_segments(body: bytes) -> list[bytes]:
    """The start of the picture, each segment, and all from the first scan on."""
    parts, place = [body[:2]], 2
    while place + 4 <= len(body) and body[place] == 0xFF and body[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(body[place + 2 : place + 4])
        parts.append(body[place:end])
        place = max(end, place + 2)
    return [*parts, body[place:]]


def shuffle_segments(rng: Random, body: bytes) -> bytes:
    return _shuffled(rng, jpeg_segments(body))


def lie_in_a_segment(rng: Random, body: bytes) -> bytes:
    """A length that is not true, or a number in a table or a frame's header."""
    parts = jpeg_segments(body)
    index = rng.randrange(len(parts))
    part = bytearray(parts[index])
    if len(part) > 4:
        place = rng.choice((2, 3, 4, rng.randrange(4, min(len(part), 40))))
        part[place] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
    return b"".join([*parts[:index], bytes(part), *parts[index + 1 :]])


def lie_about_jpeg_sides(rng: Random, body: bytes) -> bytes:
    parts = jpeg_segments(body)
    sides = struct.pack(">HH", rng.choice(SIDES), rng.choice(SIDES))
    return b"".join(part[:5] + sides + part[9:] if part[1:2] in (b"\xc0", b"\xc2") else part for part in parts)


def add_exif_noise(rng: Random, body: bytes) -> bytes:
    exif = b"Exif\0\0" + rng.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"")) + rng.randbytes(rng.choice((2, 60)))
    return body[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + body[2:]


def png_chunks(body: bytes) -> list[bytes]:
    parts, place = [body[:8]], 8
    while place + 8 <= len(body):
        end = place + 12 + int.from_bytes(body[place : place + 4])
        parts.append(body[place:end])
        place = end
    return parts


def shuffle_chunks(rng: Random, body: bytes) -> bytes:
    return _shuffled(rng, png_chunks(body))


def change_a_chunk(rng: Random, body: bytes) -> bytes:
    """Its content, most often with a checksum that fits."""
    parts = png_chunks(body)
    index = rng.randrange(len(parts))
    part = parts[index]
    if len(part) > 12:
        data = flip_bits(rng, part[8:-4]) if rng.random() < 0.7 else set_number(rng, part[8:-4])
        part = png_chunk(part[4:8], data) if rng.random() < 0.8 else part[:8] + data + part[-4:]
    return b"".join([*parts[:index], part, *parts[index + 1 :]])


def lie_about_png_header(rng: Random, body: bytes) -> bytes:
    """Sides, depth, colour type and interlacing, with a checksum that fits."""
    header = struct.pack(">II", rng.choice((*SIDES, 96)), rng.choice((*SIDES, 64)))
    header += bytes((rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 7)), 0, 0, rng.choice((0, 1, 2))))
    return body[:8] + png_chunk(b"IHDR", header) + body[33:]


def add_chunk(rng: Random, body: bytes) -> bytes:
    kind = rng.choice(
        (b"eXIf", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"cHRM")
    )
    data = rng.choice((rng.randbytes(rng.choice((0, 4, 26))), b"a\0\0" + zlib.compress(bytes(100_000))))
    return body[:33] + png_chunk(kind, data) + body[33:]


def webp_chunks(body: bytes) -> list[bytes]:
    parts, place = [body[:12]], 12
    while place + 8 <= len(body):
        size = int.from_bytes(body[place + 4 : place + 8], "little")
        end = place + 8 + size + size % 2
        parts.append(body[place:end])
        place = end
    return parts


def shuffle_webp(rng: Random, body: bytes) -> bytes:
    """With the file's length set right again, or not."""
    changed = _shuffled(rng, webp_chunks(body))
    return changed[:4] + struct.pack("<I", len(changed) - 8) + changed[8:] if rng.random() < 0.7 else changed


def lie_about_webp_sides(rng: Random, body: bytes) -> bytes:
    side = rng.choice((16382, 6000, 1)).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + bytes((rng.choice((0, 2, 16, 0x3E)), 0, 0, 0)) + side * 2
    return body[:12] + extended + body[12:]


def lie_in_the_head(rng: Random, body: bytes) -> bytes:
    """Of BMP, GIF and TIFF, whose headers are numbers at fixed places."""
    changed = bytearray(body)
    for _ in range(rng.choice((1, 2))):
        place = rng.randrange(2, min(len(changed), 60)) if len(changed) > 4 else 0
        changed[place : place + 2] = struct.pack("<H", rng.choice(EDGES) & 0xFFFF)
    return bytes(changed)


def lie_in_a_directory(rng: Random, body: bytes) -> bytes:
    """An entry of a TIFF's first directory: its tag, type, count or value."""
    order: str = "<" if body[:2] == b"II" else ">"
    if len(body) < 8:
        return body
    (start,) = struct.unpack(f"{order}I", body[4:8])
    count = int.from_bytes(body[start : start + 2], "little" if order == "<" else "big")
    if not count or start + 2 + 12 * count > len(body):
        return flip_bits(rng, body)
    place = start + 2 + 12 * rng.randrange(count)
    field, form = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I")))
    number = struct.pack(order + form, rng.choice((*EDGES, 2, 8, 300)) % (1 << 8 * struct.calcsize(form)))
    return body[: place + field] + number + body[place + field + len(number) :]


OF_FORM: dict[str, tuple[Mutator, ...]] = {
    "JPEG": (shuffle_segments, lie_in_a_segment, lie_in_a_segment, lie_about_jpeg_sides, add_exif_noise),
    "PNG": (shuffle_chunks, change_a_chunk, change_a_chunk, lie_about_png_header, add_chunk),
    "WEBP": (shuffle_webp, lie_about_webp_sides),
    "BMP": (lie_in_the_head,),
    "GIF": (lie_in_the_head,),
    "TIFF": (lie_in_the_head, lie_in_a_directory, lie_in_a_directory),
}
