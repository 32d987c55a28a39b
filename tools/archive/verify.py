"""Checks an archive against what it says of itself."""

import hashlib
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from handlers.errors import BadArchive
from tools.archive.dryload import DryLoad, dry_load
from tools.archive.reader import MANIFEST, PROVENANCE, Archive, open_archive

# What of a zip entry a flipped byte could change without touching its content.
FORM = ("compress_type", "create_system", "create_version", "extract_version", "external_attr", "extra")


@dataclass
class Report:
    """known: what was checked and holds. unknown: what cannot be known of this archive, with the reason."""

    known: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def verify_archive(path: Path) -> Report:
    """Re-run the checks of the build: names, checksums, form, golden answers in a clean process.

    Raises BadArchive at the first that fails, naming the entry.
    """
    with open_archive(path) as archive:
        ours = archive.settings is not None
        count = len(archive.names())
    if not ours:
        return _verify_foreign(path)
    check_entries(path)
    dry = dry_load(path)
    return Report(
        [
            f"{count} entries with the size and sha256 that the provenance gives",
            "every byte between them as the builder writes it",
            _golden_line(dry),
        ]
    )


def _golden_line(dry: DryLoad) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in dry.versions.items())
    if not dry.answers:
        return f"it loads ({versions}); the recipe names no golden picture"
    found = sum(len(answer["detections"]) for answer in dry.answers)
    return f"{len(dry.answers)} golden pictures answered as they have to be, {found} detections ({versions})"


def check_entries(path: Path, checked: Collection[str] = ()) -> None:
    """Every entry of an archive of ours against its provenance. checked: those whose content was, and stayed.

    Raises BadArchive, naming the entry.
    """
    with open_archive(path) as archive:
        entries = (archive.provenance or {}).get("entries")
        if not isinstance(entries, dict):
            raise BadArchive(f"{path}: {PROVENANCE} lists no entries; build the archive again")
        for name in sorted(set(entries) ^ (set(archive.names()) - {PROVENANCE})):
            where = "is in the provenance but not in the archive" if name in entries else "is not in the provenance"
            raise BadArchive(f"{path}: entry {name!r} {where}; do not use this archive")
        check_digests(archive, {name: wanted for name, wanted in entries.items() if name not in checked})
        _check_form(archive)


def check_digests(archive: Archive, entries: Mapping[str, Mapping[str, int | str]]) -> None:
    """Content against size and sha256. Raises BadArchive, naming the entry."""
    for name, wanted in entries.items():
        digest = hashlib.sha256()
        for chunk in archive.chunks(name):
            digest.update(chunk)
        if archive.size(name) != wanted["size"] or digest.hexdigest() != wanted["sha256"]:
            raise BadArchive(f"{archive.path}: entry {name!r} is not the one that was built; do not use this archive")


def _check_form(archive: Archive) -> None:
    """Headers as the builder writes them, nothing between or behind the entries."""
    infos = archive.infos()
    model = infos[0]
    with archive.path.open("rb") as file:
        offset = 0
        for info in infos:
            header = info.FileHeader(zip64=False)
            file.seek(info.header_offset)
            same = all(getattr(info, key) == getattr(model, key) for key in FORM)
            if (
                info.header_offset != offset
                or file.read(len(header)) != header
                or not same
                or info.date_time != model.date_time
                or info.compress_type != zipfile.ZIP_STORED
                or info.extra
            ):
                raise BadArchive(f"{archive.path}: the header of entry {info.filename!r} was changed; do not use it")
            offset += len(header) + info.file_size


def _verify_foreign(path: Path) -> Report:
    """An archive of another builder: what TorchServe needs is there and undamaged; the rest is unknown."""
    with open_archive(path) as archive:
        for name in archive.names():
            for _ in archive.chunks(name):
                pass
        report = Report([f"{len(archive.names())} entries, each as its CRC-32 says, no unsafe name"])
        for key in ("handler", "serializedFile", "modelFile", "configFile", "requirementsFile"):
            file = archive.model.get(key)
            if file:
                _check_named_file(archive, key, str(file), report)
    report.unknown += [
        f"whether the entries are the ones that were built: there is no {PROVENANCE} with checksums",
        "what recipe, weights and licence it was made from, and what it must answer: nothing says so",
        "whether it loads: its code would have to be run; serve it and send a picture",
    ]
    return report


def _check_named_file(archive: Archive, key: str, file: str, report: Report) -> None:
    if file in archive.names() or f"{file}.py" in archive.names():
        report.known.append(f"{key} {file} is inside")
    elif key == "handler":
        report.unknown.append(f"handler {file} is not inside: it must be one that the server has")
    else:
        raise BadArchive(f"{archive.path}: {MANIFEST} names {key} {file!r}, but there is no such entry; rebuild it")
