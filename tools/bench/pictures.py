"""The pictures that a benchmark sends."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tools.archive.reader import Archive
from tools.errors import ToolError

SIZE = (640, 480)


def given_pictures(paths: Sequence[Path]) -> list[bytes]:
    """The bytes of the files. Raises ToolError naming one that cannot be read."""
    bodies = []
    for path in paths:
        try:
            bodies.append(path.read_bytes())
        except OSError as error:
            raise ToolError(f"picture {path} cannot be read ({error.strerror}); give another with --image") from error
    return bodies


def golden_picture(archive: Archive) -> bytes:
    """The archive's first golden picture as a JPEG of 640x480 pixels. Raises ToolError when it has none."""
    golden = (archive.settings or {}).get("golden")
    if not golden:
        raise ToolError(f"{archive.path} has no golden picture to take; give a picture with --image FILE")
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(archive.read(golden[0]["image"]))) as opened:
        opened.convert("RGB").resize(SIZE).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def described(body: bytes) -> str:
    """Format, size and bytes of an encoded picture, for people."""
    try:
        with Image.open(io.BytesIO(body)) as opened:
            return f"{opened.format} of {opened.width}x{opened.height} pixels and {len(body)} bytes"
    except UnidentifiedImageError:
        return f"no picture, {len(body)} bytes"
