"""The bill of materials of an archive, from what the archive says of itself alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tools.archive.companions import SBOM, beside
from tools.archive.reader import Archive, open_archive
from tools.archive.sources import sha256_of
from tools.cyclonedx import Component, component, document, pypi, write_document
from tools.errors import ToolError

CODE_LICENSE = "Apache-2.0"
PYTHON = "python"


def write_sbom(archive: Path) -> Path:
    """Write it beside the archive, in place of one that is there. Returns where. Raises ToolError and BadArchive."""
    path = beside(archive, SBOM)
    write_document(path, make_sbom(archive))
    return path


def make_sbom(archive: Path) -> bytes:
    """The model, its weights, the code that runs it, file by file, and what that code was verified with. Of an archive
    that Marina did not build only the files are known. Raises BadArchive when it cannot be read."""
    digest = sha256_of(archive)
    with open_archive(archive) as opened:
        provenance = opened.provenance if opened.settings is not None else None
        recipe = (provenance or {}).get("recipe", {})
        root = component(
            "machine-learning-model", opened.name, opened.version, sha256=digest, license=recipe.get("license")
        )
        if not provenance:
            return document(root, _files(opened, opened.names()), digest)
        root["modelCard"] = {
            "modelParameters": {"task": "object-detection", "modelArchitecture": _architecture(recipe)}
        }
        code = [name for name in opened.names() if name.endswith(".py")]
        others = [name for name in opened.names() if not name.endswith(".py")]
        parts = [_weights(provenance), _marina(provenance, _files(opened, code)), *_files(opened, others)]
        return document(root, parts + _runtime(provenance["verified_with"]), digest)


def check_sbom(archive: Path, sha256: str) -> None:
    """Raises ToolError when what lies beside an archive of that checksum is the bill of another one."""
    path = beside(archive, SBOM)
    if not path.exists():
        return
    try:
        of = json.loads(path.read_bytes())["metadata"]["component"]["hashes"][0]["content"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        of = None
    if of != sha256:
        raise ToolError(f"{path} is not the bill of materials of {archive.name} as it is; remove it, or build again")


def _architecture(recipe: dict[str, Any]) -> str:
    arguments = (f"{key}={value}" for key, value in recipe["model"]["args"].items())
    return " ".join([recipe["model"]["definition"], *arguments])


def _weights(provenance: dict[str, Any]) -> Component:
    """Those that the build was given; the recipe's licence is theirs."""
    weights = provenance["weights"]
    described = f"{weights['kind']}, {weights['parameters']} parameters"
    license = provenance["recipe"]["license"]
    return component("data", weights["file"], sha256=weights["sha256"], license=license, description=described)


def _marina(provenance: dict[str, Any], code: list[Component]) -> Component:
    marina = provenance["marina"]
    revision = marina["revision"]
    made = component("library", "marina", marina["version"], license=CODE_LICENSE, components=code)
    return made | ({"properties": [{"name": "marina:revision", "value": revision}]} if revision else {})


def _files(archive: Archive, names: list[str]) -> list[Component]:
    return [component("file", name, sha256=_sha256(archive, name)) for name in names]


def _sha256(archive: Archive, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in archive.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()


def _runtime(versions: dict[str, str]) -> list[Component]:
    """Python, torch, torchvision and the engine: what a server must bring."""
    return [
        component("platform", name, version)
        if name == PYTHON
        else component("library", name, version, purl=pypi(name, version), scope="required")
        for name, version in sorted(versions.items())
    ]
