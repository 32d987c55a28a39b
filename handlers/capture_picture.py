"""A picture on its way into the store: what it looks like, its metadata taken off, parts of it made unrecognisable."""

import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from handlers.image import ORIENTATION, UPRIGHT, decode, sniff
from handlers.settings import Limits

JPEG_QUALITY = 95
# What is left of a blurred box: at most so many blocks a side, each of at least so many pixels.
_BLOCKS = 4
_BLOCK_PIXELS = 8
# By how much of its sides a box is enlarged before it is blurred, on each side.
_MARGIN = 0.1

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _APP0, _APP15, _COMMENT = 0xDA, 0xE0, 0xEF, 0xFE
# The markers that a segment with a length begins with, those of a frame's header on.
_SEGMENTS = {*range(0xC0, 0xFF)} - {*range(0xD0, 0xDA)}
# A marker among entropy-coded data: neither a stuffed 0xFF nor a restart (ITU-T T.81, B.1.1.2).
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# The application segments that say what colours the samples mean: JFIF without a thumbnail, ICC profile, Adobe.
_COLOURS = re.compile(rb"\xff\xe0\x00\x10JFIF\x00|\xff\xe2..ICC_PROFILE\x00|\xff\xee..Adobe", re.DOTALL)

Box = tuple[float, float, float, float]


def look(body: bytes, limits: Limits) -> int:
    """64 bits that differ in few places for two pictures that look alike.

    The difference hash: of 9 x 8 grey blocks, which of two neighbours in a row is brighter (N. Krawetz, "Kind of Like
    That", 2013).
    """
    if sniff(body) == "JPEG":
        with Image.open(io.BytesIO(body), formats=["JPEG"]) as image:
            # Decoded at an eighth of its size, if it is large.
            image.draft("L", (72, 64))
            small = _small(image)
    else:
        small = _small(Image.fromarray(decode(body, limits)))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes())


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))


def prepared(body: bytes, limits: Limits, blurred: Sequence[Box]) -> tuple[bytes, str]:
    """What is kept of an encoded picture, and the suffix of its file.

    A JPEG stays as it is, without metadata but for its orientation. All else becomes an upright PNG of 8 bits. blurred:
    boxes in pixels of the upright picture; a JPEG with some of them is encoded anew, upright.
    """
    is_jpeg = sniff(body) == "JPEG"
    if is_jpeg and not blurred:
        try:
            return without_metadata(body), ".jpg"
        except ValueError:
            # Built otherwise than the standard says, which decoders put up with.
            pass
    image = Image.fromarray(decode(body, limits))
    for box in blurred:
        _pixelate(image, box)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if is_jpeg else "PNG", quality=JPEG_QUALITY)
    return buffer.getvalue(), ".jpg" if is_jpeg else ".png"


def without_metadata(body: bytes) -> bytes:
    """A JPEG without what does not belong to its pixels: EXIF, XMP, IPTC, comments, thumbnails and all that follows its
    end; a rotation alone is kept. Raises ValueError for what is built otherwise than ITU-T T.81, annex B says."""
    parts = [_SOI, _rotation(body)]
    at = len(_SOI)
    while True:
        if body[at : at + 2] == _EOI:
            return b"".join([*parts, _EOI])
        marker = body[at + 1] if body[at : at + 1] == b"\xff" and at + 4 <= len(body) else 0
        end = at + 2 + int.from_bytes(body[at + 2 : at + 4])
        if marker not in _SEGMENTS or end < at + 4 or end > len(body):
            raise ValueError(f"no segment at byte {at}")
        segment = body[at:end]
        if not (_APP0 <= marker <= _APP15 or marker == _COMMENT) or _COLOURS.match(segment):
            parts.append(segment)
        if marker == _SOS:
            following = _NEXT_MARKER.search(body, end)
            if not following:
                raise ValueError("the picture does not end")
            parts.append(body[end : following.start()])
            end = following.start()
        at = end


def _rotation(body: bytes) -> bytes:
    """An EXIF segment that holds nothing else, where the picture does not lie upright."""
    with Image.open(io.BytesIO(body), formats=["JPEG"]) as image:
        try:
            value = image.getexif().get(ORIENTATION)
        except Exception:  # noqa: BLE001  # broken metadata is none for the decoder either
            value = None
    if value not in UPRIGHT:
        return b""
    exif = Image.Exif()
    exif[ORIENTATION] = value
    content = exif.tobytes()
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content


def head(box: Box) -> Box:
    """The part of somebody's box that the head is in: as high as the box is wide, at least a third of it."""
    x1, y1, x2, y2 = box
    return x1, y1, x2, min(y2, y1 + max(x2 - x1, (y2 - y1) / 3))


def _pixelate(image: Image.Image, box: Box) -> None:
    """In place; each block gets the mean of what was in it, which no one can turn back."""
    x1, y1, x2, y2 = box
    dx, dy = (x2 - x1) * _MARGIN, (y2 - y1) * _MARGIN
    left, top = max(0, int(x1 - dx)), max(0, int(y1 - dy))
    right, bottom = min(image.width, int(x2 + dx) + 1), min(image.height, int(y2 + dy) + 1)
    if left < right and top < bottom:
        patch = image.crop((left, top, right, bottom))
        blocks = [max(1, min(_BLOCKS, side // _BLOCK_PIXELS)) for side in patch.size]
        mean = patch.resize((blocks[0], blocks[1]), Image.Resampling.BOX)
        image.paste(mean.resize(patch.size, Image.Resampling.NEAREST), (left, top))
