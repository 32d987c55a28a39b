"""Annotations to a data set in Marina's layout, anew or in addition to what an earlier pull brought.

tasks -> the annotation of each that counts -> compared with the history -> new pictures fetched, annotations written
      -> put in place at once

A picture that has its split keeps it, so that none that was trained on is ever evaluated on. Pictures whose tasks are
gone from Label Studio stay.
"""

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handlers.errors import RequestError
from handlers.image import decode, sniff
from handlers.settings import Limits
from tools.data.dataset import INFO, SPLITS, Box, Picture, read_dataset
from tools.data.split import BACKGROUND
from tools.data.write import MADE, put_in_place, workspace, write_annotations
from tools.errors import ToolError
from tools.labelstudio.client import LabelStudio, NoPicture
from tools.labelstudio.history import History, Origin, read_history, write_history
from tools.labelstudio.items import ID
from tools.labelstudio.project import control_of
from tools.labelstudio.regions import TYPE, to_boxes
from tools.progress import Progress

SHARES = (0.8, 0.1, 0.1)  # of train, valid and test, as `marina data prepare` splits
LIMITS = Limits(max_bytes=100_000_000)
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tiff"}
FIELDS = "id,data,annotations,result,was_cancelled,completed_by,updated_at"
NAMED = 5  # of the tasks with an unknown label


@dataclass
class Pulled:
    """Pictures by what became of them. skipped: tasks that annotators skipped. several: tasks whose latest annotation
    was taken of several. turned: rectangles that became the upright boxes around them. gone: pictures that stay though
    their tasks are no longer there. left_out: why the pictures of others are not in the set. unusable: regions that
    gave no box, and why."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: int = 0
    several: int = 0
    turned: int = 0
    gone: int = 0
    left_out: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Labelled:
    """A task with the annotation that counts. key: the item's id, else one made of the task's."""

    key: str
    origin: Origin
    address: object
    result: list[Any]


@dataclass
class Entry:
    """A picture of the set to be written. file: where its bytes lie. split: "" for one that has none yet."""

    file: Path
    split: str
    width: int
    height: int
    boxes: list[tuple[str, tuple[float, float, float, float]]]
    origin: Origin


def pull(studio: LabelStudio, title: str, output: Path) -> Pulled:
    """Bring the data set in the folder `output` up to what was annotated; all of it, or it stays as it was.

    Raises ToolError, also for annotations with labels that the project does not have, and for a folder that holds
    anything but pulls of the same project.
    """
    project = studio.needed_project(title)
    classes = control_of(project).labels
    history = read_history(output) or History(url=studio.url, project=project["id"], pictures={}, pulls=[])
    if (history.url, history.project) != (studio.url, project["id"]):
        raise ToolError(
            f"{output} holds what was pulled from project {history.project} of {history.url}; choose another folder"
        )
    pulled = Pulled()
    labelled, there = _labelled(studio, project, pulled)
    _check_labels(labelled.values(), classes, title)
    entries = _old_entries(output, history, classes)
    _drop_withdrawn(entries, labelled, there, pulled)
    with workspace(output) as scratch:
        _update(studio, entries, labelled, scratch, pulled)
        if not entries:
            first = f" ({pulled.left_out[0]})" if pulled.left_out else ""
            raise ToolError(
                f"project {title!r} has no annotation that can be used{first}; annotate some, then pull again"
            )
        if pulled.added or pulled.changed or pulled.removed:
            _write(scratch / MADE, entries, classes, history, pulled)
            put_in_place(scratch / MADE, output, INFO, replace=True)
    return pulled


def _labelled(studio: LabelStudio, project: dict[str, Any], pulled: Pulled) -> tuple[dict[str, _Labelled], set[int]]:
    """By key; and the ids of all tasks."""
    address = control_of(project).key
    found: dict[str, _Labelled] = {}
    there: set[int] = set()
    for task in studio.tasks(project["id"], FIELDS):
        there.add(task["id"])
        done = [annotation for annotation in task["annotations"] if not annotation["was_cancelled"]]
        pulled.skipped += bool(task["annotations"]) and not done
        if not done:
            continue
        last = max(done, key=lambda annotation: (_time(annotation["updated_at"]), annotation["id"]))
        data = task["data"]
        item = str(data.get("item", ""))
        key = item if re.fullmatch(ID, item) else f"task-{task['id']}"
        origin = Origin(
            item=item,
            model=str(data.get("model", "")),
            version=str(data.get("version", "")),
            task=task["id"],
            annotation=last["id"],
            annotator=last["completed_by"],
            time=last["updated_at"],
        )
        pulled.several += len(done) > 1 or key in found
        if key not in found or _time(found[key].origin.time) < _time(origin.time):
            found[key] = _Labelled(key, origin, data.get(address), last["result"])
    return found, there


def _time(text: str) -> datetime:
    # Digits after the second are left out where there are none, so that texts have another order.
    return datetime.fromisoformat(text)


def _check_labels(labelled: Iterable[_Labelled], classes: Sequence[str], title: str) -> None:
    unknown: dict[str, list[int]] = {}
    for one in labelled:
        for label in {label for region in one.result for label in region.get("value", {}).get(TYPE, [])}:
            if label not in classes:
                unknown.setdefault(label, []).append(one.origin.task)
    if unknown:
        where = "; ".join(
            f"{label!r} in {len(tasks)} tasks, such as {', '.join(map(str, tasks[:NAMED]))}"
            for label, tasks in sorted(unknown.items())
        )
        raise ToolError(
            f"annotations of project {title!r} have labels that it no longer has: {where}; give it the labels again"
            " with: marina label setup, or change these annotations"
        )


def _old_entries(output: Path, history: History, classes: Sequence[str]) -> dict[str, Entry]:
    """What the folder holds, by key."""
    if not history.pictures:
        return {}
    dataset = read_dataset(output)
    if lost := [name for name in dataset.classes if name not in classes]:
        raise ToolError(
            f"{output} has boxes of {', '.join(map(repr, lost))}, which the project no longer has a label for; give it"
            " the label again with: marina label setup, or pull to another folder"
        )
    entries = {}
    for split, pictures in dataset.splits.items():
        for picture in pictures:
            origin = history.pictures.get(f"{split}/{picture.name}")
            if origin is None:
                raise ToolError(f"{output}/{split}/{picture.name} is not in its history; pull to another folder")
            boxes = [(dataset.classes[box.label], box.xyxy) for box in picture.boxes]
            entry = Entry(picture.file, split, picture.width, picture.height, boxes, origin)
            entries[picture.file.stem] = entry
    return entries


def _drop_withdrawn(
    entries: dict[str, Entry], labelled: Mapping[str, _Labelled], there: set[int], pulled: Pulled
) -> None:
    """Pictures whose annotation was deleted or cancelled, while the task is still there."""
    for key in entries.keys() - labelled.keys():
        if entries[key].origin.task in there:
            del entries[key]
            pulled.removed += 1
        else:
            pulled.gone += 1


def _update(
    studio: LabelStudio,
    entries: dict[str, Entry],
    labelled: Mapping[str, _Labelled],
    folder: Path,
    pulled: Pulled,
) -> None:
    """The entries as the annotations are now; pictures that are new are fetched to `folder`."""
    with Progress("pulling", len(labelled), unit="pictures") as progress:
        for key, one in labelled.items():
            progress.advance()
            old = entries.get(key)
            if old is not None and old.origin == one.origin:
                pulled.unchanged += 1
                continue
            try:
                entry = _fetch(studio, one, folder) if old is None else old
                entry.boxes = _boxes(one, entry, pulled)
            except (NoPicture, RequestError) as error:
                pulled.left_out.append(f"task {one.origin.task}: {error}")
                pulled.removed += entries.pop(key, None) is not None
                continue
            entry.origin = one.origin
            entries[key] = entry
            pulled.added += old is None
            pulled.changed += old is not None
    place(entries.values())


def _fetch(studio: LabelStudio, one: _Labelled, folder: Path) -> Entry:
    """Raises NoPicture, and RequestError for what is none."""
    body = studio.picture(one.address)
    height, width, _ = decode(body, LIMITS).shape
    file = folder / f"{one.key}{SUFFIXES[sniff(body) or '']}"
    file.write_bytes(body)
    return Entry(file, "", width, height, [], one.origin)


def _boxes(one: _Labelled, entry: Entry, pulled: Pulled) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Raises NoPicture where something is marked of which nothing can be used: it is no background."""
    regions = to_boxes(one.result, entry.width, entry.height)
    if regions.unusable and not regions.boxes:
        raise NoPicture(
            f"none of its {len(regions.unusable)} regions can be used, the first since {regions.unusable[0]}"
        )
    pulled.turned += regions.turned
    pulled.unusable += [f"task {one.origin.task}: a region is left out, since {why}" for why in regions.unusable]
    return regions.boxes


