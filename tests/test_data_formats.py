"""Reading labelled sets of other programs, the bad ones above all."""

import json
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from labelled_sets import TWO_BOXES, coco_set, picture, voc_set, voc_xml, yolo_set

from tools.data.formats import detect, read_source
from tools.data.formats.source import ReadOptions, cut, pictures_below
from tools.errors import ToolError


def read(path, scratch=Path("/nonexistent"), format_name="auto", **options):
    return read_source(path, scratch, format_name, ReadOptions(**options))


def splits_of(source):
    return {split: sum(p.split == split for p in source.pictures) for split in {p.split for p in source.pictures}}


def reasons(source, effect="dropped"):
    return [f"{problem.where}: {problem.reason}" for problem in source.problems if problem.effect == effect]


def labels_of(source):
    return [label for item in source.pictures for label in item.labels]


def zipped(folder, file, prefix=""):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + str(path.relative_to(folder)))
    return file


# YOLO


@pytest.mark.parametrize("split_first", [False, True])
@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "\n  0: cat\n  1: dog", "\n  - cat\n  - dog"])
def test_yolo_in_both_layouts_with_names_as_list_and_as_mapping(tmp_path, split_first, names):
    source = read(yolo_set(tmp_path, {"train": 2, "valid": 1, "test": 1}, names, split_first=split_first))
    assert (source.format, source.classes) == ("yolo", ("cat", "dog"))
    assert splits_of(source) == {"train": 2, "valid": 1, "test": 1}
    assert [label.name for label in labels_of(source)] == ["cat", "dog"] * 4
    assert not source.problems and not source.notes


@pytest.mark.parametrize("wrapped", ["", "my set/", "a/b/"])
def test_yolo_zipped_and_wrapped_in_folders(tmp_path, wrapped):
    file = zipped(yolo_set(tmp_path / "set"), tmp_path / "set.zip", wrapped)
    source = read(file, tmp_path / "scratch")
    assert splits_of(source) == {"train": 3, "valid": 1} and len(labels_of(source)) == 8
    assert source.pictures[0].name == "images/train/train0.jpg"


def label_studio_yolo(folder, classes=b"it's a cat\r\ndog"):
    picture(folder / "images/a1.jpg", 1)
    (folder / "labels").mkdir()
    (folder / "labels/a1.txt").write_bytes(b"0 0.5 0.5 0.25 0.25\r\n1 0.25 0.25 0.125 0.125")
    (folder / "notes.json").write_text('{"categories": [{"id": 0, "name": "it\'s a cat"}, {"id": 1, "name": "dog"}]}')
    (folder / "classes.txt").write_bytes(classes)
    return folder


def test_classes_txt_with_crlf_apostrophe_and_no_final_newline(tmp_path):
    source = read(label_studio_yolo(tmp_path))
    assert source.classes == ("it's a cat", "dog")
    assert [label.name for label in labels_of(source)] == ["it's a cat", "dog"]
    assert source.pictures[0].split is None and not source.problems


