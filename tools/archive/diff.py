"""How two archives differ, in the terms of the recipe."""

import json
from pathlib import Path
from typing import Any

from tools.archive.inspect import inspect_archive

ABSENT = "absent"


def diff_archives(old: Path, new: Path) -> list[str]:
    """A line a difference; none when the archives say the same. Raises BadArchive when one cannot be read."""
    a, b = inspect_archive(old), inspect_archive(new)
    lines = _compare("", _comparable(a), _comparable(b))
    return lines + _label_lines(a["labels"] or {}, b["labels"] or {}) + _entry_lines(a["entries"], b["entries"])


def _comparable(report: dict[str, Any]) -> dict[str, Any]:
    """The recipe and what became of it; of an archive that Marina did not build, its manifest and config."""
    provenance = report["provenance"]
    if provenance is None:
        return {"model": report["manifest"]["model"], "config": report["config"]}
    recipe = dict(provenance["recipe"])
    recipe["weights"] = recipe["weights"] | {"packed": provenance["weights"]}
    return recipe | {"marina": provenance["marina"], "verified_with": provenance["verified_with"]}


def _compare(where: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [
            line
            for key in keys
            for line in _compare(f"{where}.{key}" if where else str(key), a.get(key, ABSENT), b.get(key, ABSENT))
        ]
    return [] if a == b else [f"{where}: {_shown(a)} -> {_shown(b)}"]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _label_lines(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return _compare("labels", a, b)


def _entry_lines(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[str]:
    """Files of code, pictures and answers; what the recipe's terms say already is left out."""
    old, new = ({entry["name"]: entry for entry in entries} for entries in (a, b))
    lines = []
    for name in sorted(set(old) | set(new)):
        if name.startswith("MAR-INF/") or name in ("model-config.yaml", "index_to_name.json"):
            continue
        if name not in new:
            lines.append(f"entry {name}: only in the first, {old[name]['size']:,} bytes")
        elif name not in old:
            lines.append(f"entry {name}: only in the second, {new[name]['size']:,} bytes")
        elif old[name]["sha256"] != new[name]["sha256"]:
            lines.append(f"entry {name}: content differs, {old[name]['size']:,} -> {new[name]['size']:,} bytes")
    return lines
