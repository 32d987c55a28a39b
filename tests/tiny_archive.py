"""Archives of a few lines for tests of what is around a model: built by hand, served by the real TorchServe."""

import json
import zipfile
from pathlib import Path

from tools.archive.reader import PROVENANCE, open_archive
from tools.archive.writer import write_archive as archive_writer

# Answers a JPEG with [], anything else as Marina's handler does; sleeps as long as the request's header says.
HANDLER = """
import json
import time


def handle(data, context):
    if data is None:
        return None
    answers = []
    for index, row in enumerate(data):
        headers = {key.lower(): value for key, value in context.get_all_request_header(index).items()}
        time.sleep(float(headers.get("sleep", 0)))
        context.set_response_content_type(index, "application/json")
        if bytes(row.get("body", b"")).startswith(bytes([255, 216])):
            answers.append(b"[]")
        else:
            context.set_response_status(code=400, phrase="Bad Request", idx=index)
            answers.append(json.dumps({"code": 400, "type": "InvalidImage", "message": "no picture"}).encode())
    return answers
"""

FAILS_TO_LOAD = """
class BadSettings(Exception):
    pass


def handle(data, context):
    if data is None:
        raise BadSettings("score_threshold is 2, outside of 0 to 1")
"""

DIES_AT_A_PICTURE = """
import os


def handle(data, context):
    if data is not None:
        print("about to go")
        os._exit(3)
"""

# Answers, for ever after, when a file of that name exists.
WAITS_FOR = """
import os
import time


def handle(data, context):
    while data is not None and not os.path.exists({path!r}):
        time.sleep(0.05)
    return None if data is None else [b"[]" for _ in data]
"""

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nmaxBatchDelay: 5\nresponseTimeout: 60\nstartupTimeout: 60\n"


def write_archive(
    path: Path,
    name: str,
    *,
    handler: str = HANDLER,
    version: str = "1.0",
    config: str = CONFIG,
    golden: bytes | None = None,
    max_bytes: int | None = None,
) -> Path:
    """A .mar at `path`. With a golden picture or a limit it passes for one that Marina built."""
    manifest = {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "archiverVersion": "0.12.0",
        "model": {
            "modelName": name,
            "modelVersion": version,
            "handler": "tiny_handler.py",
            "configFile": "model-config.yaml",
        },
    }
    settings: dict[str, object] = {"name": name}
    if golden is not None:
        settings["golden"] = [{"image": "golden/a.jpg", "detections": "golden/a.json"}]
    if max_bytes is not None:
        settings["limits"] = {"max_bytes": max_bytes, "max_pixels": 50_000_000}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("tiny_handler.py", handler)
        archive.writestr("model-config.yaml", f"{config}handler: {json.dumps(settings)}\n")
        if len(settings) > 1:
            archive.writestr("MAR-INF/PROVENANCE.json", json.dumps({"made": "by hand"}))
        if golden is not None:
            archive.writestr("golden/a.jpg", golden)
            archive.writestr("golden/a.json", "[]")
    return path


def as_built(path: Path, **provenance: object) -> Path:
    """The archive with the checksums that a build writes."""
    digests: dict[str, dict[str, int | str]] = {}
    built = path.with_name(f"built-{path.name}")
    with open_archive(path) as archive, archive_writer(built, digests) as writer:
        for name in archive.names():
            writer.add(name, archive.read(name))
        writer.add(PROVENANCE, json.dumps(provenance | {"entries": dict(digests)}).encode())
    return built