def test_notes_json_names_the_classes_where_there_is_no_classes_txt(tmp_path):
    label_studio_yolo(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert read(tmp_path).classes == ("it's a cat", "dog")


def test_classes_without_names_are_called_by_their_numbers(tmp_path):
    yolo_set(tmp_path, labels="10 0.5 0.5 0.2 0.2\n2 0.5 0.5 0.2 0.2\n-1 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").unlink()
    source = read(tmp_path)
    assert source.classes == ("2", "10") and "called by their numbers" in source.notes[0]


def test_blank_lines_at_the_end_of_classes_txt_are_no_classes(tmp_path):
    assert read(label_studio_yolo(tmp_path, b"cat\r\ndog\r\n\r\n")).classes == ("cat", "dog")


def test_a_blank_class_name_is_an_error_since_ids_count_lines(tmp_path):
    with pytest.raises(ToolError, match="class 1 with nothing"):
        read(label_studio_yolo(tmp_path, b"cat\n\ndog\n"))


def test_names_are_what_is_written_not_what_yaml_makes_of_it(tmp_path):
    assert read(yolo_set(tmp_path, names="[no, 1e3, 007]")).classes == ("no", "1e3", "007")


def test_two_ids_of_one_name_are_one_class(tmp_path):
    source = read(yolo_set(tmp_path, names="[cat, cat]"))
    assert source.classes == ("cat",) and "one name to several" in source.notes[0] and len(labels_of(source)) == 8


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7 0.5 0.5 0.2 0.2", "class 7 is out of range; there are 2 classes: cat, dog"),
        ("-1 0.5 0.5 0.2 0.2", "class -1 is out of range"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5 is no whole number"),
        ("cat 0.5 0.5 0.2 0.2", "not five numbers"),
        ("0 0.5 0.5 0.2", "4 columns where five belong"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 columns where five belong"),
        ("nan 0.5 0.5 0.2 0.2", "class nan is no whole number"),
    ],
)
def test_a_bad_label_line_is_dropped_alone_and_named(tmp_path, line, reason):
    yolo_set(tmp_path)
    (tmp_path / "labels/train/train1.txt").write_text(f"{TWO_BOXES}{line}\n")
    source = read(tmp_path)
    assert len(labels_of(source)) == 8
    assert len(reasons(source)) == 1 and reasons(source)[0].startswith(f"labels/train/train1.txt:3: {reason}")


def test_a_polygon_becomes_the_box_around_it(tmp_path):
    yolo_set(tmp_path, {"train": 1}, labels="1 0.1 0.2 0.5 0.2 0.3 0.8\n")
    (label,) = labels_of(read(tmp_path))
    assert label.name == "dog" and label.box == pytest.approx((0.3, 0.5, 0.4, 0.6))


def test_a_label_file_that_is_no_text_is_dropped_alone(tmp_path):
    yolo_set(tmp_path)
    (tmp_path / "labels/train/train0.txt").write_bytes(b"\xff\xfe\x00")
    source = read(tmp_path)
    assert len(source.pictures) == 3 and len(labels_of(source)) == 6 and not reasons(source, "left out")
    assert reasons(source) == ["labels/train/train0.txt: label file is no UTF-8 text; its picture is dropped too"]
    assert (source.problems[0].pictures, source.problems[0].boxes) == (1, 1)


def test_label_without_picture_and_picture_without_label(tmp_path):
    yolo_set(tmp_path)
    (tmp_path / "images/train/train0.jpg").unlink()
    (tmp_path / "labels/train/train1.txt").unlink()
    source = read(tmp_path)
    assert len(source.pictures) == 3 and len(labels_of(source)) == 4
    assert reasons(source) == ["labels/train/train0.txt: label file without a picture"]
    assert source.problems[0].boxes == 2
    assert source.notes == ["1 pictures have no label file; they are kept as background"]


def test_download_in_data_yaml_is_never_executed(tmp_path):
    yolo_set(tmp_path)
    witness = tmp_path / "witness"
    with (tmp_path / "data.yaml").open("a") as file:
        file.write(f"download: |\n  import pathlib; pathlib.Path({str(witness)!r}).touch()\n")
    assert read(tmp_path).notes == ["data.yaml has a `download:` entry, which was not executed"]
    assert not witness.exists()


def test_an_empty_split_is_said(tmp_path):
    source = read(yolo_set(tmp_path, {"train": 2, "val": 0}))
    assert source.notes == ["split valid is empty: data.yaml names no picture for val"]


@pytest.mark.parametrize(
    ("path", "train"),
    [
        ("", "images/train"),
        (".", "[images/train]"),
        ("..", "set/images/train"),
        ("", "lists/train.txt"),
        ("", "../images/train"),
        ("/content/elsewhere", "images/train"),
        ("", "images/train/"),
    ],
)
def test_paths_in_data_yaml_are_relative_to_it_and_in_a_list_to_the_list(tmp_path, path, train):
    folder = yolo_set(tmp_path / "set")
    (folder / "lists").mkdir()
    (folder / "lists/train.txt").write_text("../images/train/train0.jpg\n\n./../images/train/train2.jpg\r\n../no.jpg")
    (folder / "data.yaml").write_text(f"path: {path}\ntrain: {train}\nval: images/val\nnames: [cat, dog]\n")
    source = read(folder / "data.yaml")
    by_list = "lists" in train
    assert splits_of(source) == {"train": 2 if by_list else 3, "valid": 1}
    assert reasons(source) == (["lists/train.txt:4: names ../no.jpg, which is not there"] if by_list else [])
    assert len(reasons(source, "left out")) == by_list
    assert any("/content/elsewhere" in note for note in source.notes) == path.startswith("/content")


def test_splits_come_from_folders_where_data_yaml_names_none_that_is_there(tmp_path):
    yolo_set(tmp_path)
    (tmp_path / "data.yaml").write_text("train: /gone/train\nval: /gone/val\nnames: [cat, dog]\n")
    source = read(tmp_path)
    assert splits_of(source) == {"train": 3, "valid": 1}
    assert source.notes[-1].startswith("no folder that data.yaml names is there")


def test_data_yaml_of_a_zip_names_nothing_outside_of_it(tmp_path):
    picture(tmp_path / "private/secret.jpg")
    folder = yolo_set(tmp_path / "set")
    (folder / "data.yaml").write_text(f"train: {tmp_path}/private\nval: images/val\nnames: [cat, dog]\n")
    source = read(zipped(folder, tmp_path / "set.zip"), tmp_path / "scratch")
    assert splits_of(source) == {"valid": 1}


@pytest.mark.parametrize("content", ["names: 5\n", "names: {a: b}\n", "names: [[x]]\n", "names: []\n", "names: [a\n"])
def test_a_data_yaml_without_usable_names_is_one_clear_error(tmp_path, content):
    yolo_set(tmp_path)
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ToolError, match=r"data\.yaml"):
        read(tmp_path)


