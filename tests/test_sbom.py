"""Bills of materials: valid CycloneDX 1.6, about what is really inside, and the same for the same thing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from tiny_archive import as_built, write_archive

from tools.archive.companions import SBOM, beside
from tools.archive.reader import open_archive
from tools.archive.sbom import make_sbom, write_sbom
from tools.archive.sources import sha256_of
from tools.cli import main
from tools.container.engine import Engine
from tools.container.sbom import LOOK, image_document, sbom_of
from tools.cyclonedx import component, document, pypi
from tools.errors import ToolError
from tools.store.store import Store

DIGEST = "0" * 64
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u10
Description: GNU C Library
 Status: of no meaning here

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""


def valid(content: bytes) -> dict[str, Any]:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content.decode()) is None
    found: dict[str, Any] = json.loads(content)
    return found


def named(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in found["components"]}


@pytest.fixture(scope="module")
def shapes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command."""
    path = tmp_path_factory.mktemp("built") / "shapes.mar"
    assert main(["archive", "build", str(repository / "archives" / "shapes"), "--output", str(path)]) == 0
    return path


def test_a_build_writes_what_the_archive_is_made_of(shapes: Path) -> None:
    found = valid(beside(shapes, SBOM).read_bytes())
    root = found["metadata"]["component"]
    assert (root["name"], root["version"]) == ("shapes", "1.0")
    assert root["hashes"] == [{"alg": "SHA-256", "content": sha256_of(shapes)}]
    assert root["licenses"] == [{"expression": "Apache-2.0"}]
    parts = named(found)
    with open_archive(shapes) as archive:
        provenance = archive.provenance
        code = {name for name in archive.names() if name.endswith(".py")}
        assert {each["name"] for each in parts["marina"]["components"]} == code
        assert {name for name in archive.names() if name not in code} <= parts.keys()
    weights = parts[provenance["weights"]["file"]]
    assert weights["hashes"][0]["content"] == provenance["weights"]["sha256"] and weights["licenses"]
    assert parts["model.safetensors"]["hashes"][0]["content"] == provenance["entries"]["model.safetensors"]["sha256"]
    assert parts["marina"]["version"] == provenance["marina"]["version"]
    for name, version in provenance["verified_with"].items():
        assert parts[name]["version"] == version
    assert found["dependencies"][0]["dependsOn"] == [each["bom-ref"] for each in found["components"]]


def test_the_same_bytes_elsewhere_and_later(shapes: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(shapes, tmp_path / "other.mar"))
    os.utime(other, (1, 1))
    program = (
        "import sys; from pathlib import Path; from tools.archive.sbom import write_sbom; write_sbom(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, other], check=True, env=os.environ | {"PYTHONHASHSEED": "5"})
    assert beside(other, SBOM).read_bytes() == beside(shapes, SBOM).read_bytes()


def test_of_another_builders_archive_the_files_are_known(tmp_path: Path) -> None:
    found = valid(make_sbom(write_archive(tmp_path / "tiny.mar", "tiny")))
    assert {each["type"] for each in found["components"]} == {"file"} and "tiny_handler.py" in named(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apache-2.0 or mit", {"expression": "Apache-2.0 OR MIT"}),
        ("not stated by the authors of the weights", {"license": {"name": "not stated by the authors of the weights"}}),
        ("", None),
    ],
)
def test_licences_are_spdx_where_they_can_be(text: str, said: object) -> None:
    made = component("data", "weights", license=text)
    assert made.get("licenses") == (said and [said])
    valid(document(component("file", "a"), [made], DIGEST))


def test_versions_with_a_plus_are_escaped() -> None:
    assert pypi("Typing_Extensions", "2.12.1+cpu") == "pkg:pypi/typing-extensions@2.12.1%2Bcpu"


def test_a_bill_of_another_archive_is_not_pushed_along(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    archive = as_built(write_archive(tmp_path / "tiny.mar", "tiny"))
    write_sbom(write_archive(archive, "tiny", version="2.0"))
    manifest = store.push(archive)
    assert [file.path for file in manifest.files] == [archive.name, archive.name + SBOM]
    write_archive(archive, "tiny", version="3.0")
    for content in (beside(archive, SBOM).read_bytes(), b"{}", b"[]", b"\xff"):
        beside(archive, SBOM).write_bytes(content)
        with pytest.raises(ToolError, match="is not the bill of materials of"):
            store.push(archive)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "tiny.mar", "tiny")
    beside(archive, SBOM).mkdir()
    with pytest.raises(ToolError, match="cannot be written"):
        write_sbom(archive)


# A client of a container engine whose images are this machine.
CLIENT = """#!/bin/sh
case "$1" in
  image) echo sha256:{digest} ;;
  run) shift; while [ "$1" != -c ]; do shift; done; echo a warning; exec {python} -c "$2" ;;
esac
"""


def test_an_engine_is_asked_what_is_inside(tmp_path: Path) -> None:
    client = tmp_path / "docker"
    client.write_text(CLIENT.format(digest=DIGEST, python=sys.executable))
    client.chmod(0o755)
    found = valid(sbom_of(Engine(str(client)), "marina/serve"))
    assert found["metadata"]["component"]["version"] == f"sha256:{DIGEST}" and "torch" in named(found)
    client.write_text("#!/bin/sh\necho sha256:0 no python\n")
    with pytest.raises(ToolError, match="does not say what is inside: sha256:0 no python"):
        sbom_of(Engine(str(client)), "marina/serve")


def test_an_image_is_what_its_packages_say(tmp_path: Path) -> None:
    """Of this machine, which has the packages of Python that an image has."""
    archive = write_archive(tmp_path / "tiny.mar", "tiny")
    environment = os.environ | {"MODEL_STORE": str(tmp_path)}
    look = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=environment, check=True)
    seen = json.loads(look.stdout)
    seen |= {"debian": STATUS, "system": 'ID=debian\nVERSION_ID="12"\n', "java": 'JAVA_VERSION="17.0.15"\n'}
    content = image_document("marina/serve:1", f"sha256:{DIGEST}", seen)
    found = valid(content)
    parts = named(found)
    assert found["metadata"]["component"]["version"] == f"sha256:{DIGEST}"
    assert parts["torch"]["purl"].startswith("pkg:pypi/torch@") and parts["torch"]["licenses"]
    assert parts["libc6"]["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12"
    assert "gone" not in parts
    assert parts["openjdk"]["version"] == "17.0.15" and parts["python"]["version"]
    assert parts["tiny.mar"]["hashes"][0]["content"] == sha256_of(archive)
    seen["packages"].reverse()
    assert image_document("marina/serve:1", f"sha256:{DIGEST}", seen) == content