def place(entries: Iterable[Entry]) -> None:
    """A split for each that has none: the one that lacks the picture's rarest class most, so that splits are alike in
    classes however few pictures each pull brings (the idea of `tools.data.split`, for pictures that keep coming)."""
    classes_of = {id(entry): {name for name, _ in entry.boxes} or {BACKGROUND} for entry in entries}
    total = Counter(name for names in classes_of.values() for name in names)
    placed: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        if entry.split:
            placed.update((entry.split, name) for name in classes_of[id(entry)])
    for entry in sorted(entries, key=lambda entry: hashlib.sha256(entry.file.name.encode()).digest()):
        if not entry.split:
            rarest = min(classes_of[id(entry)], key=lambda name: (total[name], name))
            lacking = [
                share * total[rarest] - placed[split, rarest] for split, share in zip(SPLITS, SHARES, strict=True)
            ]
            entry.split = SPLITS[lacking.index(max(lacking))]
            placed.update((entry.split, name) for name in classes_of[id(entry)])


def _write(made: Path, entries: Mapping[str, Entry], classes: Sequence[str], history: History, pulled: Pulled) -> None:
    made.mkdir()
    splits: dict[str, list[Picture]] = {}
    for key in sorted(entries):
        entry = entries[key]
        name = entry.file.name
        (made / entry.split).mkdir(exist_ok=True)
        _link(entry.file, made / entry.split / name)
        boxes = tuple(Box(classes.index(label), *xyxy) for label, xyxy in entry.boxes)
        picture = Picture(made / entry.split / name, name, entry.width, entry.height, boxes)
        splits.setdefault(entry.split, []).append(picture)
    write_annotations(made, classes, splits, {"made_by": "marina label pull"})
    pictures = {f"{entry.split}/{entry.file.name}": entry.origin for _, entry in sorted(entries.items())}
    counts = asdict(pulled) | {"left_out": len(pulled.left_out), "unusable": len(pulled.unusable)}
    done = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **counts}
    changes = {"pictures": pictures, "pulls": [*history.pulls, done]}
    write_history(made, history.model_copy(update=changes))


def _link(source: Path, target: Path) -> None:
    """The same file where the disk can do that, since pictures are never written to; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
