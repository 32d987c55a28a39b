"""Labelled pictures in any known form to a checked data set in Marina's layout.

sources -> read -> digest (is it made already?) -> decode and check, on every core -> copies merged
        -> split -> written to a hidden folder -> put in place at once
"""

import argparse
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

from pydantic import Field, field_validator

from tools.config import add_flags, settle
from tools.data.check import CheckedPicture, Job, check
from tools.data.dataset import ANNOTATIONS, INFO, SPLITS, Box, Picture, read_dataset
from tools.data.formats import read_source
from tools.data.formats.source import Problem, ReadOptions, Source, shown
from tools.data.merge import merge_copies
from tools.data.pool import in_order
from tools.data.report import EFFECTS, REPORT_JSON, REPORT_TEXT, Report
from tools.data.split import stratified
from tools.data.write import MADE, check_place, file_digest, put_in_place, workspace, write_annotations
from tools.errors import ToolError
from tools.progress import Progress
from tools.strict import Strict

LAYOUT_VERSION = 2  # of what this module writes; a new one makes sets anew
DEFAULT_SPLIT = (0.8, 0.1, 0.1)
LONGEST_NAME = 255  # bytes, of a file
PICTURES_A_WORKER = 64  # fewer are done before a process has started
# What shapes the result; the rest says where it lies and how fast it is made.
SHAPING = {"classes", "split", "seed", "max_side"}


class PrepareSettings(Strict):
    source: list[Path] = Field(min_length=1, description="folder, zip or file of a labelled set; several become one")
    output: Path = Field(description="folder of the data set to make")
    format: Literal["auto", "yolo", "coco", "voc", "open-images", "label-studio"] = Field(
        "auto", description="of the source"
    )
    images: Path | None = Field(None, description="folder of the pictures, when it is not beside the labels")
    classes: list[str] = Field([], description="keep these alone, in this order; pictures without them are background")
    split: tuple[float, float, float] | None = Field(
        None, description="shares of train, valid and test; without it, the source's splits, else 0.8 0.1 0.1"
    )
    seed: int = Field(0, description="of the split")
    max_side: int | None = Field(
        None, ge=32, description="make larger pictures smaller, to this longest side in pixels"
    )
    max_bad: float = Field(
        0.05, ge=0, le=1, description="write no set and exit 1 when a larger share of pictures or of boxes is bad"
    )
    workers: int | None = Field(None, ge=1, description="processes (default: one a core)")
    limit_per_class: int | None = Field(None, ge=1, description="Open Images: most pictures of a class")
    exclusions: Path | None = Field(None, description="Open Images: file of picture ids to leave out")
    replace: bool = Field(False, description="put the new set in the place of another one")

    @field_validator("split")
    @classmethod
    def _check_split(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if value is not None and not (min(value) >= 0 and abs(sum(value) - 1) <= 1e-6):
            raise ValueError("the three shares must be at least 0 and add up to 1")
        return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, PrepareSettings, "prepare")


def run(args: argparse.Namespace) -> int:
    settings = settle(args, PrepareSettings, "prepare")
    prepared = prepare(settings)
    if prepared.report is None:
        print(f"{settings.output}: unchanged")
        return 0
    if prepared.damage:
        print(f"{settings.output}: made again, since {prepared.damage}")
    report = prepared.report
    print(report.table())
    for note in report.notes:
        print(f"note: {note}")
    for effect in EFFECTS:
        pictures, boxes = report.count(effect)
        if pictures or boxes:
            print(f"{effect}: {pictures} pictures, {boxes} boxes")
    print(f"{settings.output}: made at {prepared.rate:.0f} pictures/s; see its {REPORT_TEXT} for what became of what")
    return 0


@dataclass(frozen=True)
class Prepared:
    """report: None when the set was there already. rate: pictures a second, all in all. damage: what was no longer
    as written in the same set, which this one replaces."""

    report: Report | None
    rate: float = 0.0
    damage: str | None = None


def prepare(settings: PrepareSettings) -> Prepared:
    """Makes the data set, or finds that it is there. Raises ToolError when it cannot, and leaves all as it was."""
    output, started = settings.output, time.monotonic()
    for source in settings.source:
        if source.resolve().is_relative_to(output.resolve()):
            raise ToolError(f"--output {output} would overwrite the source {source}; choose another folder")
    with workspace(output) as scratch:
        sources = _read_sources(settings, scratch)
        digest = _digest(settings, sources)
        made_already = not settings.replace and _made_already(output, digest, settings.max_bad)
        damage = _damage(output) if made_already else None
        if made_already and damage is None:
            return Prepared(None)
        replace_old = settings.replace or made_already
        check_place(output, INFO, replace=replace_old)
        stored = scratch / "stored"
        stored.mkdir()
        checked, problems = _check_all(settings, sources, stored)
        report = _assemble(settings, sources, checked, problems)
        if report.bad_share() > settings.max_bad:
            _refuse(settings, report, scratch)
        made = scratch / MADE
        _write(made, report, digest, settings)
        put_in_place(made, output, INFO, replace=replace_old)
        for place in _refusal_reports(output):
            place.unlink(missing_ok=True)
    return Prepared(report, report.pictures / max(time.monotonic() - started, 1e-9), damage)


