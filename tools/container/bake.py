"""An image with the archives inside, for places that mount nothing."""

import tempfile
from pathlib import Path

from tools.container.engine import Engine
from tools.serve.store import Served, find_archives

SERVING_IMAGE = "marina/serve"
DOCKERFILE = """ARG BASE
FROM ${BASE}
COPY --chmod=0444 *.mar *.mar.sig.json *.mar.cdx.json /models/
"""


def bake(engine: Engine, store: Path, tag: str, base: str = SERVING_IMAGE) -> list[Served]:
    """Build `tag` out of the serving image `base` and every archive of `store`, which come back.

    Raises ToolError and BadArchive as `tools.serve.store.find_archives` does, and ToolError when the build fails.
    """
    archives = find_archives(store)
    with tempfile.TemporaryDirectory(prefix="marina-bake-") as folder:
        dockerfile = Path(folder) / "Dockerfile"
        dockerfile.write_text(DOCKERFILE)
        engine.run("build", "--file", str(dockerfile), "--tag", tag, "--build-arg", f"BASE={base}", str(store))
    return archives
