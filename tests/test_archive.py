"""Recipe to .mar and back: reproducible, verified, self-contained."""

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from handlers.errors import BadArchive, BadSettings, MarinaError
from tools.archive.build import build_archive
from tools.archive.closure import modules_for
from tools.archive.diff import diff_archives
from tools.archive.inspect import as_table, inspect_archive
from tools.archive.reader import PROVENANCE, open_archive
from tools.archive.recipe import load_recipe
from tools.archive.verify import check_entries, verify_archive
from tools.cli import main


@pytest.fixture(scope="module")
def shapes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive `shapes`, built once."""
    path = tmp_path_factory.mktemp("built") / "shapes.mar"
    return build_archive(load_recipe(repository / "archives/shapes"), path).path


@pytest.fixture
def recipe_folder(repository: Path, tmp_path: Path) -> Path:
    """A copy of the recipe `shapes` to change."""
    return Path(shutil.copytree(repository / "archives/shapes", tmp_path / "recipe"))


def change(folder: Path, **values: object) -> Path:
    path = folder / "archive.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    return path


def test_same_bytes_elsewhere_and_later(shapes: Path, recipe_folder: Path, tmp_path: Path) -> None:
    for path in recipe_folder.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    again = build_archive(load_recipe(recipe_folder), tmp_path / "other" / "name.mar").path
    assert again.read_bytes() == shapes.read_bytes()


def test_source_date_epoch_dates_the_entries(
    recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    built = build_archive(load_recipe(recipe_folder), tmp_path / "a.mar").path
    with zipfile.ZipFile(built) as file:
        assert {info.date_time for info in file.infolist()} == {(2023, 11, 14, 22, 13, 20)}
    check_entries(built)


def test_a_flipped_byte_in_any_entry_is_found_and_named(shapes: Path, tmp_path: Path) -> None:
    content = shapes.read_bytes()
    with zipfile.ZipFile(shapes) as file:
        infos = file.infolist()
    assert len(infos) > 20
    for info in infos:
        name_length, extra_length = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
        begin = info.header_offset + 30 + name_length + extra_length
        places = {info.header_offset + 10, info.header_offset + 30}
        places |= {begin, begin + info.file_size // 2, begin + info.file_size - 1} if info.file_size else set()
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 0x20
            path = tmp_path / "damaged.mar"
            path.write_bytes(damaged)
            with pytest.raises(BadArchive) as caught:
                check_entries(path)
            assert info.filename in str(caught.value), (info.filename, place)


def test_verify_runs_the_golden_pictures(shapes: Path) -> None:
    report = verify_archive(shapes)
    assert not report.unknown
    assert "golden pictures answered" in report.known[-1]


def rebuilt(source: Path, target: Path, replaced: dict[str, bytes]) -> Path:
    """A copy of an archive with other contents and a provenance that agrees with them: forged, not damaged."""
    import hashlib

    from tools.archive.writer import write_archive

    with open_archive(source) as archive:
        contents = {name: archive.read(name) for name in archive.names()} | replaced
        provenance = archive.provenance | {}
    contents.pop(PROVENANCE)
    provenance["entries"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(contents.items())
    }
    with write_archive(target, {}) as writer:
        for name, data in contents.items():
            writer.add(name, data)
        writer.add(PROVENANCE, json.dumps(provenance).encode())
    return target


def test_verify_finds_other_weights_by_the_golden_answers(shapes: Path, tmp_path: Path) -> None:
    with open_archive(shapes) as archive:
        (tmp_path / "w").write_bytes(archive.read("model.safetensors"))
    weights = load_file(tmp_path / "w")
    head = max(name for name in weights if name.endswith(".m.0.weight") and weights[name].shape[-1] == 1)
    weights[head] = weights[head].flip(0)
    save_file(weights, tmp_path / "w2")
    forged = rebuilt(shapes, tmp_path / "forged.mar", {"model.safetensors": (tmp_path / "w2").read_bytes()})
    with pytest.raises(BadArchive, match="golden picture"):
        verify_archive(forged)


def test_a_module_that_the_archive_lacks_is_not_taken_from_here(shapes: Path, tmp_path: Path) -> None:
    with open_archive(shapes) as archive:
        entry = archive.read("handlers/pipeline.py")
    forged = rebuilt(
        shapes, tmp_path / "forged.mar", {"handlers/pipeline.py": b"import tools.archive.recipe\n" + entry}
    )
    with pytest.raises(BadArchive, match="No module named 'tools'"):
        verify_archive(forged)


def test_inspect_runs_nothing_and_tells_all(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_archive(shapes)
    assert report["name"] == "shapes"
    assert all(entry["as_built"] for entry in report["entries"] if entry["name"] != PROVENANCE)
    assert report["license"] == "Apache-2.0"
    assert "Apache-2.0" in as_table(report)
    assert main(["archive", "inspect", str(shapes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    code = "import sys; from tools.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "archive", "inspect", str(shapes)], check=True, capture_output=True)


def test_diff_speaks_in_terms_of_the_recipe(shapes: Path, recipe_folder: Path, tmp_path: Path) -> None:
    assert diff_archives(shapes, shapes) == []
    labels = json.loads((recipe_folder / "index_to_name.json").read_text())
    labels["0"] = "disc"
    (recipe_folder / "index_to_name.json").write_text(json.dumps(labels))
    content = yaml.safe_load((recipe_folder / "archive.yaml").read_text())
    golden = [{"image": entry["image"]} for entry in content["golden"]]
    change(recipe_folder, postprocess={"score_threshold": 0.5, "class_agnostic": True}, golden=golden)
    other = build_archive(load_recipe(recipe_folder), tmp_path / "b.mar").path
    lines = diff_archives(shapes, other)
    assert "postprocess.score_threshold: 0.4 -> 0.5" in lines
    assert any(line.startswith("labels.0: ") and line.endswith(" -> disc") for line in lines)
    assert main(["archive", "diff", str(shapes), str(other)]) == 1
    assert main(["archive", "diff", str(shapes), str(shapes)]) == 0


def test_only_the_modules_that_are_needed(shapes: Path) -> None:
    with open_archive(shapes) as archive:
        names = archive.names()
    assert "model_defs/yolov5/network.py" in names
    assert "model_defs/torchvision_detector.py" not in names
    assert "handlers/detection_handler.py" not in names
    assert "model_defs/torchvision_detector.py" in modules_for("ssdlite320_mobilenet_v3_large", "torch")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"licence": "x"}, "licence: unknown key; did you mean 'license'"),
        ({"postprocess": {"score_treshold": 0.3}}, "score_treshold: unknown key; did you mean 'score_threshold'"),
        ({"postprocess": {"score_threshold": 2}}, "score_threshold is 2"),
        ({"version": 1.0}, "version: "),
        ({"name": "Bad Name"}, "name: "),
        ({"model": {"definition": "yolov9"}}, "'yolov9'; known definitions: yolov5, "),
        ({"model": {"definition": "yolov5", "args": {"size": "q"}}}, "q"),
        ({"model": {"definition": "yolov5", "args": {"size": "s"}}}, "the weights are of YOLOv5n"),
        ({"labels": "nowhere.json"}, "nowhere.json"),
        ({"golden": [{"image": "golden/nowhere.jpg"}]}, "nowhere.jpg"),
        ({"weights": {"file": "nowhere.safetensors"}}, "--weights FILE"),
        ({"weights": {"file": "shapes.safetensors", "sha256": "0" * 64}}, "but the recipe wants 0000"),
        ({"weights": {"file": "https://host.invalid/w"}}, "give its sha256"),
        ({"serving": {"min_workers": 4, "max_workers": 2}}, "less than min_workers"),
        ({"preprocess": {"size": 630}}, "not a multiple of the model's stride 32"),
        ({"runtime": {"backend": "abacus"}}, "runtime.backend"),
    ],
)
def test_a_bad_recipe_is_one_line_and_leaves_nothing(
    recipe_folder: Path, tmp_path: Path, values: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(recipe_folder, **values)
    store = tmp_path / "store"
    assert main(["archive", "build", str(recipe_folder), "--output", str(store / "a.mar")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not store.exists() or not list(store.iterdir())


def test_labels_one_short(recipe_folder: Path, tmp_path: Path) -> None:
    labels = json.loads((recipe_folder / "index_to_name.json").read_text())
    count = len(labels)
    del labels[str(count - 1)]
    (recipe_folder / "index_to_name.json").write_text(json.dumps(labels))
    with pytest.raises(MarinaError, match=f"weights are for {count} classes, but the labels name {count - 1}"):
        build_archive(load_recipe(recipe_folder), tmp_path / "a.mar")


def test_a_wrong_golden_answer_stops_the_build(recipe_folder: Path, tmp_path: Path) -> None:
    path = next((recipe_folder / "golden").glob("*.json"))
    answer = json.loads(path.read_text())
    answer["detections"][0]["box"][0] += 60
    path.write_text(json.dumps(answer))
    with pytest.raises(BadArchive, match="gets another answer"):
        build_archive(load_recipe(recipe_folder), tmp_path / "a.mar")
    assert not list(tmp_path.glob("*.mar"))
    assert not list(tmp_path.glob(".a.mar*"))


def test_an_existing_archive_survives_a_failed_build(shapes: Path, recipe_folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copy(shapes, tmp_path / "a.mar"))
    change(recipe_folder, model={"definition": "yolov5", "args": {"size": "s"}})
    with pytest.raises(BadSettings):
        build_archive(load_recipe(recipe_folder), target)
    assert target.read_bytes() == shapes.read_bytes()


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil", "a/../../evil", "C:evil", "a\\..\\evil"])
def test_a_name_that_leads_out_is_refused(shapes: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(shapes, tmp_path / "a.mar"))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, b"x")
    with pytest.raises(BadArchive, match="nothing was extracted"):
        open_archive(path)


def test_links_doubles_and_bombs_are_refused(shapes: Path, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    cases = {"link": (link, b"/etc/passwd"), "twice": (zipfile.ZipInfo("Index_To_Name.json"), b"{}")}
    for fault, (info, data) in cases.items():
        path = Path(shutil.copy(shapes, tmp_path / f"{fault}.mar"))
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(info, data)
        with pytest.raises(BadArchive, match="do not use this archive"):
            open_archive(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip file at all", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_one_line(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mar"
    path.write_bytes(content)
    for action in ("inspect", "verify"):
        assert main(["archive", action, str(path)]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_archive_of_the_stock_archiver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It can be told apart, inspected, and verified as far as that goes."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    (tmp_path / "index_to_name.json").write_text('{"0": "thing"}')
    archiver = Path(sys.executable).with_name("torch-model-archiver")
    command = [archiver, "--model-name", "stock", "--version", "2.0", "--serialized-file", tmp_path / "w.pth"]
    command += ["--handler", "object_detector", "--extra-files", tmp_path / "index_to_name.json"]
    (tmp_path / "scratch").mkdir()
    subprocess.run([*command, "--export-path", tmp_path], check=True, env={"TMPDIR": str(tmp_path / "scratch")})
    path = tmp_path / "stock.mar"
    report = verify_archive(path)
    assert any("CRC-32" in line for line in report.known)
    assert any("handler object_detector is not inside" in line for line in report.unknown)
    assert main(["archive", "verify", str(path)]) == 0
    assert "unknown" in capsys.readouterr().out
    assert inspect_archive(path)["version"] == "2.0"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("w.pth")
    content[info.header_offset + 30 + len("w.pth") + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadArchive, match=r"w\.pth"):
        verify_archive(path)


@pytest.mark.real
def test_official_weights_build_and_are_not_run(shared: Path, repository: Path, tmp_path: Path) -> None:
    recipe = load_recipe(repository / "archives/yolov5n-coco")
    built = build_archive(recipe, tmp_path / "a.mar", shared / "real/agpl/yolov5n.pt")
    assert [found["label"] for found in built.answers[1]["detections"]] == ["cat"]
    assert inspect_archive(built.path)["license"] == "AGPL-3.0"


def test_an_archive_is_called_one(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["archive", "build", str(repository / "archives/shapes"), "--output", str(tmp_path)]) == 1
    assert f"--output {tmp_path}: TorchServe takes no file with another ending" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    output = tmp_path / "file" / "a.mar"
    assert main(["archive", "build", str(repository / "archives/shapes"), "--output", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output" in line