@pytest.mark.parametrize(("content", "reason"), [("", "is empty"), ("- cat\n- dog\n", r"holds \['cat', 'dog'\]")])
def test_a_data_yaml_that_is_no_mapping_is_named_with_what_belongs_there(tmp_path, content, reason):
    yolo_set(tmp_path)
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(ToolError, match=rf"data\.yaml {reason}; it must hold a mapping with `names`"):
        read(tmp_path)


@pytest.mark.parametrize("key", ["names: [*j]", "names: [cat, dog]\ntrain: *j", "names: [cat, dog]\npath: *j\nnc: *j"])
def test_what_a_message_shows_of_a_file_is_short_whatever_aliases_stand_for(tmp_path, key):
    yolo_set(tmp_path)
    nested = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    (tmp_path / "data.yaml").write_text(f"a: &a [{'x' * 50}, {'y' * 50}]\n{nested}{key}\n")
    try:
        lines = read(tmp_path).notes
    except ToolError as error:
        lines = [str(error)]
    assert lines and max(map(len, lines)) < 250 + len(str(tmp_path))


@pytest.mark.parametrize("value", ["x" * 500, ["x" * 500] * 9, {"a": ["y" * 50] * 9}, "two\nlines " * 50])
def test_a_long_value_is_cut_to_one_line_of_80_characters(value):
    assert 70 < len(cut(value)) <= 80 and cut(value).endswith("...") and "\n" not in cut(value)


# Zip files


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
def test_a_zip_that_leads_outside_is_refused_and_nothing_is_unpacked(tmp_path, name):
    file = zipped(yolo_set(tmp_path / "set"), tmp_path / "set.zip")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ToolError, match="leads outside"):
        read(file, tmp_path / "in/scratch")
    assert not list(tmp_path.rglob("evil.txt")) and not (tmp_path / "in").exists()


def test_a_zip_with_a_link_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        entry = zipfile.ZipInfo("images")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc")
    with pytest.raises(ToolError, match="link or device"):
        read(tmp_path / "set.zip", tmp_path / "scratch")


def test_a_zip_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.data.formats.zip_file.SUSPICIOUS_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.jpg", bytes(3_000_000))
    with pytest.raises(ToolError, match="not believable"):
        read(tmp_path / "set.zip", tmp_path / "scratch")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"PK" + data[:30]])
def test_a_broken_zip_is_one_clear_error(tmp_path, damage):
    file = zipped(yolo_set(tmp_path / "set"), tmp_path / "set.zip")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ToolError, match="cannot be unpacked"):
        read(file, tmp_path / "scratch")


