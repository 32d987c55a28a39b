"""Settings of a command: flags over a file's section over defaults."""

import argparse
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from tools.config import add_flags, settle
from tools.errors import ToolError
from tools.strict import Strict


class Settings(Strict):
    source: Path = Field(description="where to read")
    names: list[str] = Field(default_factory=list, description="100 % of the names")
    count: int = Field(3, ge=1, description="how many")
    share: float | None = Field(None, description="a part of 1")
    kind: Literal["plain", "fancy"] = Field("plain", description="which")
    shuffle: bool = Field(True, description="whether")


def settled(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings, "demo")
    return settle(parser.parse_args(flags), Settings, "demo")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "here" / "project.yaml"
    path.parent.mkdir()
    path.write_text("demo: {source: pictures, count: 5, names: [a, b]}\nother: {x: 1}\n")
    return path


def test_flags_win_over_the_file_and_that_over_defaults(file):
    settings = settled("--config", str(file), "--count", "7", "--no-shuffle")
    assert settings == Settings(source=file.parent / "pictures", names=["a", "b"], count=7, shuffle=False)


def test_a_path_is_relative_to_the_file_that_names_it_or_to_the_working_folder(file):
    assert settled("--config", str(file)).source == file.parent / "pictures"
    assert settled("--config", str(file), "--source", "elsewhere").source == Path("elsewhere")
    file.write_text("demo: {source: /absolute}\n")
    assert settled("--config", str(file)).source == Path("/absolute")


def test_every_type_has_a_flag():
    settings = settled("--source", "s", "--names", "it's", "b c", "--share", "0.5", "--kind", "fancy", "--shuffle")
    assert settings == Settings(source=Path("s"), names=["it's", "b c"], share=0.5, kind="fancy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("demo: {sorce: x}", "section demo: sorce: unknown key; did you mean 'source'?; and 1 more to mend"),
        ("demo: {source: x, count: 0}", "section demo: count: Input should be greater than or equal to 1 (it is 0)"),
        ("demo: {source: x, count: three}", "count: Input should be a valid integer (it is 'three')"),
        ("{}", "source: missing"),
        ("- 1", "is no mapping of keys to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(file, content, message):
    file.write_text(content)
    with pytest.raises(ToolError) as caught:
        settled("--config", str(file))
    assert str(caught.value).count("config ") == 1
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing_and_a_setting_that_is_missing(tmp_path):
    with pytest.raises(ToolError, match=r"none\.yaml cannot be read \(No such file"):
        settled("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ToolError, match="source: missing"):
        settled()


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        settled("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "100 % of the names" in shown and "how many (default 3)" in shown and "--no-shuffle" in shown
