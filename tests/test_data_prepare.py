"""`marina data prepare`: nothing lost without a word, nothing half-written, the same on every machine."""

import json
import os
import subprocess
import sys
import time
import zipfile
from collections import Counter

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled_sets import coco_set, files_of, picture, voc_xml, yolo_set
from PIL import Image

from tools.cli import main
from tools.data.dataset import SPLITS, read_dataset
from tools.data.prepare import PrepareSettings, prepare
from tools.data.split import stratified
from tools.errors import ToolError


def made(source, output, **settings):
    """The set and its report, after `prepare`; nothing counts as too bad unless a test says so."""
    settings = {"max_bad": 1.0, **settings}
    prepare(PrepareSettings(source=source if isinstance(source, list) else [source], output=output, **settings))
    return read_dataset(output), json.loads((output / "report.json").read_text())


def pictures_of(dataset):
    return [picture for split in dataset.splits.values() for picture in split]


def boxes_of(dataset):
    return [box for picture in pictures_of(dataset) for box in picture.boxes]


def reasons(report, effect="dropped"):
    return [f"{entry['where']}: {entry['reason']}" for entry in report["problems"] if entry["effect"] == effect]


def assert_books_balance(report):
    for unit in ("pictures", "boxes"):
        gone = sum(report[effect][unit] for effect in ("dropped", "left out", "merged"))
        assert report["before"][unit] == report["after"][unit] + gone, unit


# Boxes and pictures


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 nan 0.5 0.2 0.2", "a coordinate is not a finite number (cat: nan 0.5 0.2 0.2)"),
        ("0 0.5 0.5 inf 0.2", "a coordinate is not a finite number"),
        ("0 0.5 0.5 0 0.2", "no area: 0 x 9.6 pixels"),
        ("0 0.5 0.5 0.2 -0.2", "no area: 12.8 x -9.6 pixels"),
        ("0 32 24 10 10", "pixels where fractions of the picture belong"),
        ("0 1.5 0.5 0.2 0.2", "outside of the picture of 64x48"),
        ("0 -0.1 0.5 0.2 0.2", "outside of the picture of 64x48"),
    ],
)
def test_a_bad_box_is_dropped_alone_and_reported_with_its_place(tmp_path, line, reason):
    yolo_set(tmp_path / "in")
    (tmp_path / "in/labels/train/train1.txt").write_text(f"{line}\n1 0.5 0.5 0.5 0.5\n")
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    (found,) = reasons(report)
    assert found.startswith(f"labels/train/train1.txt:1: {reason}")
    assert len(pictures_of(dataset)) == 4 and len(boxes_of(dataset)) == 7
    assert report["dropped"] == {"pictures": 0, "boxes": 1}
    assert_books_balance(report)
    assert found in (tmp_path / "out/report.txt").read_text()


def test_a_box_partly_outside_is_clipped_and_reported_but_not_for_rounding(tmp_path):
    yolo_set(tmp_path / "in", {"train": 1}, labels="0 0 0.5 0.5 0.5\n0 0.5 0.5 1.002 1.0\n")
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert [box.xyxy for box in boxes_of(dataset)] == [(0, 12, 16, 36), (0, 0, 64, 48)]
    assert reasons(report, "changed") == [
        "labels/train/train0.txt:1: clipped: 16 pixels outside of the picture of 64x48"
    ]


@pytest.mark.parametrize("body", [b"", b"\xff\xd8\xff\xe0 torn", b"hello"])
def test_a_picture_that_cannot_be_decoded_is_dropped_with_its_boxes(tmp_path, body):
    yolo_set(tmp_path / "in")
    (tmp_path / "in/images/train/train1.jpg").write_bytes(body)
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert len(pictures_of(dataset)) == 3 and report["dropped"] == {"pictures": 1, "boxes": 2}
    assert reasons(report)[0].startswith("images/train/train1.jpg: picture cannot be read (")
    assert_books_balance(report)


