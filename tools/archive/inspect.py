"""What is inside of an archive, told without running any of it."""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.baseline import BASELINE, Distribution, parse_baseline
from handlers.errors import BadArchive
from tools.archive.reader import Archive, open_archive
from tools.sign.state import signature_state, state_line

if TYPE_CHECKING:
    from tools.sign.keys import Keys

# Of many classes.
SHOWN = 8


def inspect_archive(path: Path, trusted: "Keys | None" = None) -> dict[str, Any]:
    """Everything there is to say about an archive, ours or another's. Raises BadArchive when it cannot be read.

    trusted: keys to check its signature with; what that says is a finding, and raises nothing.
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
            "baseline": _baseline(archive),
            "signature": signature_state(path, trusted or {}, datetime.now(UTC)),
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


def _baseline(archive: Archive) -> dict[str, Any] | None:
    if archive.settings is None or BASELINE not in archive.names():
        return None
    return asdict(parse_baseline(archive.read(BASELINE)))


def _labels(archive: Archive, name: str) -> dict[str, str] | None:
    if name not in archive.names():
        return None
    try:
        labels = json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise BadArchive(f"{archive.path}: {name} is not JSON ({error})") from error
    return labels if isinstance(labels, dict) else None


def as_table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'archive':12}{report['file']}, {report['size']:,} bytes"]
    lines += [f"{'model':12}{report['name']} {report['version']}"]
    lines += [f"{'license':12}{report['license'] or 'not stated'}"]
    lines += [f"{'handler':12}{report['manifest']['model']['handler']}"]
    lines += [f"{'signature':12}{state_line(report['signature'])}"]
    provenance = report["provenance"]
    if provenance:
        try:
            lines += _provenance_lines(provenance)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            lines += [f"{'provenance':12}not as a build of Marina writes it ({error!r})"]
    else:
        lines += [f"{'provenance':12}none: Marina did not build it"]
    labels = report["labels"]
    if labels:
        shown = ", ".join(list(map(str, labels.values()))[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")
        lines += [f"{'labels':12}{len(labels)}: {shown}"]
    if report["baseline"]:
        lines += _baseline_lines(report["baseline"])
    capture = ((report["config"] or {}).get("handler") or {}).get("capture")
    if capture:
        lines += [f"{'capture':12}{_capture_line(capture)}"]
    width = max(len(entry["name"]) for entry in report["entries"])
    lines += ["", f"{'entry':{width}}  {'bytes':>12}  sha256"]
    marks = {True: "", False: "  CHANGED since it was built", None: ""}
    for entry in report["entries"]:
        lines.append(f"{entry['name']:{width}}  {entry['size']:>12,}  {entry['sha256']}{marks[entry['as_built']]}")
    return "\n".join(lines)


def _baseline_lines(baseline: dict[str, Any]) -> list[str]:
    """What share of the evaluation set lies up to where."""
    lines = [f"{'baseline':12}{baseline['pictures']:,} pictures"]
    for name, each in baseline["quantities"].items():
        known = Distribution(**each)
        # Ordered buckets are a dozen at most.
        shown = known.buckets[:SHOWN] if known.classes else known.buckets
        up_to = "" if known.classes else "to "
        values = sum(known.counts)
        shares = [f"{up_to}{bucket} {count / values:.0%}" for bucket, count in zip(shown, known.counts, strict=False)]
        more = ", ..." if len(known.buckets) > len(shown) else ""
        lines.append(f"{'':12}{name}: {', '.join(shares)}{more}")
    return lines


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


def _capture_line(capture: dict[str, Any]) -> str:
    """Which of the pictures that it serves it keeps; a server may have another place for them, or none."""
    why = ", ".join(f"{key} {value}" for key, value in capture["keep"].items() if value)
    return f"keeps up to {capture['per_hour']} pictures an hour in {capture['to'] or 'MARINA_CAPTURE_TO'}: {why}"


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
