"""Label Studio's JSON export: a list of tasks with their annotations.

Boxes are in per cent of the picture; one that is turned becomes the upright box around it. The export has no
pictures: they are found by name beside the file or in `--images`. Of several annotations of a task the one marked
as ground truth counts, else the last.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tools.data.formats.source import (
    PICTURE_SUFFIXES,
    Label,
    Problem,
    ReadOptions,
    Source,
    SourcePicture,
    cut,
    pictures_below,
    relative_name,
    tidy,
)
from tools.errors import ToolError

UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # that Label Studio puts before the name of an uploaded file


def find_file(folder: Path) -> Path | None:
    return next((path for path in sorted(folder.glob("*.json")) if looks_like_tasks(path)), None)


def looks_like_tasks(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    return text.lstrip().startswith("[") and '"data"' in text and ('"annotations"' in text or '"completions"' in text)


def read(path: Path, options: ReadOptions) -> Source:
    """`path`: the JSON file or its folder. Raises ToolError when no picture is found."""
    file = find_file(path) if path.is_dir() else path
    if file is None:
        raise ToolError(f"{path} holds no JSON export of Label Studio (export as JSON, not JSON-MIN)")
    try:
        tasks = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ToolError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ToolError(f"{file} is no list of tasks; export as JSON, not JSON-MIN")
    reader = _Reader(options.images or file.parent)
    pictures = list(reader.pictures(tasks))
    if not pictures:
        raise ToolError(f"none of the {len(tasks)} pictures of {file} is in {reader.root}; say where with --images DIR")
    classes = tuple(sorted({label.name for picture in pictures for label in picture.labels}))
    return Source("label-studio", classes, pictures, reader.problems, reader.notes)


@dataclass
class _Reader:
    root: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def pictures(self, tasks: list[dict[str, Any]]) -> Iterator[SourcePicture]:
        by_name: dict[str, list[Path]] = {}
        for path in pictures_below(self.root):
            by_name.setdefault(path.name, []).append(path)
        for number, task in enumerate(tasks, start=1):
            where = f"task {cut(task.get('id', number))}"
            results = self._results(where, task)
            before = len(self.problems)
            labels = tuple(label for result in results for label in self._labels(where, result))
            unreadable = sum(problem.effect == "dropped" for problem in self.problems[before:])
            name = _picture_name(task)
            found = by_name.get(name) or by_name.get(UPLOAD_PREFIX.sub("", name)) or []
            if len(found) == 1:
                yield SourcePicture(found[0], relative_name(found[0], self.root), None, labels, None, unreadable)
                continue
            reason = (
                f"picture {cut(name)!r} is in {len(found)} folders" if found else f"picture {cut(name)!r} is not there"
            )
            self.problems.append(Problem("dropped", where, reason, 1, len(labels)))

    def _results(self, where: str, task: dict[str, Any]) -> list[dict[str, Any]]:
        """Of the annotation that counts."""
        annotations = _objects(task.get("annotations", task.get("completions")))
        done = [entry for entry in annotations if not entry.get("was_cancelled")]
        if len(done) < len(annotations):
            self.notes.append(f"{where}: {len(annotations) - len(done)} cancelled annotations are left out")
        if not done:
            return []
        taken = next((entry for entry in done if entry.get("ground_truth")), done[-1])
        for entry in done:
            if entry is not taken:
                reason = f"annotation {cut(entry.get('id'))} gives way to {cut(taken.get('id'))} of the same picture"
                self.problems.append(Problem("left out", where, reason, boxes=len(_objects(entry.get("result")))))
        return _objects(taken.get("result"))

    def _labels(self, where: str, result: dict[str, Any]) -> Iterator[Label]:
        kind = result.get("type")
        place = f"{where}: region {cut(result.get('id'))}"
        value = result["value"] if isinstance(result.get("value"), dict) else {}
        if "x" not in value and "points" not in value and kind != "brushlabels":
            return  # a choice or a text about the whole picture
        names = value.get("rectanglelabels")
        try:
            if kind != "rectanglelabels" or not isinstance(names, list) or not names:
                raise ValueError(
                    f"a region of type {cut(kind)} with labels {cut(names)}; only labelled rectangles are read"
                )
            box = _box(value, result)
        except (ArithmeticError, ValueError, TypeError, KeyError) as error:
            self.problems.append(Problem("dropped", place, f"no box ({' '.join(str(error)[:200].split())})", boxes=1))
            return
        if value.get("rotation"):
            reason = f"turned by {cut(value['rotation'])} degrees; the upright box around it is taken"
            self.problems.append(Problem("changed", place, reason, boxes=len(names)))
        for name in names:
            yield Label(tidy(name), box, "fraction_xyxy", place)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _picture_name(task: dict[str, Any]) -> str:
    """Of `/data/upload/1/name`, `/data/local-files/?d=folder/name`, `s3://bucket/name` or another URL."""
    data = task.get("data")
    texts = [text for text in data.values() if isinstance(text, str)] if isinstance(data, dict) else []
    paths = [_path_of(text) for text in texts]
    pictures = [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES]
    return pictures[0].name if pictures else str(task.get("file_upload") or "")


def _path_of(text: str) -> PurePosixPath:
    try:
        parts = urlsplit(text)
    except ValueError:
        return PurePosixPath(text)
    local = parse_qs(parts.query).get("d")
    return PurePosixPath(local[0] if local else unquote(parts.path))


def _box(value: dict[str, Any], result: dict[str, Any]) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 in fractions, from per cent, turned clockwise about the upper left corner."""
    x, y, width, height = (float(value[key]) / 100 for key in ("x", "y", "width", "height"))
    angle = math.radians(float(value.get("rotation") or 0))
    if not angle:
        return x, y, x + width, y + height
    # The angle is one of pixels, so a picture that is not square shears fractions.
    wide, high = float(result["original_width"]), float(result["original_height"])
    corners = [(0.0, 0.0), (width * wide, 0.0), (0.0, height * high), (width * wide, height * high)]
    across = [x + (a * math.cos(angle) - b * math.sin(angle)) / wide for a, b in corners]
    down = [y + (a * math.sin(angle) + b * math.cos(angle)) / high for a, b in corners]
    return min(across), min(down), max(across), max(down)