def test_a_zip_that_is_no_set_is_named_and_not_where_it_was_unpacked(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.md").write_text("hello")
    with pytest.raises(ToolError) as error:
        read(zipped(tmp_path / "set", tmp_path / "set.zip"), tmp_path / "scratch")
    assert str(error.value).startswith(f"{tmp_path / 'set.zip'} is no data set") and "scratch" not in str(error.value)


# COCO


def test_coco_with_sparse_category_ids(tmp_path):
    categories = [{"id": 90, "name": "cat"}, {"id": 7, "name": "dog"}]
    source = read(coco_set(tmp_path, categories, [(1, 7, [4, 5, 6, 7]), (2, 90, [1, 2, 3, 4])]))
    assert source.classes == ("cat", "dog")
    first, second = labels_of(source)
    assert (first.name, first.box, first.unit) == ("dog", (4, 5, 10, 12), "pixel_xyxy") and second.name == "cat"


DUMMY = [
    {"id": 0, "name": "cells", "supercategory": "none"},
    {"id": 1, "name": "RBC", "supercategory": "cells"},
    {"id": 2, "name": "WBC", "supercategory": "cells"},
]


def test_roboflows_category_0_is_no_class_and_splits_are_its_folders(tmp_path):
    coco_set(tmp_path / "train", DUMMY, [(1, 1, [4, 5, 6, 7])])
    coco_set(tmp_path / "valid", DUMMY, [(1, 2, [4, 5, 6, 7])], count=1, seed=9)
    source = read(tmp_path)
    assert source.classes == ("RBC", "WBC") and splits_of(source) == {"train": 2, "valid": 1}
    assert source.notes == ["category 0 (cells) has no boxes and only groups the others; it is no class"]


@pytest.mark.parametrize(
    ("categories", "annotations"),
    [
        (DUMMY, [(1, 0, [4, 5, 6, 7])]),
        ([{"id": 0, "name": "cells"}, {"id": 1, "name": "RBC"}], [(1, 1, [4, 5, 6, 7])]),
    ],
)
def test_a_category_0_that_is_labelled_or_groups_nothing_is_a_class(tmp_path, categories, annotations):
    assert read(coco_set(tmp_path, categories, annotations)).classes[0] == "cells"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"id": 5, "image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2]}, "image_id 9 is no image"),
        ({"id": 5, "image_id": 1, "category_id": 9, "bbox": [1, 1, 2, 2]}, "category_id 9 is no category"),
        ({"id": 5, "image_id": 1, "category_id": 1}, "bbox None is not four numbers"),
        ({"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, "3", 4]}, "is not four numbers"),
        ({"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 10**400]}, "too large"),
        ({"id": 5, "image_id": [1], "category_id": 1, "bbox": [1, 1, 2, 2]}, "image_id [1] is no image"),
    ],
)
def test_a_bad_coco_annotation_is_dropped_alone_and_named(tmp_path, entry, reason):
    source = read(coco_set(tmp_path, [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7]), entry]))
    assert len(labels_of(source)) == 1 and "annotation 5" in reasons(source)[0] and reason in reasons(source)[0]


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/outside.jpg", "../" + 5000 * "x"])
def test_a_coco_file_name_leads_nowhere_outside(tmp_path, name):
    picture(tmp_path / "outside.jpg")
    folder = coco_set(tmp_path / "train", [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7])])
    file = folder / "_annotations.coco.json"
    file.write_text(file.read_text().replace("p1.jpg", name))
    source = read(folder)
    assert [item.name for item in source.pictures] == ["p2.jpg"]
    assert "leads outside" in reasons(source)[0] and (source.problems[0].pictures, source.problems[0].boxes) == (1, 1)
    assert reasons(source, "left out") == ["p1.jpg: not listed in the annotation file"]


def test_a_coco_picture_is_found_by_its_name_where_the_path_is_of_another_machine(tmp_path):
    folder = coco_set(tmp_path / "in", [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7])])
    file = folder / "_annotations.coco.json"
    text = file.read_text().replace("p1.jpg", "../../media/upload/1/p1.jpg").replace("p2.jpg", "gone/p2.jpg")
    file.write_text(text)
    assert [item.name for item in read(folder).pictures] == ["p1.jpg", "p2.jpg"]
    (folder / "p1.jpg").rename(tmp_path / "elsewhere.jpg")
    (folder / "p1.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert [item.name for item in read(folder).pictures] == ["p1.jpg", "p2.jpg"]


def test_two_coco_images_never_share_a_picture(tmp_path):
    folder = coco_set(tmp_path, [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7]), (2, 1, [1, 2, 3, 4])])
    file = folder / "_annotations.coco.json"
    file.write_text(file.read_text().replace("p2.jpg", "elsewhere\\\\p1.jpg"))
    source = read(folder)
    assert [item.name for item in source.pictures] == ["p1.jpg"]
    assert reasons(source) == ["_annotations.coco.json: image 2: p1.jpg is the picture of image 1 already"]


