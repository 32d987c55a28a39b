"""The bill of materials of an image, from what is inside: Python's and Debian's packages, Java, baked archives.

A lock would say what was asked for. What is asked here are the packages' own records in the image, by its own Python,
without a network.
"""

import json
from typing import Any
from urllib.parse import quote

from tools.container.engine import Engine
from tools.cyclonedx import Component, component, document, pypi
from tools.errors import ToolError

# Run inside of the image: what its packages say of themselves, as one line of JSON.
LOOK = """
import hashlib, json, os, platform
from importlib.metadata import distributions
from pathlib import Path

def read(path):
    return Path(path).read_text() if Path(path).exists() else ""

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def license_of(metadata):
    # Some put the whole text where its name belongs.
    words = metadata.get("License-Expression") or metadata.get("License") or ""
    return words if len(words) < 60 and words != "UNKNOWN" else ""

print(json.dumps({
    "python": platform.python_version(),
    "packages": [[each.metadata["Name"], each.version, license_of(each.metadata)] for each in distributions()],
    "system": read("/etc/os-release"),
    "debian": read("/var/lib/dpkg/status"),
    "java": read("/opt/java/release"),
    "archives": {path.name: sha256(path) for path in Path(os.environ.get("MODEL_STORE", "/models")).glob("*.mar")},
}))
"""


def sbom_of(engine: Engine, image: str) -> bytes:
    """Raises ToolError for an image that is not there, or has no Python."""
    id = engine.run("image", "inspect", "--format", "{{.Id}}", image).strip()
    looking = ("run", "--rm", "--network", "none", "--read-only", "--cap-drop=ALL", "--entrypoint", "python")
    found = engine.run(*looking, image, "-c", LOOK).strip().splitlines()
    try:
        return image_document(image, id, json.loads(found[-1]))
    except (ValueError, IndexError) as error:
        raise ToolError(f"{image} does not say what is inside: {' | '.join(found[-2:])}") from error


def image_document(image: str, id: str, found: dict[str, Any]) -> bytes:
    """id: `sha256:…`, of the image's configuration. found: what LOOK prints."""
    sha256 = id.removeprefix("sha256:")
    root = component("container", image, id)
    packages = {
        pypi(name, version): component("library", name, version, purl=pypi(name, version), license=license)
        for name, version, license in found["packages"]
    }
    archives = [component("machine-learning-model", name, sha256=sha) for name, sha in found["archives"].items()]
    parts = [component("platform", "python", found["python"]), *_java(found["java"]), *archives]
    parts += [*packages.values(), *_debian(found["debian"], _fields(found["system"]))]
    return document(root, sorted(parts, key=lambda part: str(part["bom-ref"])), sha256)


def _debian(status: str, system: dict[str, str]) -> list[Component]:
    """status: dpkg's record, stanzas of `Field: value`."""
    distribution = system.get("ID", "debian")
    found = []
    for stanza in status.split("\n\n"):
        lines = (line.partition(": ") for line in stanza.splitlines() if not line.startswith(" "))
        fields = {name: value for name, _, value in lines}
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            where = f"arch={fields['Architecture']}&distro={distribution}-{system.get('VERSION_ID', '')}"
            purl = f"pkg:deb/{distribution}/{quote(name, safe='')}@{quote(version, safe='')}?{where}"
            found.append(component("library", name, version, purl=purl))
    return found


def _java(release: str) -> list[Component]:
    """release: of a runtime that jlink has made."""
    fields = _fields(release)
    return [component("platform", "openjdk", fields["JAVA_VERSION"])] if "JAVA_VERSION" in fields else []


def _fields(text: str) -> dict[str, str]:
    """Lines of NAME="value"."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name: value.strip('"') for name, _, value in pairs}