def test_labels_that_state_another_size_are_reported(tmp_path):
    picture(tmp_path / "in/p.jpg")
    (tmp_path / "in/p.xml").write_text(voc_xml(("cat", 1, 1, 20, 20), size=(640, 480)))
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert len(boxes_of(dataset)) == 1
    assert "the labels say 640x480, the upright picture has 64x48" in reasons(report, "changed")[0]


def test_background_is_kept(tmp_path):
    yolo_set(tmp_path / "in")
    (tmp_path / "in/labels/train/train0.txt").unlink()
    (tmp_path / "in/labels/train/train1.txt").write_text("")
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert sum(not item.boxes for item in dataset.split("train")) == 2
    assert "1 pictures have no label file; they are kept as background" in report["notes"]


def test_labels_are_of_the_upright_picture_and_bytes_are_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = picture(tmp_path / "in/images/train/p.jpg", exif=exif)
    yolo_set(tmp_path / "in", {"val": 1})
    (tmp_path / "in/labels/train").mkdir()
    (tmp_path / "in/labels/train/p.txt").write_text("0 0.5 0.25 0.5 0.25\n")
    (tmp_path / "in/data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    dataset, _ = made(tmp_path / "in", tmp_path / "out")
    (upright,) = dataset.split("train")
    assert (upright.width, upright.height) == (48, 64) and upright.boxes[0].xyxy == (12, 8, 36, 24)
    assert upright.file.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "JPEG"), ("bmp", "PNG")])
def test_pictures_are_made_smaller_with_their_boxes_and_never_larger(tmp_path, suffix, kind):
    for number, size in enumerate([(100, 60), (60, 100), (40, 30)]):
        picture(tmp_path / f"in/images/{number}.{suffix}", number, size)
        (tmp_path / "in/labels").mkdir(exist_ok=True)
        (tmp_path / f"in/labels/{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    dataset, _ = made(tmp_path / "in", tmp_path / "out", max_side=50, split=(1.0, 0.0, 0.0))
    found = dataset.split("train")
    assert [(item.width, item.height) for item in found] == [(50, 30), (30, 50), (40, 30)]
    assert [item.boxes[0].xyxy for item in found] == [
        (12.5, 7.5, 37.5, 22.5),
        (7.5, 12.5, 22.5, 37.5),
        (10, 7.5, 30, 22.5),
    ]
    for item in found[:2]:
        with Image.open(item.file) as opened:
            assert opened.format == kind and opened.size == (item.width, item.height)
            assert item.file.suffix in (f".{suffix}", ".jpg" if kind == "JPEG" else ".png")
    assert found[2].file.read_bytes() == (tmp_path / f"in/images/2.{suffix}").read_bytes()


def test_a_picture_with_the_suffix_of_another_format_is_kept_under_its_name(tmp_path):
    yolo_set(tmp_path / "in", {"train": 1})
    picture(tmp_path / "a.png", 5).replace(tmp_path / "in/images/train/train0.jpg")
    dataset, _ = made(tmp_path / "in", tmp_path / "out")
    assert pictures_of(dataset)[0].name == "train0.jpg"


@pytest.mark.parametrize(
    "line", ["9 0.5 0.5 0.2 0.2", "0 nan 0.5 0.2 0.2", "0 32 24 9 9", "0 0.5 0.5 0 0", "0 1.5 1 0.2 1"]
)
def test_a_picture_none_of_whose_boxes_can_be_used_is_no_background(tmp_path, line):
    yolo_set(tmp_path / "in")
    (tmp_path / "in/labels/train/train1.txt").write_text(f"{line}\n{line}\n")
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert "train1.jpg" not in [item.name for item in pictures_of(dataset)]
    assert reasons(report)[-1] == "images/train/train1.jpg: none of its 2 boxes can be used"
    assert report["dropped"] == {"pictures": 1, "boxes": 2}
    assert_books_balance(report)


def test_the_same_holds_for_coco_voc_and_label_studio(tmp_path):
    coco_set(tmp_path / "coco", [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7]), (2, 9, [4, 5, 6, 7])])
    for stem, corner in (("good", 1), ("bad", "x")):
        picture(tmp_path / f"voc/{stem}.jpg", len(stem))
        (tmp_path / f"voc/{stem}.xml").write_text(voc_xml(("cat", corner, 1, 9, 9)))
        picture(tmp_path / f"tasks/{stem}.jpg", len(stem))
    region = {"type": "rectanglelabels", "value": {"width": 9, "height": 9, "y": 1, "rectanglelabels": ["cat"]}}
    tasks = [
        {
            "data": {"image": f"{stem}.jpg"},
            "annotations": [{"result": [region | {"value": region["value"] | {"x": x}}]}],
        }
        for stem, x in (("good", 1), ("bad", "x"))
    ]
    (tmp_path / "tasks/export.json").write_text(json.dumps(tasks))
    for name, kept in (("coco", "p1.jpg"), ("voc", "good.jpg"), ("tasks", "good.jpg")):
        dataset, report = made(tmp_path / name, tmp_path / f"{name}-out")
        assert [item.name for item in pictures_of(dataset)] == [kept]
        assert reasons(report)[-1].endswith("none of its 1 boxes can be used")
        assert_books_balance(report)