def test_coco_as_cocodataset_org_lays_it_out(tmp_path):
    for split in ("train2017", "val2017"):
        coco_set(tmp_path / split, [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7])], file="labels.json")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / split / "labels.json").rename(tmp_path / f"annotations/instances_{split}.json")
    (tmp_path / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": []}')
    assert splits_of(read(tmp_path)) == {"train": 2, "valid": 2}


@pytest.mark.parametrize("content", ['{"images": [], "annotations": [1], "categories": []}', '{"images": "annotations'])
def test_a_file_that_is_no_coco_is_one_clear_error(tmp_path, content):
    (tmp_path / "_annotations.coco.json").write_text(content)
    with pytest.raises(ToolError, match="is no COCO"):
        read(tmp_path)


def test_two_images_with_one_id_are_an_error(tmp_path):
    folder = coco_set(tmp_path, [{"id": 1, "name": "cat"}], [])
    file = folder / "_annotations.coco.json"
    file.write_text(file.read_text().replace('{"id": 2', '{"id": 1'))
    with pytest.raises(ToolError, match=r"images\[1\] has no id of its own"):
        read(folder)


@pytest.mark.parametrize("format_name", ["auto", "coco"])
@pytest.mark.parametrize("place", ["labels.json", "annotations/instances_train2017.json", "annotations/mine.json"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:40], "is no COCO object detection file: .*line 1 column"),
        (lambda text: f"[{text}]", "is no COCO object detection file: it holds list, not an object"),
        (lambda text: text.replace("categories", "kinds"), "is no COCO object detection file: `categories` is missing"),
    ],
)
def test_a_damaged_coco_file_is_named_with_what_is_wrong(tmp_path, format_name, place, damage, reason):
    coco_set(tmp_path, [{"id": 1, "name": "cat"}], [(1, 1, [4, 5, 6, 7])])
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(damage((tmp_path / "_annotations.coco.json").read_text()))
    (tmp_path / "_annotations.coco.json").unlink()
    with pytest.raises(ToolError, match=f"{place} {reason}"):
        read(tmp_path, format_name=format_name)
    with pytest.raises(ToolError, match=f"{place} {reason}"):
        read(tmp_path / place, format_name=format_name)


# Pascal VOC


def test_voc_with_lists_in_imagesets(tmp_path):
    voc_set(tmp_path, {"train": 2, "val": 1, "test": 1}, [("dog", 8, 8, 24, 24), ("cat's", 1.5, 2, 3, 4)])
    picture(tmp_path / "JPEGImages/unlisted.jpg", 99)
    source = read(tmp_path)
    assert source.classes == ("cat's", "dog") and splits_of(source) == {"train": 2, "valid": 1, "test": 1}
    assert labels_of(source)[1].box == (1.5, 2, 3, 4) and source.pictures[0].size == (64, 48)
    assert reasons(source, "left out") == ["JPEGImages/unlisted.jpg: in the list of no split"]


def test_voc_of_roboflow_has_the_xml_beside_the_picture(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / split / "a.b.jpg", len(split))
        (tmp_path / split / "a.b.xml").write_text(voc_xml(("cat", 1, 1, 9, 9), filename="a.b.jpg"))
    source = read(tmp_path)
    assert splits_of(source) == {"train": 1, "valid": 1} and len(labels_of(source)) == 2