def _read_sources(settings: PrepareSettings, scratch: Path) -> list[Source]:
    options = ReadOptions(settings.images, tuple(settings.classes), settings.limit_per_class, settings.exclusions)
    sources = []
    for number, path in enumerate(settings.source):
        unpacked = scratch / f"unpacked-{number}"
        unpacked.mkdir()
        source = read_source(path, unpacked, settings.format, options)
        sources.append(source if len(settings.source) == 1 else _named_after(path, number, source))
    return sources


def _named_after(path: Path, number: int, source: Source) -> Source:
    """With the name of the source before every other, so that a report tells several sources apart."""
    prefix = f"{number + 1}-{path.stem}/"
    pictures = [
        replace(
            picture,
            name=prefix + picture.name,
            labels=tuple(replace(label, where=prefix + label.where) for label in picture.labels),
        )
        for picture in source.pictures
    ]
    problems = [replace(problem, where=prefix + problem.where) for problem in source.problems]
    return replace(source, pictures=pictures, problems=problems)


def _digest(settings: PrepareSettings, sources: Sequence[Source]) -> str:
    """Of all that the result follows from: the bytes of the pictures, the labels as read, and the settings."""
    digest = hashlib.sha256()
    shaping = settings.model_dump(mode="json", include=SHAPING)
    digest.update(json.dumps([LAYOUT_VERSION, shaping], sort_keys=True).encode())
    total = sum(len(source.pictures) for source in sources)
    with Progress("comparing", total, unit="pictures") as progress:
        for source in sources:
            digest.update(repr((source.format, source.classes, source.problems, source.notes)).encode())
            for picture in source.pictures:
                digest.update(repr((picture.name, picture.split, picture.labels, picture.size)).encode())
                digest.update(_content(picture.file))
                progress.advance()
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        return repr(error.errno).encode()  # the check reports it


