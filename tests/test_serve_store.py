"""tools.serve.store: which archives are served, and the one line for each bad store."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from tiny_archive import write_archive

from handlers.errors import BadArchive, MarinaError
from tools.errors import ToolError
from tools.serve.store import find_archives, gradient_jpeg


def test_every_archive_newest_version_first(tmp_path: Path) -> None:
    for version in ("1.9", "1.10", "1.2"):
        write_archive(tmp_path / f"a-{version}.mar", "a", version=version)
    write_archive(tmp_path / "b.mar", "b")
    (tmp_path / "notes.txt").write_text("no archive")
    found = [str(served) for served in find_archives(tmp_path)]
    assert [served for served in found if served.startswith("a")] == ["a 1.10", "a 1.9", "a 1.2"]
    assert set(found) == {"a 1.10", "a 1.9", "a 1.2", "b 1.0"}
    assert [str(served) for served in find_archives(tmp_path, ["b"])] == ["b 1.0"]


def test_what_the_archive_says_is_used(tmp_path: Path) -> None:
    config = "maxBatchDelay: 20\nresponseTimeout: 7\nstartupTimeout: '9'\n"
    picture = gradient_jpeg()
    write_archive(tmp_path / "a.mar", "a", golden=picture, max_bytes=123, config=config)
    (served,) = find_archives(tmp_path)
    assert (served.image, served.image_name, served.is_golden) == (picture, "a.jpg", True)
    assert (served.content_type, served.max_bytes) == ("image/jpeg", 123)
    # TorchServe ignores a number that is written as text.
    assert (served.batch_delay, served.response_timeout, served.startup_timeout) == (0.02, 7, 120)


def test_foreign_archive_is_probed_with_a_generated_picture(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.mar", "a")
    (served,) = find_archives(tmp_path)
    assert not served.is_golden
    assert served.max_bytes is None
    assert Image.open(BytesIO(served.image)).format == "JPEG"


@pytest.mark.parametrize(("models", "told"), [(["c"], "no model c in .*; it holds a, b"), (["a", "d", "c"], "d, c")])
def test_unknown_model(models: list[str], told: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_archive(tmp_path / f"{name}.mar", name)
    with pytest.raises(ToolError, match=told):
        find_archives(tmp_path, models)


def test_two_archives_of_one_name_and_version(tmp_path: Path) -> None:
    write_archive(tmp_path / "x.mar", "a")
    write_archive(tmp_path / "y.mar", "a")
    with pytest.raises(ToolError, match=r"x\.mar and .*y\.mar are both a 1\.0"):
        find_archives(tmp_path)


def test_bad_stores(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="does not exist"):
        find_archives(tmp_path / "none")
    with pytest.raises(ToolError, match=r"holds no \.mar file"):
        find_archives(tmp_path)
    with pytest.raises(ToolError, match="is a file"):
        find_archives(write_archive(tmp_path / "a.mar", "a"))


def test_unreadable_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no mode keeps out.
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ToolError, match=r"cannot be read \(Permission denied\)"):
        find_archives(tmp_path)


def test_broken_archive_matters_unless_others_are_asked_for(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.mar", "a")
    (tmp_path / "b.mar").write_bytes(b"no zip")
    for models in (None, ["b"]):
        with pytest.raises(BadArchive, match=r"b\.mar"):
            find_archives(tmp_path, models)
    assert [str(served) for served in find_archives(tmp_path, ["a"])] == ["a 1.0"]


@pytest.mark.parametrize("name", ["../a", "a b", "", "a/b", "a\x1b[2J"])
def test_name_that_cannot_stand_in_a_url(name: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "a.mar", name)
    with pytest.raises(MarinaError, match="manifest"):
        find_archives(tmp_path)