def test_voc_classes_txt_gives_the_order(tmp_path):
    voc_set(tmp_path, {"train": 1}, [("ant", 8, 8, 24, 24), ("cat", 8, 8, 24, 24)])
    (tmp_path / "classes.txt").write_bytes(b"dog\r\ncat")
    source = read(tmp_path)
    assert source.classes == ("dog", "cat", "ant") and source.notes == ["classes.txt lacks ant; added after its own"]


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("<annotation><object>", "cannot be read"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "document type"),
        (voc_xml(("", 1, 2, 3, 4)), "no name of a class"),
        (voc_xml(("cat", 1, "x", 3, 4)), "ymin is 'x', no number"),
        ("<annotation><object><name>cat</name></object></annotation>", "xmin is '', no number"),
    ],
)
def test_a_bad_voc_label_is_dropped_alone_and_named(tmp_path, xml, reason):
    voc_set(tmp_path, {"train": 3})
    (tmp_path / "Annotations/train1.xml").write_text(xml)
    source = read(tmp_path)
    unreadable = "object 1" not in reasons(source)[0]
    assert len(source.pictures) == (2 if unreadable else 3) and len(labels_of(source)) == 2
    assert not source.notes and (source.problems[0].pictures, source.problems[0].boxes) == (unreadable, 1)
    (found,) = reasons(source)
    assert found.startswith("Annotations/train1.xml") and reason in found


def test_a_voc_label_without_picture(tmp_path):
    voc_set(tmp_path, {"train": 2})
    (tmp_path / "JPEGImages/train0.jpg").unlink()
    assert reasons(read(tmp_path)) == ["Annotations/train0.xml: label file without a picture"]


# Label Studio


def task(image, *results, **more):
    entry = {"id": 1, "data": {"image": image}, "annotations": [{"id": 5, "result": list(results)}]}
    return entry | more


def region(x, y, width, height, rotation=0, label="cat", **more):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": [label]}
    return {
        "id": "r",
        "type": "rectanglelabels",
        "value": value,
        "original_width": 64,
        "original_height": 48,
    } | more


def label_studio(folder, *tasks):
    picture(folder / "pictures/a b.jpg")
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder


@pytest.mark.parametrize(
    "image",
    [
        "/data/upload/1/0a1b2c3d-a%20b.jpg",
        "/data/local-files/?d=some/folder/a%20b.jpg",
        "s3://bucket/a b.jpg",
        "https://host/x/a%20b.jpg?token=1",
        "a b.jpg",
    ],
)
def test_label_studio_finds_the_picture_by_name(tmp_path, image):
    source = read(label_studio(tmp_path, task(image, region(25, 50, 10, 20))))
    assert (source.format, source.classes, source.pictures[0].name) == ("label-studio", ("cat",), "pictures/a b.jpg")
    assert labels_of(source)[0].box == pytest.approx((0.25, 0.5, 0.35, 0.7))


def test_label_studio_with_pictures_elsewhere(tmp_path):
    label_studio(tmp_path / "in", task("a b.jpg", region(25, 50, 10, 20)))
    shutil.move(tmp_path / "in/pictures", tmp_path / "out")
    assert len(read(tmp_path / "in/export.json", images=tmp_path / "out").pictures) == 1
    with pytest.raises(ToolError, match="--images"):
        read(tmp_path / "in/export.json")


def test_a_turned_box_of_label_studio_becomes_the_upright_box_around_it(tmp_path):
    source = read(label_studio(tmp_path, task("a b.jpg", region(50, 50, 25, 25, rotation=90))))
    # 16x12 pixels at 32, 24, turned by 90 degrees about that corner: 12 to the left, 16 down.
    assert labels_of(source)[0].box == pytest.approx((20 / 64, 24 / 48, 32 / 64, 40 / 48))
    assert "turned by 90 degrees" in reasons(source, "changed")[0]


def test_label_studio_cancelled_and_repeated_annotations(tmp_path):
    entry = task("a b.jpg") | {
        "annotations": [
            {"id": 1, "result": [region(1, 1, 5, 5)], "was_cancelled": True},
            {"id": 2, "result": [region(10, 10, 5, 5)], "ground_truth": True},
            {"id": 3, "result": [region(20, 20, 5, 5)]},
        ]
    }
    source = read(label_studio(tmp_path, entry))
    assert labels_of(source)[0].box[0] == pytest.approx(0.1) and len(labels_of(source)) == 1
    assert "1 cancelled" in source.notes[0] and source.problems[0].boxes == 1
    assert "annotation 3 gives way to 2" in reasons(source, "left out")[0]


