"""Bytes of a request to an upright RGB picture.

Taken: JPEG, PNG, WebP, BMP, GIF and TIFF, the first frame of each. The EXIF orientation is applied.
Converted to 8-bit RGB: grey, bilevel and palette by value; alpha is dropped, not blended; CMYK, YCbCr and LAB
by Pillow's plain conversion, without colour profiles; of 16 bits the upper 8 are kept. Samples of 32 bits
and floating point have no agreed range and are refused. Sizes are checked before pixels are allocated.
"""

import io
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from handlers.errors import ImageTooLarge, InvalidImage, UnsupportedMedia
from handlers.settings import Limits

# First bytes, and Pillow's name for the format.
SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
# Raises RuntimeError for what it cannot decode.
JpegDecoder = Callable[[bytes], np.ndarray]
ACCEPTED = "JPEG, PNG, WebP, BMP, GIF or TIFF"
TILE_TAGS = 322, 323  # TileWidth, TileLength (TIFF 6.0, section 15)
SCAN = b"\xff\xda"  # the marker SOS (ITU-T T.81, table B.1)
# Of a JPEG, all scans together: libjpeg goes over all of them for each scan, even one of a few bytes. This many take
# seconds; a picture of 50 million pixels may have 170 scans, and the usual progressive one has 10.
MOST_SCANNED_PIXELS = 8_500_000_000

# What turns a picture of each EXIF orientation upright (EXIF 2.32, tag 0x0112).
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def sniff(body: bytes) -> str | None:
    """Pillow's name of the picture format that `body` begins like, or None."""
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    return next((name for signature, name in SIGNATURES if body.startswith(signature)), None)


def decode(body: bytes, limits: Limits, decode_jpeg: JpegDecoder | None = None) -> np.ndarray:
    """The upright picture as uint8 `[H, W, 3]`, RGB, to be read only.

    decode_jpeg: a faster way to the same pixels of an RGB JPEG that lies upright; what it refuses goes the common way.

    Raises ImageTooLarge (bytes or pixels), UnsupportedMedia (no format of ours), InvalidImage (truncated
    or corrupt).
    """
    if len(body) > limits.max_bytes:
        raise ImageTooLarge(f"the picture has {len(body)} bytes, more than the {limits.max_bytes} allowed; shrink it")
    name = sniff(body)
    if name is None:
        raise UnsupportedMedia(f"the body begins with {bytes(body[:8])!r}, which is no {ACCEPTED} picture")
    # Pillow allocates a WebP's canvas as soon as it opens it, and reads what follows a PNG's size before it tells.
    if name == "WEBP":
        _check_pixels(*_webp_size(body), limits)
    elif name == "PNG" and len(body) >= 24:
        _check_pixels(int.from_bytes(body[16:20]), int.from_bytes(body[20:24]), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked here, and odd metadata
            with Image.open(io.BytesIO(body), formats=[name]) as image:
                _check_pixels(*image.size, limits)
                if isinstance(image, TiffImageFile):
                    # A whole tile is allocated, however small the picture.
                    tile_width, tile_height = (int(image.tag_v2.get(tag, 0)) for tag in TILE_TAGS)
                    _check_pixels(tile_width, tile_height, limits)
                if name == "JPEG":
                    _check_scans(body, *image.size)
                if decode_jpeg and name == "JPEG" and image.mode == "RGB" and _turn(image) is None:
                    with suppress(RuntimeError):
                        return decode_jpeg(body)
                image.load()
                turn = _turn(image)
                return _to_rgb(image if turn is None else image.transpose(turn))
    except (ImageTooLarge, UnsupportedMedia):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"the picture has more than the {limits.max_pixels} pixels allowed ({error})") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"the {name} picture is truncated or corrupt (its header cannot be read)") from error
    except Exception as error:  # decoders of foreign bytes raise nearly everything
        raise InvalidImage(f"the {name} picture is truncated or corrupt ({error or type(error).__name__})") from error


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the picture is {width}x{height} = {width * height} pixels, more than the {limits.max_pixels} allowed"
        )


def _check_scans(body: bytes, width: int, height: int) -> None:
    scans = body.count(SCAN)
    if scans * width * height > MOST_SCANNED_PIXELS:
        raise ImageTooLarge(
            f"the picture is {width}x{height} pixels in {scans} scans, too many to decode; save it anew"
        )


def _webp_size(body: bytes) -> tuple[int, int]:
    """Canvas width and height from a WebP's first chunk (RFC 9649)."""
    chunk, data = body[12:16], body[20:30]
    if chunk == b"VP8X" and len(data) >= 10:
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if chunk == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and len(data) >= 10:
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    raise InvalidImage("the WebP picture is truncated or corrupt (no VP8 chunk)")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes it upright, None where it is. Of some formats it is known only when all of the picture is read."""
    # Pillow's own `exif_transpose` also writes the rest of the metadata anew, and fails where that is broken.
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  # broken metadata does not spoil a good picture
        return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UnsupportedMedia(f"the picture has 32-bit samples (mode {image.mode}); save it with 8 or 16 bits")
    return np.asarray(image.convert("RGB"))
