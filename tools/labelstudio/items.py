"""Captured items: pictures that a served model kept as worth labelling, with what it found on them.

YYYY-MM-DD/<id>.jpg     the picture; or .png, .webp and others
YYYY-MM-DD/<id>.json    written last, so that an item is whole where it is there
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
from pydantic import BaseModel, Field, ValidationError

from tools.errors import ToolError

ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
READ_TOGETHER = 200

_JSON = re.compile(rf"(?:.*/)?\d{{4}}-\d{{2}}-\d{{2}}/(?P<id>{ID})\.json")
_IMAGE = re.compile(rf"(?P<id>{ID})\.(?:jpg|jpeg|png|webp|bmp|gif)")


class Detection(BaseModel):
    label: str
    score: float = Field(ge=0, le=1)
    box: tuple[float, float, float, float]


class Item(BaseModel):
    """As `handlers.capture` writes it. Boxes are xyxy in pixels of the upright picture of width x height."""

    id: str
    time: str
    image: str = Field(pattern=_IMAGE.pattern)
    model: str
    version: str
    reasons: list[str]
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    detections: list[Detection]


@dataclass(frozen=True)
class Captured:
    """An item, and where its picture lies."""

    item: Item
    picture: str


class Source:
    """A folder, or `s3://bucket/prefix` with endpoint and credentials of the environment."""

    def __init__(self, url: str):
        """Raises ToolError where there is nothing that was captured."""
        self.url = url
        self._jsons: dict[str, str] = {}
        try:
            self._files, root = fsspec.core.url_to_fs(url)
            found = self._files.find(root)
        except ImportError as error:
            raise ToolError(f"{url} needs another package ({error})") from error
        except Exception as error:  # every storage has failures of its own
            raise ToolError(f"{url} cannot be read ({type(error).__name__}: {error})") from error
        for path in found:
            if name := _JSON.fullmatch(path):
                self._jsons[name["id"]] = path
        if not self._jsons:
            raise ToolError(f"{url} holds no captured item (DATE/ID.json); give the folder or bucket of a capture")

    def ids(self) -> list[str]:
        """In the order of time."""
        return sorted(self._jsons)

    def read(self, ids: Sequence[str]) -> Iterator[tuple[str, Captured | ToolError]]:
        """Each item; in place of one that cannot be used, why."""
        for start in range(0, len(ids), READ_TOGETHER):
            some = ids[start : start + READ_TOGETHER]
            texts = self._contents([self._jsons[id] for id in some])
            for id in some:
                yield id, self._parse(id, texts[self._jsons[id]])

    def picture(self, captured: Captured) -> bytes | ToolError:
        content = self._contents([captured.picture])[captured.picture]
        if isinstance(content, bytes):
            return content
        return ToolError(f"item {captured.item.id}: its picture cannot be read ({type(content).__name__}: {content})")

    def _parse(self, id: str, text: bytes | Exception) -> Captured | ToolError:
        if isinstance(text, Exception):
            return ToolError(f"item {id} cannot be read ({type(text).__name__}: {text})")
        try:
            item = Item.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            return ToolError(f"item {id} is not as captures are: {f'{where}: ' if where else ''}{first['msg']}")
        name = _IMAGE.fullmatch(item.image)
        if item.id != id or name is None or name["id"] != id:
            return ToolError(f"item {id} names itself {item.id[:80]!r} and its picture {item.image[:80]!r}")
        return Captured(item, str(PurePosixPath(self._jsons[id]).with_name(item.image)))

    def _contents(self, paths: list[str]) -> dict[str, bytes | Exception]:
        return dict(self._files.cat(paths, on_error="return"))
