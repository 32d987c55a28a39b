"""CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/: what a thing is made of, with versions, checksums and licences.

Equal things give equal bytes: there is no time in it, and its serial number follows from the checksum of the thing.
"""

import json
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError

Component = dict[str, Any]


def component(
    kind: str,
    name: str,
    version: str | None = None,
    *,
    purl: str | None = None,
    sha256: str | None = None,
    license: str | None = None,
    **more: Any,
) -> Component:
    """kind: CycloneDX's type. purl: what scanners know it by. license: an SPDX expression, or any words."""
    made: Component = {"type": kind, "bom-ref": purl or f"{kind}:{name}", "name": name}
    made |= {"version": version} if version else {}
    made |= {"purl": purl} if purl else {}
    made |= {"hashes": [{"alg": "SHA-256", "content": sha256}]} if sha256 else {}
    made |= {"licenses": [_license(license)]} if license else {}
    return made | more


def pypi(name: str, version: str) -> str:
    """The purl (https://github.com/package-url/purl-spec) of a Python package."""
    return f"pkg:pypi/{quote(name.lower().replace('_', '-'), safe='')}@{quote(version, safe='')}"


def document(root: Component, components: list[Component], sha256: str) -> bytes:
    """A bill of materials. root: the thing, of that checksum, which depends on all components."""
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{sha256}')}",
        "version": 1,
        "metadata": {"component": root},
        "components": components,
        "dependencies": [{"ref": root["bom-ref"], "dependsOn": [each["bom-ref"] for each in components]}],
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def write_document(path: Path, content: bytes) -> None:
    """In place of a file that is there. Raises ToolError when it cannot be written."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise ToolError(
            f"{path} cannot be written ({error.strerror}); name a folder that is there, with room"
        ) from error


def _license(text: str) -> dict[str, Any]:
    try:
        return {"expression": canonicalize_license_expression(text)}
    except InvalidLicenseExpression:
        return {"license": {"name": text}}