# Copies and names


def test_two_pictures_of_one_name_in_two_folders_are_both_kept(tmp_path):
    for number, folder in enumerate(["monday", "tuesday", "Tuesday/Tuesday"]):
        picture(tmp_path / f"in/images/{folder}/IMG.jpg", number)
        (tmp_path / f"in/labels/{folder}").mkdir(parents=True)
        (tmp_path / f"in/labels/{folder}/IMG.txt").write_text(f"{number} 0.5 0.5 0.5 0.5\n")
    picture(tmp_path / "in/images/monday/img.png", 7)
    (tmp_path / "in/classes.txt").write_text("a\nb\nc")
    dataset, report = made(tmp_path / "in", tmp_path / "out", split=(1.0, 0.0, 0.0))
    names = [item.name for item in pictures_of(dataset)]
    assert len({name.rsplit(".")[0].casefold() for name in names}) == 4
    assert {"IMG.jpg", "monday_IMG.jpg", "tuesday_IMG.jpg"} < set(names)
    assert sorted(box.label for box in boxes_of(dataset)) == [0, 1, 2]
    assert_books_balance(report)


def test_copies_become_one_picture_with_the_labels_of_all(tmp_path):
    first = picture(tmp_path / "in/images/a.png", 1)
    with Image.open(first) as opened:
        opened.save(tmp_path / "in/images/b.png", compress_level=0)
    (tmp_path / "in/labels").mkdir()
    (tmp_path / "in/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "in/labels/b.txt").write_text(
        "0 0.5 0.5 0.5 0.49\n0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n0 0.2 0.2 0.1 0.1\n"
    )
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert [item.name for item in pictures_of(dataset)] == ["a.png"]
    assert [(box.label, box.x1) for box in boxes_of(dataset)] == [(0, 16), (0, 16), (0, 16), (1, 16), (0, 9.6)]
    assert report["merged"] == {"pictures": 1, "boxes": 2}
    assert reasons(report, "merged")[0].startswith("images/b.png: the same picture as images/a.png")
    assert_books_balance(report)


def test_nothing_that_is_tested_on_is_trained_on(tmp_path):
    yolo_set(tmp_path / "in", {"train": 3, "val": 2, "test": 1})
    for copy, original in (("train/x", "val/val0"), ("val/x", "test/test0"), ("train/y", "test/test0")):
        file = tmp_path / f"in/images/{copy}.jpg"
        file.write_bytes((tmp_path / f"in/images/{original}.jpg").read_bytes())
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    names = {split: [item.name for item in dataset.split(split)] for split in SPLITS}
    assert names == {
        "train": ["train0.jpg", "train1.jpg", "train2.jpg"],
        "valid": ["val0.jpg", "val1.jpg"],
        "test": ["test0.jpg"],
    }
    assert "this copy was in train, that one is in test" in "".join(reasons(report, "merged"))


