"""Healthy is: every archive of the model store answers a picture with 200. Exit code 0, else 1 and one line why.

The picture is the archive's own golden image, or a small grey one for an archive that has none. A worker of Marina's
compares its golden answers when it loads, and does not come up with others: 200 says that it has.
"""

import http.client
import io
import json
import os
import sys
import zipfile
from pathlib import Path

from PIL import Image

KEY_FILE = Path("/tmp/torchserve/key_file.json")  # noqa: S108  # serve.py makes the folder, for its user alone
TIMEOUT_S = 25


def read_archive(path: Path) -> tuple[str, bytes]:
    """The path that predictions of an archive are asked for at, and a JPEG to ask with."""
    with zipfile.ZipFile(path) as archive:
        model = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
        golden = sorted(n for n in archive.namelist() if n.startswith("golden/") and n.endswith(".jpg"))
        if golden:
            picture = archive.read(golden[0])
        else:
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "JPEG")
            picture = buffer.getvalue()
    return f"/predictions/{model['modelName']}/{model.get('modelVersion', '1.0')}", picture


def predict(path: str, picture: bytes) -> None:
    """Ask this container's server. Raises OSError or HTTPException without an answer, ValueError for any but a 200."""
    headers = {"Content-Type": "image/jpeg"}
    if KEY_FILE.exists():
        headers["Authorization"] = f"Bearer {json.loads(KEY_FILE.read_text())['inference']['key']}"
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=TIMEOUT_S)
    connection.request("POST", path, picture, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(f"{answer.status} {answer.read(200).decode(errors='replace')}")


def main() -> int:
    archives = sorted(Path(os.environ["MODEL_STORE"]).glob("*.mar"))
    failures = [] if archives else ["no archive in the model store"]
    for path in archives:
        try:
            predict(*read_archive(path))
        except (OSError, ValueError, KeyError, http.client.HTTPException, zipfile.BadZipFile) as error:
            failures.append(f"{path.name}: {error}")
    print("; ".join(failures) or f"healthy: {len(archives)} models answer")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
