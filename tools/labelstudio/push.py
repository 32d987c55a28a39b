"""Captured items as tasks, with what the model found as predictions.

listed -> those without a task are read -> their labels checked -> batches: pictures uploaded -> tasks made

The pictures go to Label Studio itself, so that it needs no access to the storage of the capture, whose retention then
takes no picture away that somebody labels. A push that was cut off between pictures and tasks finds the former again by
their names.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tools.errors import ToolError
from tools.labelstudio.client import LabelStudio
from tools.labelstudio.config import Control
from tools.labelstudio.items import ID, Captured, Source
from tools.labelstudio.project import BACKEND_TITLE, control_of
from tools.labelstudio.regions import model_version, prediction, to_regions
from tools.progress import Progress

# Label Studio takes 100 files and 250 MB in one request.
BATCH, BATCH_BYTES = 50, 50_000_000

# Label Studio puts eight digits before a file's name.
_UPLOAD = re.compile(rf"upload/\d+/[0-9a-f]{{8}}-(?P<id>{ID})\.\w+")


@dataclass
class Pushed:
    """added: tasks made. known: items that had one. unusable: why others were left out. models: of the items added."""

    added: int = 0
    known: int = 0
    unusable: list[str] = field(default_factory=list)
    models: Counter[str] = field(default_factory=Counter)


def push(studio: LabelStudio, title: str, source: str) -> Pushed:
    """Every item of `source` (a folder, or s3://bucket/prefix) that has no task yet. Raises ToolError."""
    project = studio.needed_project(title)
    control = control_of(project)
    items = Source(source)
    there = {task["data"].get("item") for task in studio.tasks(project["id"], "id,data")}
    missing = [id for id in items.ids() if id not in there]
    pushed = Pushed(known=len(items.ids()) - len(missing))
    new: list[Captured] = []
    for _, found in items.read(missing):
        if isinstance(found, ToolError):
            pushed.unusable.append(str(found))
        else:
            new.append(found)
    _check_labels(new, control, title)
    if new:
        uploads = _uploads(studio, project["id"], {"all": "true"})
        newest = ""
        with Progress("pushing", len(new), unit="pictures") as progress:
            for batch in _batches(items, new, uploads, pushed):
                _push_batch(studio, project["id"], control, batch, uploads)
                pushed.added += len(batch)
                pushed.models.update(_version(captured) for captured, _ in batch)
                progress.advance(len(batch))
                newest = _version(batch[-1][0])
        if pushed.added:
            _show(studio, project, newest)
    return pushed


def _check_labels(new: list[Captured], control: Control, title: str) -> None:
    found = Counter(detection.label for captured in new for detection in captured.item.detections)
    if unknown := sorted(found.keys() - set(control.labels)):
        raise ToolError(
            f"the captured pictures have detections of {', '.join(map(repr, unknown))}, which project {title!r} has no"
            " label for; add them with: marina label setup ARCHIVE"
        )


def _batches(
    items: Source, new: list[Captured], uploads: dict[str, str], pushed: Pushed
) -> Iterator[list[tuple[Captured, bytes]]]:
    """With the pictures, empty for those that were uploaded before."""
    batch: list[tuple[Captured, bytes]] = []
    size = 0
    for captured in new:
        picture = b"" if captured.item.id in uploads else items.picture(captured)
        if isinstance(picture, ToolError):
            pushed.unusable.append(str(picture))
            continue
        if batch and (len(batch) == BATCH or size + len(picture) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((captured, picture))
        size += len(picture)
    if batch:
        yield batch


def _push_batch(
    studio: LabelStudio,
    project: int,
    control: Control,
    batch: list[tuple[Captured, bytes]],
    uploads: dict[str, str],
) -> None:
    """uploads: addresses of pictures by id, which gets those of this batch."""
    files = [
        (captured.item.id, (f"{captured.item.id}{PurePosixPath(captured.item.image).suffix}", picture))
        for captured, picture in batch
        if captured.item.id not in uploads
    ]
    if files:
        made = studio.call(
            "POST", f"/api/projects/{project}/import", params={"commit_to_project": "false"}, files=files
        )
        uploads |= _uploads(studio, project, {"ids": json.dumps(made["file_upload_ids"])})
    tasks = [_task(captured, uploads[captured.item.id], control) for captured, _ in batch]
    studio.call("POST", f"/api/projects/{project}/import", json=tasks)


def _uploads(studio: LabelStudio, project: int, query: dict[str, str]) -> dict[str, str]:
    """The path of each uploaded picture at Label Studio, by the item's id."""
    found = studio.call("GET", f"/api/projects/{project}/file-uploads", params=query)
    names = (_UPLOAD.fullmatch(entry["file"]) for entry in found)
    return {name["id"]: f"{urlsplit(studio.url).path}/data/{name.string}" for name in names if name}


def _task(captured: Captured, address: str, control: Control) -> dict[str, Any]:
    item = captured.item
    detections = [detection.model_dump() for detection in item.detections]
    return {
        "data": {
            control.key: address,
            "item": item.id,
            "captured": item.time,
            "model": item.model,
            "version": item.version,
            "reasons": ", ".join(item.reasons),
        },
        "predictions": [prediction(_version(captured), to_regions(detections, item.width, item.height, control))],
    }


def _version(captured: Captured) -> str:
    return model_version(captured.item.model, captured.item.version)


def _show(studio: LabelStudio, project: dict[str, Any], version: str) -> None:
    """Label Studio shows the predictions of one version alone: of this one, unless live ones are shown."""
    if project.get("model_version") not in (BACKEND_TITLE, version):
        studio.call("PATCH", f"/api/projects/{project['id']}/", json={"model_version": version})