def test_label_studio_regions_that_are_no_boxes_are_dropped_and_named(tmp_path):
    polygon = {"id": "p", "type": "polygonlabels", "value": {"points": [[1, 1]], "polygonlabels": ["cat"]}}
    choice = {"id": "c", "type": "choices", "value": {"choices": ["night"]}}
    broken = region("x", 1, 2, 3)
    source = read(label_studio(tmp_path, task("a b.jpg", polygon, choice, broken, region(1, 1, 5, 5))))
    assert len(labels_of(source)) == 1
    assert ["polygonlabels" in reasons(source)[0], "no box (could not convert" in reasons(source)[1]] == [True, True]
    assert len(reasons(source)) == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"annotations": 5},
        {"annotations": [5, {"result": "x"}]},
        {"annotations": [{"result": [1, {"value": [1]}, {"type": "rectanglelabels", "value": {"x": 1}}]}]},
        {"annotations": [{"result": [region(1, 1, 5, 5, rotation=5, original_width=0)]}]},
        {"annotations": [{"result": [region(1, 1, 10**400, 5)]}]},
        {"data": ["a b.jpg"], "file_upload": 3},
        {"data": {"image": "http://[::1/a b.jpg"}},
    ],
)
def test_a_broken_label_studio_task_spoils_no_other(tmp_path, broken):
    good = task("a b.jpg", region(1, 1, 5, 5))
    assert len(labels_of(read(label_studio(tmp_path, good, good | broken)))) in (1, 2)


def test_label_studio_picture_that_is_missing_or_in_two_folders(tmp_path):
    picture(tmp_path / "x/b.jpg")
    picture(tmp_path / "y/b.jpg")
    tasks = [task("a b.jpg"), task("gone.jpg", region(1, 1, 5, 5)), task("b.jpg", region(1, 1, 5, 5))]
    source = read(label_studio(tmp_path, *tasks))
    assert [found.split(": ", 1)[1] for found in reasons(source)] == [
        "picture 'gone.jpg' is not there",
        "picture 'b.jpg' is in 2 folders",
    ]


# What it is


@pytest.mark.parametrize("format_name", ["yolo", "coco", "voc", "open-images", "label-studio"])
def test_a_forced_format_without_a_label_file_of_its_kind_is_refused(tmp_path, format_name):
    (voc_set if format_name == "yolo" else lambda folder, _: yolo_set(folder))(tmp_path / "set", {"train": 2})
    with pytest.raises(ToolError, match=r"set (holds|has) no "):
        read(tmp_path / "set", format_name=format_name)


@pytest.mark.parametrize("options", [{"limit_per_class": 5}, {"exclusions": Path("skip.txt")}])
def test_flags_for_open_images_are_refused_for_other_sets(tmp_path, options):
    with pytest.raises(ToolError, match="set is yolo; --limit-per-class and --exclusions are for"):
        read(yolo_set(tmp_path / "set"), **options)


def test_what_is_no_set_is_one_clear_error(tmp_path):
    with pytest.raises(ToolError, match="is not there"):
        read(tmp_path / "nothing")
    with pytest.raises(ToolError, match="yolo, coco, voc, open-images, label-studio"):
        read(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ToolError, match="is no data set that is known"):
        read(tmp_path / "notes.md")


def test_prepared_sets_and_hidden_files_below_a_source_are_passed_over(tmp_path):
    for name in ("a.jpg", ".hidden.jpg", "__MACOSX/a.jpg", "made/train/b.jpg", "deep/c.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "made/dataset.json").touch()
    (tmp_path / "deep/up").symlink_to(tmp_path)
    assert [path.name for path in pictures_below(tmp_path)] == ["a.jpg", "c.PNG"]


@pytest.mark.real
def test_the_real_blood_cells_are_read_with_their_splits(shared):
    source = read(shared / "real/bccd")
    assert (source.format, source.classes) == ("voc", ("RBC", "WBC", "Platelets"))
    assert splits_of(source) == {"train": 205, "valid": 87} and not source.problems


@pytest.mark.real
def test_the_real_coco_photographs_are_read_in_both_forms(shared):
    folder = shared / "real/coco_mini"
    coco, yolo = read(folder), read(folder, format_name="yolo")
    assert detect(folder) == "coco" and len(coco.classes) == 80
    assert (len(coco.pictures), len(labels_of(coco)), sum(label.crowd for label in labels_of(coco))) == (35, 209, 1)
    assert (len(yolo.pictures), len(labels_of(yolo))) == (35, 208)