def test_several_sources_become_one_set(tmp_path):
    yolo_set(tmp_path / "a", {"train": 2}, "[cat, dog]")
    yolo_set(tmp_path / "b", {"train": 2}, "[dog, eel]", first_seed=50)
    (tmp_path / "b/labels/train/train0.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.2 0.2\n9 0 0 0 0\n0 0 0 0 0")
    dataset, report = made([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [entry["where"] for entry in report["problems"]] == [
        f"2-b/labels/train/train0.txt:{line}" for line in (3, 4)
    ]
    assert sorted(item.name for item in pictures_of(dataset)) == [
        "train0.jpg",
        "train1.jpg",
        "train_train0.jpg",
        "train_train1.jpg",
    ]
    assert dataset.classes == ("cat", "dog", "eel") and len(pictures_of(dataset)) == 4
    assert Counter(box.label for box in boxes_of(dataset)) == {0: 2, 1: 4, 2: 2}
    assert_books_balance(report)


def test_chosen_classes_are_kept_in_their_order_and_the_others_left_out(tmp_path):
    dataset, report = made(yolo_set(tmp_path / "in", names="[cat, dog, eel]"), tmp_path / "out", classes=["eel", "dog"])
    assert dataset.classes == ("eel", "dog") and {box.label for box in boxes_of(dataset)} == {1}
    assert reasons(report, "left out") == ["cat: not among --classes"] and report["left out"]["boxes"] == 4
    assert_books_balance(report)
    with pytest.raises(ToolError, match="cow: not in the source, which has cat, dog, eel"):
        made(tmp_path / "in", tmp_path / "other", classes=["cow"])


# Splits


def test_the_split_is_alike_in_classes_and_a_single_picture_goes_to_train():
    pictures = {f"a{number}": frozenset({"cat"}) for number in range(50)}
    pictures |= {f"b{number}": frozenset({"dog", "cat"}) for number in range(20)}
    pictures |= {f"c{number}": frozenset() for number in range(30)}
    pictures["d"] = frozenset({"eel", "cat"})
    placed, single = stratified(pictures, (0.6, 0.2, 0.2), seed=1)
    assert placed.keys() == pictures.keys() and placed["d"] == "train" and single == ["eel"]
    for letter, counts in (("a", (30, 10, 10)), ("b", (12, 4, 4)), ("c", (18, 6, 6))):
        found = Counter(split for key, split in placed.items() if key[0] == letter)
        assert [abs(found[split] - count) <= 1 for split, count in zip(SPLITS, counts, strict=True)] == [True] * 3
    assert stratified(dict(reversed(pictures.items())), (0.6, 0.2, 0.2), seed=1)[0] == placed
    assert stratified(pictures, (0.6, 0.2, 0.2), seed=2)[0] != placed
    # What it was on the machine that this test was written on.
    assert [key for key, split in placed.items() if split == "test" and key[0] == "b"] == ["b19", "b14", "b18", "b1"]


@given(
    st.lists(st.frozensets(st.sampled_from("abcd")), max_size=40),
    st.sampled_from([(0.8, 0.1, 0.1), (1, 0, 0), (0, 0.5, 0.5), (0.34, 0.33, 0.33)]),
    st.integers(-5, 5),
)
def test_every_picture_is_in_one_split_that_takes_any(pictures, fractions, seed):
    keyed = {str(number): classes for number, classes in enumerate(pictures)}
    placed, single = stratified(keyed, fractions, seed)
    assert placed.keys() == keyed.keys()
    takes = {split for split, share in zip(SPLITS, fractions, strict=True) if share}
    assert set(placed.values()) <= takes
    if not single and len(pictures) >= len(takes):
        assert set(placed.values()) == takes
        for split, share in zip(SPLITS, fractions, strict=True):
            assert abs(list(placed.values()).count(split) - share * len(pictures)) < 2


@pytest.mark.parametrize(
    ("classes", "each", "totals"), [(5, 3, [12, 2, 1]), (1, 8, [6, 1, 1]), (1, 3, [1, 1, 1]), (1, 2, [2, 0, 0])]
)
def test_a_small_set_has_no_empty_split_while_there_are_pictures(classes, each, totals):
    pictures = {f"{name}{number}": frozenset({name}) for name in "abcde"[:classes] for number in range(each)}
    for seed in range(5):
        placed, single = stratified(pictures, (0.8, 0.1, 0.1), seed)
        assert [list(placed.values()).count(split) for split in SPLITS] == totals and not single
        assert {key[0] for key, split in placed.items() if split == "train"} == set("abcde"[:classes])


def test_the_split_does_not_depend_on_names_only_on_content(tmp_path):
    yolo_set(tmp_path / "a", {"train": 12})
    yolo_set(tmp_path / "b", {"train": 12})
    for number, path in enumerate(sorted((tmp_path / "b/images/train").iterdir(), reverse=True)):
        path.rename(path.with_name(f"{number}x.jpg"))
        label = tmp_path / f"b/labels/train/{path.stem}.txt"
        label.rename(label.with_name(f"{number}x.txt"))
    first, _ = made(tmp_path / "a", tmp_path / "out-a", split=(0.5, 0.25, 0.25))
    second, _ = made(tmp_path / "b", tmp_path / "out-b", split=(0.5, 0.25, 0.25))
    for split in SPLITS:
        contents = [sorted(item.file.read_bytes() for item in made.split(split)) for made in (first, second)]
        assert contents[0] == contents[1]


def test_an_own_split_wins_over_that_of_the_source_and_single_pictures_are_said(tmp_path):
    yolo_set(tmp_path / "in", {"train": 9, "val": 1})
    (tmp_path / "in/labels/val/val0.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    for label in (tmp_path / "in/labels/train").iterdir():
        label.write_text("0 0.5 0.5 0.5 0.5\n")
    kept, _ = made(tmp_path / "in", tmp_path / "kept")
    assert (len(kept.split("train")), len(kept.split("valid"))) == (9, 1)
    anew, report = made(tmp_path / "in", tmp_path / "anew", split=(0.6, 0.2, 0.2))
    assert [len(anew.split(split)) for split in SPLITS] == [6, 2, 2]
    assert "on a single picture each, which goes to train: dog" in report["notes"]


def test_an_empty_split_is_said_and_absent(tmp_path):
    dataset, report = made(yolo_set(tmp_path / "in", {"train": 2, "val": 0}), tmp_path / "out")
    assert report["notes"] == ["split valid is empty: data.yaml names no picture for val", "split test is empty"]
    assert dataset.splits.keys() == {"train"} and not (tmp_path / "out/valid").exists()


@pytest.mark.parametrize("split", ["0.5 0.5 0.5", "1 1 -1", "0.5 0.5", "nan 0.5 0.5"])
def test_shares_that_are_none_are_refused(tmp_path, capsys, split):
    arguments = ["--source", str(yolo_set(tmp_path / "in")), "--output", str(tmp_path / "out")]
    assert main(["data", "prepare", *arguments, "--split", *split.split()]) == 1
    assert "split" in capsys.readouterr().err and not (tmp_path / "out").exists()


# Written at once, or not at all


def tree(tmp_path):
    return {name: data for name, data in files_of(tmp_path).items() if not name.startswith("in/")}


def test_a_second_run_changes_nothing(tmp_path, capsys):
    yolo_set(tmp_path / "in")
    command = ["data", "prepare", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert "cat" in capsys.readouterr().out

    def state():
        places = sorted((tmp_path / "out").rglob("*"))
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in places}

    before = state()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: unchanged\n"
    assert state() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda out: (out / "train/train1.jpg").unlink(), "train1.jpg"),
        (lambda out: os.truncate(out / "train/train1.jpg", 100), "the pictures of train have"),
        (lambda out: (out / "valid/_annotations.coco.json").unlink(), "_annotations.coco.json"),
        (
            lambda out: (out / "valid/_annotations.coco.json").write_text(
                (out / "valid/_annotations.coco.json").read_text().replace('"category_id": 1', '"category_id": 2')
            ),
            "valid/_annotations.coco.json is not as it was written",
        ),
        (lambda out: (out / "valid/_annotations.coco.json").write_text("{"), "prepare the data set again"),
    ],
)
def test_a_damaged_set_is_made_again_and_said_why(tmp_path, capsys, damage, why):
    yolo_set(tmp_path / "in")
    command = ["data", "prepare", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    before = files_of(tmp_path / "out")
    damage(tmp_path / "out")
    capsys.readouterr()
    assert main(command) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{tmp_path / 'out'}: made again, since ") and why in first
    assert files_of(tmp_path / "out") == before


def test_replace_always_makes_the_set_again(tmp_path, capsys):
    yolo_set(tmp_path / "in")
    command = ["data", "prepare", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--replace"]
    assert main(command) == main(command) == 0
    assert "unchanged" not in capsys.readouterr().out


def test_a_set_made_otherwise_is_replaced_only_when_asked(tmp_path, capsys):
    yolo_set(tmp_path / "in")
    command = ["data", "prepare", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    before = tree(tmp_path)
    (tmp_path / "in/labels/val/val0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert main(command) == 1
    assert "give --replace" in capsys.readouterr().err and tree(tmp_path) == before
    assert main([*command, "--replace"]) == 0
    assert len(read_dataset(tmp_path / "out").split("valid")[0].boxes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_marina_did_not_make_is_never_touched(tmp_path, replace):
    yolo_set(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(ToolError, match="was not made by Marina"):
        made(tmp_path / "in", tmp_path / "out", replace=replace)
    with pytest.raises(ToolError, match="would overwrite the source"):
        made(tmp_path / "in", tmp_path / "in", replace=replace)
    with pytest.raises(ToolError, match="is no folder"):
        made(tmp_path / "in", tmp_path / "out/thesis.txt", replace=replace)
    assert tree(tmp_path) == before


def test_more_bad_than_allowed_writes_a_report_and_no_set(tmp_path, capsys):
    yolo_set(tmp_path / "in", {"train": 9, "val": 1})
    (tmp_path / "in/images/train/train0.jpg").write_bytes(b"")
    command = ["data", "prepare", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "1 of 10 pictures and 2 of 20 boxes are bad, more than --max-bad 0.05" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.report.json", "out.report.txt"]
    assert "images/train/train0.jpg: picture cannot be read" in (tmp_path / "out.report.txt").read_text()
    assert main([*command, "--max-bad", "0.1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert main(command) == 1
    assert "10.00% of its source is bad, more than --max-bad 0.05 allows" in capsys.readouterr().err


def test_a_set_without_a_usable_picture_is_an_error(tmp_path):
    yolo_set(tmp_path / "in", {"train": 1})
    (tmp_path / "in/images/train/train0.jpg").write_bytes(b"")
    with pytest.raises(ToolError, match=r"no picture of .* can be used; the first: images/train/train0\.jpg"):
        made(tmp_path / "in", tmp_path / "out")


def run_script(script, tmp_path, **environment):
    """`marina data prepare` in a process of its own, after `script` has been run in it."""
    file = tmp_path / "script.py"
    file.write_text(
        "import os, resource, sys\nimport multiprocessing as mp\nimport tools.cli, tools.data.prepare as p\n"
        "def die(*_, **__):\n"
        "    print(*[child.pid for child in mp.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        f"if __name__ == '__main__':\n    {script}\n    sys.exit(tools.cli.main(['data', 'prepare', *sys.argv[1:]]))\n"
    )
    return lambda *arguments: subprocess.run(
        [sys.executable, str(file), "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *arguments],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    "script",
    [
        "p.Progress.advance = lambda self: die() if self.what == 'checking' else None",
        "p.write_annotations = die",
        "p.Report.write = die",
        # Between the two renames that put a new set in the place of an old one.
        "p.put_in_place = lambda made, output, *_, **__: (output.rename(made.with_name('old')), die())",
    ],
)
def test_a_killed_run_leaves_the_old_set_and_the_next_one_ends_the_work(tmp_path, monkeypatch, repository, script):
    monkeypatch.chdir(repository)
    old, _ = made(yolo_set(tmp_path / "in"), tmp_path / "out")
    old_files = files_of(tmp_path / "out")
    (tmp_path / "in/labels/val/val0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    killed = run_script(script, tmp_path)("--workers", "2", "--replace")
    assert killed.returncode == -9
    workers = [int(pid) for pid in killed.stdout.split()]
    assert bool(workers) == ("checking" in script)
    deadline = time.monotonic() + 60
    while not all(map(has_ended, workers)):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.05)
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".out.marina-")]
    assert len(left) == 1
    if "rename" not in script:
        assert files_of(tmp_path / "out") == old_files
    with pytest.raises(ToolError, match="give --replace"):
        made(tmp_path / "in", tmp_path / "out")
    assert files_of(tmp_path / "out") == old_files
    new, _ = made(tmp_path / "in", tmp_path / "out", replace=True)
    assert len(boxes_of(new)) == len(boxes_of(old)) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "script.py"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_leaves_all_as_it_was(tmp_path, monkeypatch, repository, workers):
    monkeypatch.chdir(repository)
    made(yolo_set(tmp_path / "in"), tmp_path / "out")
    before = files_of(tmp_path / "out")
    picture(tmp_path / "in/images/train/large.png", 9, (400, 300), compress_level=0)
    done = run_script("resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))", tmp_path)(
        "--replace", "--workers", workers
    )
    assert done.returncode == 1
    assert (
        done.stderr == f"marina: {tmp_path / 'out'} cannot be written (the disk is full); what was there is as it was\n"
    )
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "script.py"]


def test_a_file_name_that_is_no_text_is_kept_in_a_form_that_is(tmp_path):
    yolo_set(tmp_path / "in", {"train": 2})
    for folder, suffix in (("images", "jpg"), ("labels", "txt")):
        file = tmp_path / f"in/{folder}/train/train0.{suffix}"
        file.rename(os.fsdecode(os.fsencode(file).replace(b"train0", b"caf\xe9")))
    (tmp_path / "in/labels/train/train1.txt").write_text("0 0 0 0 0\n0 0.5 0.5 0.5 0.5\n")
    dataset, report = made(tmp_path / "in", tmp_path / "out")
    assert [item.name for item in dataset.split("train")] == ["caf?.jpg", "train1.jpg"]
    assert all(item.file.is_file() for item in dataset.split("train"))
    assert len(reasons(report)) == 1 and len(boxes_of(dataset)) == 3


def test_the_result_is_the_same_for_every_hash_seed_and_number_of_workers(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(repository)
    yolo_set(tmp_path / "in", {"train": 20})
    for number, label in enumerate(sorted((tmp_path / "in/labels/train").iterdir())):
        label.write_text(f"{number % 3} 0.5 0.5 0.5 0.5\n{number % 5} 0.2 0.2 0.1 0.1\n{number % 4} nan 0 0 0\n")
    (tmp_path / "in/data.yaml").write_text("train: images/train\nnames: [a, b, c, d, e]\n")
    results = []
    for seed, workers in (("0", "1"), ("1", "2")):
        run = run_script("pass", tmp_path, PYTHONHASHSEED=seed)
        done = run("--split", "0.6", "0.2", "0.2", "--workers", workers, "--max-bad", "1")
        assert done.returncode == 0, done.stderr
        results.append(files_of(tmp_path / "out"))
        (tmp_path / "out").rename(tmp_path / f"out{seed}")
    assert results[0] == results[1]


# Settings


def test_settings_come_from_a_file_with_paths_relative_to_it(tmp_path, capsys):
    yolo_set(tmp_path / "in")
    (tmp_path / "marina.yaml").write_text("prepare:\n  source: [in]\n  output: out\n  split: [0.5, 0.25, 0.25]\n")
    assert main(["data", "prepare", "--config", str(tmp_path / "marina.yaml")]) == 0
    assert (tmp_path / "out/dataset.json").is_file()
    (tmp_path / "marina.yaml").write_text("prepare:\n  source: [in]\n  outptu: out\n")
    assert main(["data", "prepare", "--config", str(tmp_path / "marina.yaml")]) == 1
    assert "did you mean 'output'" in capsys.readouterr().err


def test_a_zip_is_prepared_and_nothing_unpacked_is_left(tmp_path):
    yolo_set(tmp_path / "in/wrapped")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "in").rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "in"))
    made(tmp_path / "set.zip", tmp_path / "out")
    first = files_of(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "set.zip"]
    made(tmp_path / "in", tmp_path / "folder")
    assert files_of(tmp_path / "folder") == first


def test_preparing_imports_no_torch(repository):
    code = "import tools.data.prepare, tools.data.export, tools.data.command, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Real sets


@pytest.mark.real
def test_the_real_blood_cells_lose_two_boxes_without_area_and_match_the_reference(shared, tmp_path):
    dataset, report = made(shared / "real/bccd", tmp_path / "out", max_bad=0.001)
    assert (len(dataset.split("train")), len(dataset.split("valid"))) == (205, 87)
    assert [entry.split(".xml")[0] for entry in reasons(report)] == [
        "Annotations/BloodImage_00338",
        "Annotations/BloodImage_00343",
    ]
    assert all("no area" in entry for entry in reasons(report))
    reference = json.loads((shared / "real/bccd/val_coco.json").read_text())
    names = {image["id"]: image["file_name"] for image in reference["images"]}
    expected = sorted((names[a["image_id"]], a["category_id"] - 1, *a["bbox"]) for a in reference["annotations"])
    found = sorted(
        (item.name, box.label, box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1)
        for item in dataset.split("valid")
        for box in item.boxes
    )
    assert found == expected


@pytest.mark.real
def test_the_real_coco_photographs_in_both_forms_have_the_same_boxes(shared, tmp_path):
    folder = shared / "real/coco_mini"
    coco, report = made(folder, tmp_path / "coco")
    yolo, _ = made(folder, tmp_path / "yolo", format="yolo")
    assert not report["problems"] and sum(box.crowd for box in boxes_of(coco)) == 1
    plain = {item.name: [box.xyxy for box in item.boxes if not box.crowd] for item in pictures_of(coco)}
    for item in pictures_of(yolo):
        assert [box.xyxy for box in item.boxes] == [pytest.approx(box, abs=0.01) for box in plain[item.name]]


def test_a_prepared_set_is_a_source_too(tmp_path):
    coco_set(tmp_path / "in", [{"id": 3, "name": "cat"}], [(1, 3, [4, 5, 6, 7])])
    first, _ = made(tmp_path / "in", tmp_path / "one", split=(0.5, 0.5, 0.0))
    second, report = made(tmp_path / "one", tmp_path / "two")
    assert not report["problems"]
    for split in ("train", "valid"):
        assert [(item.name, item.boxes) for item in first.split(split)] == [
            (item.name, item.boxes) for item in second.split(split)
        ]
