"""Which archives of a model store are served, checked before anything starts."""

import mimetypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from handlers.errors import BadArchive
from tools.archive.reader import Archive, open_archive
from tools.errors import ToolError

# TorchServe's own defaults, for archives that say nothing.
BATCH_DELAY_MS = 100
TIMEOUT_S = 120
# Names and versions become parts of URLs and paths.
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Served:
    """An archive to serve and what starting, probing and stopping it needs.

    image: bytes that it must answer with 200, image_name their file name. max_bytes: of one picture,
    None where the archive sets no limit. batch_delay and the timeouts: seconds.
    """

    path: Path
    name: str
    version: str
    image: bytes
    image_name: str
    is_golden: bool
    max_bytes: int | None
    batch_delay: float
    response_timeout: float
    startup_timeout: float

    @property
    def key(self) -> str:
        """How TorchServe's log names it."""
        return f"{self.name}_{self.version}"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def content_type(self) -> str:
        return mimetypes.guess_type(self.image_name)[0] or "application/octet-stream"


def find_archives(store: Path, models: Sequence[str] | None = None) -> list[Served]:
    """The archives of `store` (all, or those of the named models), the newest version of a model first.

    Raises ToolError: the store cannot be read, holds no archive or not the named model, or two
    archives have one name and version. Raises BadArchive for an archive that cannot be opened.
    """
    paths = _list(store)
    if not paths:
        raise ToolError(f"model store {store} holds no .mar file; build one with `marina archive build`")
    found: list[Served] = []
    broken: list[BadArchive] = []
    for path in paths:
        try:
            with open_archive(path) as archive:
                found.append(_served(archive))
        except BadArchive as error:
            broken.append(error)
    names = sorted({served.name for served in found})
    unknown = [name for name in models or () if name not in names]
    # What was not asked for may be broken, unless it could be what was asked for.
    if broken and (models is None or unknown):
        raise broken[0]
    if unknown:
        raise ToolError(f"no model {', '.join(unknown)} in {store}; it holds {', '.join(names)}")
    if models is not None:
        found = [served for served in found if served.name in models]
    _check_unique(found)
    return sorted(found, key=lambda served: (served.name, _version_order(served.version)), reverse=True)


def _list(store: Path) -> list[Path]:
    try:
        return sorted(path for path in store.iterdir() if path.suffix == ".mar")
    except FileNotFoundError:
        raise ToolError(f"model store {store} does not exist; give the folder that holds the .mar files") from None
    except NotADirectoryError:
        raise ToolError(f"model store {store} is a file; give the folder that holds the .mar files") from None
    except OSError as error:
        raise ToolError(f"model store {store} cannot be read ({error.strerror}); check its permissions") from None


def _served(archive: Archive) -> Served:
    for text in (archive.name, archive.version):
        if not _SAFE.fullmatch(text):
            raise BadArchive(
                f"{archive.path}: the manifest says {text!r} where a name or version of letters, digits and ._+- "
                "belongs, as it becomes a part of URLs; rebuild the archive"
            )
    settings = archive.settings or {}
    try:
        golden, limits = settings.get("golden") or [], settings.get("limits") or {}
        image_name = str(golden[0]["image"]) if golden else "gradient.jpg"
        max_bytes = int(limits["max_bytes"]) if "max_bytes" in limits else None
    except (LookupError, TypeError, ValueError) as error:
        raise BadArchive(
            f"{archive.path}: golden or limits in its model-config.yaml are not as a build writes them"
            f" ({error!r}); rebuild the archive"
        ) from error
    return Served(
        path=archive.path.absolute(),
        name=archive.name,
        version=archive.version,
        image=archive.read(image_name) if golden else gradient_jpeg(),
        image_name=Path(image_name).name,
        is_golden=bool(golden),
        max_bytes=max_bytes,
        batch_delay=_number(archive, "maxBatchDelay", BATCH_DELAY_MS) / 1000,
        response_timeout=_number(archive, "responseTimeout", TIMEOUT_S),
        startup_timeout=_number(archive, "startupTimeout", TIMEOUT_S),
    )


def _number(archive: Archive, key: str, default: int) -> int:
    value = archive.config.get(key, default)
    # TorchServe ignores what is no whole number, and takes its default.
    return value if isinstance(value, int) and value > 0 else default


def _check_unique(found: list[Served]) -> None:
    seen: dict[str, Path] = {}
    for served in found:
        other = seen.setdefault(served.key, served.path)
        if other != served.path:
            raise ToolError(f"{other} and {served.path} are both {served}; remove one, or give it another version")


def _version_order(version: str) -> list[tuple[bool, int, str]]:
    """Sort key: numbers by value, so that 1.10 comes after 1.9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"[.+-]", version)]


@cache
def gradient_jpeg() -> bytes:
    """A small picture for archives that bring none."""
    from PIL import Image

    sink = BytesIO()
    ramp = Image.linear_gradient("L").resize((160, 120))
    Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).save(sink, "JPEG")
    return sink.getvalue()