def _made_already(output: Path, digest: str, max_bad: float) -> bool:
    try:
        info = json.loads((output / INFO).read_text(encoding="utf-8"))
        same, share = info["digest"] == digest, float(info["bad_share"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if same and share > max_bad:
        raise ToolError(
            f"{output} is there, and {share:.2%} of its source is bad, more than --max-bad {max_bad:g} allows;"
            f" {output / REPORT_TEXT} lists it"
        )
    return same


def _damage(output: Path) -> str | None:
    """What is not as it was written: a file that is gone, annotations with another digest, pictures of another size."""
    try:
        dataset = read_dataset(output)
        info = json.loads((output / INFO).read_text(encoding="utf-8"))
        for split, written in info["splits"].items():
            if file_digest(output / split / ANNOTATIONS) != written["annotations_sha256"]:
                return f"{split}/{ANNOTATIONS} is not as it was written"
            size = sum(picture.file.stat().st_size for picture in dataset.splits[split])
            if size != info["picture_bytes"][split]:
                return f"the pictures of {split} have {size:,} bytes, not {info['picture_bytes'][split]:,} as written"
    except (ToolError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def _check_all(
    settings: PrepareSettings, sources: Sequence[Source], folder: Path
) -> tuple[list[CheckedPicture], list[Problem]]:
    pictures = [picture for source in sources for picture in source.pictures]
    jobs = [Job(picture, folder / f"{number:08d}", settings.max_side) for number, picture in enumerate(pictures)]
    workers = settings.workers or min(os.cpu_count() or 1, 1 + len(jobs) // PICTURES_A_WORKER)
    checked: list[CheckedPicture] = []
    problems: list[Problem] = []
    with Progress("checking", len(jobs), unit="pictures") as progress:
        for picture, found in in_order(check, jobs, workers):
            problems += found
            checked += [picture] if picture else []
            progress.advance()
    return checked, problems


def _assemble(
    settings: PrepareSettings, sources: Sequence[Source], checked: list[CheckedPicture], problems: list[Problem]
) -> Report:
    """Copies merged, classes chosen, splits and names given."""
    read = [problem for source in sources for problem in source.problems]
    lost = [problem for problem in read if problem.effect in ("dropped", "left out")]
    before = [picture for source in sources for picture in source.pictures]
    kept, merged = merge_copies(checked)
    classes, kept, left_out = _chosen(settings.classes, sources, kept)
    if not kept:
        first = next((f"; the first: {problem.where}: {problem.reason}" for problem in [*read, *problems]), "")
        raise ToolError(f"no picture of {shown(settings.source)} can be used{first}")
    placed, notes = _place(settings, kept)
    splits = {
        split: _name([picture for picture in kept if placed[picture.content] == split], classes) for split in SPLITS
    }
    said = [note for source in sources for note in source.notes]
    for split, pictures in splits.items():
        if not pictures and not any(note.startswith(f"split {split} is empty") for note in said):
            notes.append(f"split {split} is empty")
    return Report(
        pictures=len(before) + sum(problem.pictures for problem in lost),
        boxes=sum(len(picture.labels) for picture in before) + sum(problem.boxes for problem in lost),
        classes=classes,
        splits={split: pictures for split, pictures in splits.items() if pictures},
        problems=[*read, *problems, *merged, *left_out],
        notes=[*dict.fromkeys(said), *notes],
    )


def _chosen(
    wanted: Sequence[str], sources: Iterable[Source], pictures: list[CheckedPicture]
) -> tuple[tuple[str, ...], list[CheckedPicture], list[Problem]]:
    """The classes, the pictures with boxes of these alone, and what that left out."""
    known = tuple(dict.fromkeys(name for source in sources for name in source.classes))
    if not wanted:
        return known, pictures, []
    if missing := [name for name in wanted if name not in known]:
        raise ToolError(f"--classes {shown(missing)}: not in the source, which has {shown(known, most=20)}")
    classes = tuple(dict.fromkeys(wanted))
    others = Counter(box.name for picture in pictures for box in picture.boxes if box.name not in classes)
    kept = [replace(picture, boxes=tuple(box for box in picture.boxes if box.name in classes)) for picture in pictures]
    reason = "not among --classes"
    return classes, kept, [Problem("left out", name, reason, boxes=count) for name, count in sorted(others.items())]


def _place(settings: PrepareSettings, pictures: Sequence[CheckedPicture]) -> tuple[dict[str, str], list[str]]:
    """Split by content hash: as in the source, unless a split is asked for or the source has none."""
    placed = {picture.content: picture.split for picture in pictures if picture.split and settings.split is None}
    free = {
        picture.content: frozenset(box.name for box in picture.boxes)
        for picture in pictures
        if picture.content not in placed
    }
    if not free:
        return placed, []
    drawn, single = stratified(free, settings.split or DEFAULT_SPLIT, settings.seed)
    notes = []
    if single:
        home = next(drawn[key] for key, names in free.items() if single[0] in names)
        notes.append(f"on a single picture each, which goes to {home}: {shown(single, most=20)}")
    return placed | drawn, notes


def _name(pictures: Iterable[CheckedPicture], classes: Sequence[str]) -> list[Picture]:
    """The pictures of a split under names that differ in more than case and suffix, since labels are named after them.

    A name that is taken gets that of its folder before it; where that does not help, the content hash is the name.
    """
    taken: set[str] = set()
    named = []
    index = {name: number for number, name in enumerate(classes)}
    for picture in sorted(pictures, key=lambda picture: picture.name):
        path = PurePosixPath(picture.name.encode("utf-8", "replace").decode())
        candidates = path.name, f"{path.parent.name}_{path.name}", picture.content + path.suffix
        name = next(name for name in candidates if _key(name) not in taken and len(name.encode()) <= LONGEST_NAME)
        taken.add(_key(name))
        boxes = tuple(Box(index[box.name], *box.xyxy, box.crowd) for box in picture.boxes)
        named.append(Picture(picture.file, name, picture.width, picture.height, boxes))
    return named


def _key(name: str) -> str:
    return PurePosixPath(name).stem.casefold()


def _refusal_reports(output: Path) -> list[Path]:
    """Where the reports of a run lie that wrote no set."""
    return [output.with_name(f"{output.name}.{name}") for name in (REPORT_JSON, REPORT_TEXT)]


def _refuse(settings: PrepareSettings, report: Report, scratch: Path) -> NoReturn:
    output = settings.output
    places = _refusal_reports(output)
    report.write(scratch / REPORT_JSON, scratch / REPORT_TEXT)
    for place, name in zip(places, (REPORT_JSON, REPORT_TEXT), strict=True):
        (scratch / name).replace(place)
    pictures, boxes = report.count("dropped")
    raise ToolError(
        f"{pictures} of {report.pictures} pictures and {boxes} of {report.boxes} boxes are bad, more than --max-bad"
        f" {settings.max_bad:g} allows; no set was written, {places[1]} lists them"
    )


def _write(made: Path, report: Report, digest: str, settings: PrepareSettings) -> None:
    made.mkdir()
    for split, pictures in report.splits.items():
        (made / split).mkdir()
        for picture in pictures:
            picture.file.rename(made / split / picture.name)
    shaping = settings.model_dump(mode="json", include=SHAPING)
    info = {
        "made_by": "marina data prepare",
        "settings": shaping,
        "digest": digest,
        "bad_share": report.bad_share(),
        "picture_bytes": {
            split: sum((made / split / picture.name).stat().st_size for picture in pictures)
            for split, pictures in report.splits.items()
        },
    }
    write_annotations(made, report.classes, report.splits, info)
    report.write(made / REPORT_JSON, made / REPORT_TEXT)
