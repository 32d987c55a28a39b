"""What is inside of an archive, told without running any of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from handlers.errors import BadArchive
from tools.archive.reader import Archive, open_archive


def inspect_archive(path: Path) -> dict[str, Any]:
    """Everything there is to say about an archive, ours or another's. Raises BadArchive when it cannot be read.

    entries: name, size in bytes, sha256 as found, and whether that is what the provenance says (None without one).
    """
    with open_archive(path) as archive:
        recorded = (archive.provenance or {}).get("entries", {})
        entries = [_entry(archive, name, recorded) for name in archive.names()]
        labels_file = (archive.settings or {}).get("labels", "index_to_name.json")
        return {
            "file": path.name,
            "size": path.stat().st_size,
            "name": archive.name,
            "version": archive.version,
            "license": (archive.provenance or {}).get("recipe", {}).get("license"),
            "manifest": archive.manifest,
            "config": archive.config,
            "labels": _labels(archive, labels_file),
            "provenance": {key: value for key, value in (archive.provenance or {}).items() if key != "entries"} or None,
            "entries": entries,
        }


def _entry(archive: Archive, name: str, recorded: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for chunk in archive.chunks(name):
        digest.update(chunk)
    wanted = recorded.get(name)
    intact = wanted == {"size": archive.size(name), "sha256": digest.hexdigest()} if wanted else None
    return {"name": name, "size": archive.size(name), "sha256": digest.hexdigest(), "as_built": intact}


def _labels(archive: Archive, name: str) -> dict[str, str] | None:
    if name not in archive.names():
        return None
    try:
        labels = json.loads(archive.read(name))
    except ValueError as error:
        raise BadArchive(f"{archive.path}: {name} is not JSON ({error})") from error
    return labels if isinstance(labels, dict) else None


def as_table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'archive':12}{report['file']}, {report['size']:,} bytes"]
    lines += [f"{'model':12}{report['name']} {report['version']}"]
    lines += [f"{'license':12}{report['license'] or 'not stated'}"]
    lines += [f"{'handler':12}{report['manifest']['model']['handler']}"]
    provenance = report["provenance"]
    if provenance:
        lines += _provenance_lines(provenance)
    else:
        lines += [f"{'provenance':12}none: Marina did not build it"]
    labels = report["labels"]
    if labels:
        shown = ", ".join(list(labels.values())[:8]) + (", ..." if len(labels) > 8 else "")
        lines += [f"{'labels':12}{len(labels)}: {shown}"]
    width = max(len(entry["name"]) for entry in report["entries"])
    lines += ["", f"{'entry':{width}}  {'bytes':>12}  sha256"]
    marks = {True: "", False: "  CHANGED since it was built", None: ""}
    for entry in report["entries"]:
        lines.append(f"{entry['name']:{width}}  {entry['size']:>12,}  {entry['sha256']}{marks[entry['as_built']]}")
    return "\n".join(lines)


def _provenance_lines(provenance: dict[str, Any]) -> list[str]:
    recipe, weights, marina = provenance["recipe"], provenance["weights"], provenance["marina"]
    arguments = " ".join(f"{key}={value}" for key, value in recipe["model"]["args"].items())
    versions = ", ".join(f"{name} {version}" for name, version in provenance["verified_with"].items())
    parity = [f"{'parity':12}{_parity_line(provenance['parity'])}"] if "parity" in provenance else []
    return [
        f"{'definition':12}{recipe['model']['definition']} {arguments}".rstrip(),
        f"{'weights':12}{weights['file']} ({weights['kind']}, {weights['parameters']:,} parameters)",
        f"{'':12}sha256 {weights['sha256']}",
        f"{'built by':12}marina {marina['version']}, source {marina['revision'] or 'unknown'}",
        f"{'runtime':12}{' '.join(recipe['runtime'].values())}",
        f"{'verified':12}{versions}",
        *parity,
    ]


def _parity_line(parity: dict[str, Any]) -> str:
    """What the build has found beside torch in fp32."""
    if not parity["pictures"]:
        return "not compared with torch in fp32"
    line = (
        f"{parity['pictures']} pictures, {parity['detections']} detections: lowest IoU {parity['min_iou']}, largest"
        f" score difference {parity['max_score_difference']}, {parity['gained']} gained, {parity['lost']} lost"
    )
    maps = parity.get("map50_95")
    return line + (f"; mAP50-95 {maps['archive']}, of torch {maps['torch']}" if maps else "")
