"""Open Images as a source, and its pictures over HTTP from a server that fails on purpose."""

import csv
import io
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools.cli import main
from tools.data import fetch as fetching
from tools.data.fetch import fetch
from tools.data.formats.source import ReadOptions
from tools.data.openimages import choose, class_names, find_tables, read
from tools.errors import ToolError

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLASSES = {"/m/0k4j": "Car", "/m/0bt9lr": "Dog", "/m/01mqdt": "Traffic sign", "/m/0199g": "Bicycle", "/m/01g317": "Cat"}
IDS = {name: class_id for class_id, name in CLASSES.items()}


def image_id(number):
    return f"{number:016x}"


def row(number, name, corners=(0.1, 0.5, 0.2, 0.6), flags="0,0,0,0,0"):
    return f"{image_id(number)},xclick,{IDS[name]},1,{','.join(map(str, corners))},{flags}"


def write_tables(folder, rows, name="oidv6-train-annotations-bbox.csv", header=HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{class_id},{label}\n" for class_id, label in CLASSES.items())
    (folder / "class-descriptions-boxable.csv").write_text(text)
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def jpeg(number=0, size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, 90, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


def put_pictures(folder, numbers, split="train"):
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / "images" / split / f"{image_id(number)}.jpg").write_bytes(jpeg(number))


def chosen(folder, classes, limit=None, seed=0):
    tables = find_tables(folder)
    return choose(tables, class_names(tables, classes), limit, seed, lambda image: True)


# ------------------------------------------------------------------------------------------------- as a source


def test_a_picture_keeps_its_boxes_of_all_chosen_classes(tmp_path):
    rows = [
        row(1, "Car", (0.1, 0.5, 0.2, 0.6)),
        row(1, "Dog", (0.3, 0.4, 0.5, 0.9), "1,1,0,1,1"),
        row(2, "Dog", (0, 1, 0, 1), "0,0,1,0,0"),
        row(1, "Cat"),
        row(1, "Car", (0.7, 0.8, 0.7, 0.8)),
        row(3, "Cat"),
    ]
    folder = write_tables(tmp_path, rows)
    put_pictures(folder, [1, 2, 3])
    source = read(folder, ReadOptions(classes=("Car", "Dog")))
    assert (source.format, source.classes, source.problems, source.notes) == ("open-images", ("Car", "Dog"), [], [])
    first, second = sorted(source.pictures, key=lambda picture: picture.name)
    assert [(label.name, label.box, label.crowd) for label in first.labels] == [
        ("Car", (0.1, 0.2, 0.5, 0.6), False),
        ("Dog", (0.3, 0.5, 0.4, 0.9), False),
        ("Car", (0.7, 0.7, 0.8, 0.8), False),
    ]
    assert {label.unit for label in first.labels} == {"fraction_xyxy"}
    assert first.labels[1].where == "oidv6-train-annotations-bbox.csv:3"
    assert (first.split, first.name) == ("train", f"train/{image_id(1)}.jpg")
    assert first.file.read_bytes() == jpeg(1)
    assert [(label.name, label.crowd) for label in second.labels] == [("Dog", True)]


def test_splits_are_those_of_the_file_names(tmp_path):
    write_tables(tmp_path, [row(1, "Car")])
    write_tables(tmp_path, [row(2, "Car")], "validation-annotations-bbox.csv")
    write_tables(tmp_path / "test", [row(3, "Car")], "annotations-human-bbox.csv")
    put_pictures(tmp_path, [1, 2, 3], "mixed")
    assert {(picture.split, picture.file.stem) for picture in read(tmp_path, ReadOptions()).pictures} == {
        ("train", image_id(1)),
        ("valid", image_id(2)),
        ("test", image_id(3)),
    }
    (tmp_path / "boxes.csv").write_text(HEADER)
    with pytest.raises(ToolError, match=r"boxes\.csv names no split"):
        read(tmp_path, ReadOptions())


def test_classes_are_named_without_case_and_stay_as_asked_for(tmp_path):
    folder = write_tables(tmp_path, [row(1, "Traffic sign"), row(1, "Car")])
    put_pictures(folder, [1])
    source = read(folder, ReadOptions(classes=("traffic SIGN", "Bicycle", "car", "CAR")))
    assert source.classes == ("traffic SIGN", "Bicycle", "car")
    assert [label.name for label in source.pictures[0].labels] == ["traffic SIGN", "car"]
    assert read(folder, ReadOptions()).classes == ("Car", "Traffic sign")


def test_an_unknown_class_is_one_line_with_the_nearest(tmp_path):
    folder = write_tables(tmp_path, [row(1, "Car")])
    with pytest.raises(ToolError) as error:
        read(folder, ReadOptions(classes=("Trafic sing",)))
    assert str(error.value).endswith(
        "class 'Trafic sing' in class-descriptions-boxable.csv; the nearest are Traffic sign"
    )
    with pytest.raises(ToolError, match=r"no class 'zzzzzz' in class-descriptions-boxable\.csv$"):
        read(folder, ReadOptions(classes=("zzzzzz",)))


def test_v7_descriptions_and_columns(tmp_path):
    """They have a header, quoted names and the clicks of the annotators."""
    clicks = "XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
    folder = write_tables(tmp_path, [row(1, "Car") + ",0.1" * 8], header=f"\ufeff{HEADER},{clicks}")
    (folder / "class-descriptions-boxable.csv").unlink()
    (folder / "oidv7-class-descriptions-boxable.csv").write_text('LabelName,DisplayName\n/m/0k4j,"Car, or van"\n')
    put_pictures(folder, [1])
    assert read(folder, ReadOptions(classes=("car, or van",))).pictures[0].labels[0].box == (0.1, 0.2, 0.5, 0.6)
    with pytest.raises(ToolError, match="no class 'DisplayName'"):
        read(folder, ReadOptions(classes=("DisplayName",)))


pictures_of_classes = st.lists(st.sets(st.sampled_from(["Car", "Dog", "Cat"]), min_size=1), min_size=1, max_size=30)


@given(pictures_of_classes, st.integers(1, 8))
def test_every_class_gets_its_limit_while_there_are_pictures(tmp_path_factory, shown, limit):
    folder = tmp_path_factory.mktemp("oi")
    rows = [row(number, name) for number, names in enumerate(shown) for name in sorted(names)]
    write_tables(folder, rows + rows)  # a picture with two boxes of a class counts once
    wanted = ["Car", "Dog", "Cat"]
    available = Counter(name for names in shown for name in names)
    wanted = [name for name in wanted if available[name]]
    images = chosen(folder, wanted, limit)["train"]
    got = Counter(name for image in images for name in shown[int(image, 16)])
    for name in wanted:
        assert got[name] >= min(limit, available[name])
    assert len(images) <= limit * len(wanted)


def test_the_choice_follows_from_the_seed_alone_and_grows_with_the_limit(tmp_path):
    rows = [row(number, "Car") for number in range(60)]
    forwards = chosen(write_tables(tmp_path / "a", rows), ["Car"], 10)
    backwards = chosen(write_tables(tmp_path / "b", rows[::-1]), ["Car"], 10)
    other = chosen(tmp_path / "a", ["Car"], 10, seed=1)
    more = chosen(tmp_path / "a", ["Car"], 20)
    assert forwards == backwards != other
    assert forwards["train"] < more["train"]
    assert forwards["train"] != {image_id(number) for number in range(10)}
    assert len(chosen(tmp_path / "a", ["Car"])["train"]) == 60


def test_a_limit_counts_in_each_split(tmp_path):
    write_tables(tmp_path, [row(number, "Car") for number in range(9)])
    write_tables(tmp_path, [row(number, "Car") for number in range(20, 29)], "test-annotations-bbox.csv")
    assert {split: len(images) for split, images in chosen(tmp_path, ["Car"], 3).items()} == {"train": 3, "test": 3}


def test_excluded_and_missing_pictures_are_counted(tmp_path):
    folder = write_tables(tmp_path, [row(number, "Car") for number in (1, 1, 2, 3, 4, 4, 4)])
    put_pictures(folder, [1, 2, 3])
    (tmp_path / "skip.txt").write_text(f"{image_id(1)}\n\n  {image_id(9)} \n")
    source = read(folder, ReadOptions(exclusions=tmp_path / "skip.txt"))
    assert sorted(picture.file.stem for picture in source.pictures) == [image_id(2), image_id(3)]
    assert [(p.effect, p.where, p.pictures, p.boxes) for p in source.problems] == [("left out", image_id(1), 1, 2)]
    assert source.notes == [f"3 boxes of these classes are on pictures that do not lie in {folder / 'images'}"]
    (tmp_path / "skip.txt").write_text(f"{image_id(1)}\ntrain/1.jpg\n")
    with pytest.raises(ToolError, match=r"skip\.txt, line 2: 'train/1\.jpg' is no image id"):
        read(folder, ReadOptions(exclusions=tmp_path / "skip.txt"))
    with pytest.raises(ToolError, match=r"none of the pictures with these classes lie in .*marina data fetch"):
        read(folder, ReadOptions(classes=("Dog",)))


def test_a_limit_is_filled_from_the_pictures_that_are_there(tmp_path):
    folder = write_tables(tmp_path, [row(number, "Car") for number in range(50)])
    put_pictures(folder, range(40, 50))
    assert len(read(folder, ReadOptions(limit_per_class=10)).pictures) == 10


def test_what_a_limit_leaves_out_is_counted_a_class(tmp_path):
    rows = [row(number, "Car") for number in range(5)] + [row(number, "Dog") for number in (0, 1, 2, 3, 4, 4)]
    folder = write_tables(tmp_path, rows)
    put_pictures(folder, range(5))
    source = read(folder, ReadOptions(classes=("Car", "Dog"), limit_per_class=2))
    assert {problem.where for problem in source.problems} == {"Car", "Dog"}
    assert {(problem.effect, problem.reason) for problem in source.problems} == {
        ("left out", "beyond --limit-per-class 2")
    }
    kept = sum(len(picture.labels) for picture in source.pictures)
    assert sum(problem.pictures for problem in source.problems) == 5 - len(source.pictures) == 3
    assert sum(problem.boxes for problem in source.problems) == len(rows) - kept


def test_lines_that_cannot_be_used_are_problems(tmp_path):
    lines = [
        row(1, "Car"),
        row(1, "Car", ("x", 0.5, 0.2, 0.6)),
        f"../../../../evil,xclick,{IDS['Car']},1,0,1,0,1,0,0,0,0,0",
        f"{image_id(1)},xclick,{IDS['Car']},1,0.1",
        "",
    ]
    folder = write_tables(tmp_path, lines)
    put_pictures(folder, [1])
    source = read(folder, ReadOptions(classes=("Car",)))
    assert len(source.pictures[0].labels) == 1 and source.pictures[0].unreadable == 1
    where = "oidv6-train-annotations-bbox.csv"
    assert [(problem.where, problem.boxes) for problem in source.problems] == [(f"{where}:{n}", 1) for n in (3, 4, 5)]
    assert "'../../../../evil' is no image id" in source.problems[1].reason
    assert "could not convert string to float: 'x'" in source.problems[0].reason


def test_missing_tables_are_named(tmp_path):
    with pytest.raises(ToolError, match="no CSV file of Open Images boxes"):
        read(tmp_path, ReadOptions())
    write_tables(tmp_path, [row(1, "Car")])
    (tmp_path / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(ToolError, match="names the classes"):
        read(tmp_path, ReadOptions())


def test_real_photographs(shared, tmp_path):
    """Their file names have something before the id."""
    photos = sorted((shared / "real" / "photos").glob("oi_*.jpg"))[:5]
    ids = [photo.stem.removeprefix("oi_") for photo in photos]
    folder = write_tables(tmp_path, [f"{image},xclick,{IDS['Car']},1,0.1,0.9,0.1,0.9,0,0,0,0,0" for image in ids])
    source = read(folder, ReadOptions(images=shared / "real" / "photos"))
    assert {picture.file for picture in source.pictures} == set(photos)


# ------------------------------------------------------------------------------------------------------- fetch


class Server(ThreadingHTTPServer):
    """Serves `files` by path; `faults` of a path come first, one a request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.faults, self.asked = {}, {}, Counter()
        self.busy, self.busiest, self.lock = 0, 0, threading.Lock()
        self.over, self.crowd = threading.Event(), threading.Barrier(3)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault, *server.faults[self.path] = server.faults.get(self.path) or [None]
        if fault == "silent":
            server.over.wait(60)
        if fault == "crowded":
            server.crowd.wait(60)
        with server.lock:  # before the answer, upon which the next one may be asked for
            server.busy -= 1
        self.answer(fault)

    def answer(self, fault):
        body = self.server.files.get(self.path)
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
        elif isinstance(fault, int) or body is None:
            self.send_error(fault if isinstance(fault, int) else 404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "truncated" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path, server):
    """Tables of six pictures with a car, all of which the server has."""
    for number in range(1, 7):
        server.files[f"/train/{image_id(number)}.jpg"] = jpeg(number)
    return write_tables(tmp_path / "oi", [row(number, "Car") for number in range(1, 7)])


def run_fetch(server, folder, *flags):
    return main(["data", "fetch", str(folder), "--classes", "car", "--url", server.url + "/{split}/{id}.jpg", *flags])


def path_of(number, split="train"):
    return f"/{split}/{image_id(number)}.jpg"


def there(folder):
    return {path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*") if path.is_file()}


def sources(folder):
    with (folder / "SOURCES.csv").open(newline="") as file:
        return {line["id"]: line for line in csv.DictReader(file)}


def test_fetched_pictures_can_be_read(server, folder, capsys):
    write_tables(folder, [row(7, "Car")], "validation-annotations-bbox.csv")
    server.files[path_of(7, "validation")] = jpeg(7)
    assert run_fetch(server, folder) == 0
    assert there(folder) == {f"train/{image_id(n)}.jpg" for n in range(1, 7)} | {f"validation/{image_id(7)}.jpg"}
    assert "7 of 7 pictures are there" in capsys.readouterr().out
    assert (folder / "images" / "train" / f"{image_id(3)}.jpg").read_bytes() == jpeg(3)
    source = read(folder, ReadOptions(classes=("car",)))
    assert Counter(picture.split for picture in source.pictures) == {"train": 6, "valid": 1}
    assert source.notes == []


def test_what_is_there_whole_is_not_fetched_again(server, folder):
    put_pictures(folder, [1, 2])
    cut = folder / "images" / "train" / f"{image_id(2)}.jpg"
    cut.write_bytes(jpeg(2)[:-200])
    assert run_fetch(server, folder) == 0
    assert server.asked == {path_of(number): 1 for number in range(2, 7)}
    assert cut.read_bytes() == jpeg(2)
    assert run_fetch(server, folder) == 0
    assert sum(server.asked.values()) == 5


@pytest.mark.parametrize(
    "faults", [[503, 503], [429], ["truncated", 500], ["redirect"], [502, 503, "truncated", 504]], ids=str
)
def test_passing_faults_are_mended_by_another_attempt(server, folder, faults):
    server.faults[path_of(2)] = list(faults)
    assert run_fetch(server, folder) == 0
    assert server.asked[path_of(2)] == len(faults) + 1
    assert len(there(folder)) == 6
    assert not (folder / "FAILURES.csv").exists()


def test_a_silent_server_is_asked_for_again(server, folder, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.4)
    server.faults[path_of(2)] = ["silent"]
    assert run_fetch(server, folder) == 0
    assert server.asked[path_of(2)] >= 2


def test_lasting_faults_are_listed_and_the_rest_is_fetched(server, folder, capsys):
    del server.files[path_of(1)]
    server.faults[path_of(2)] = [503] * 99
    server.faults[path_of(3)] = ["truncated"] * 99
    server.files[path_of(4)] = b"<html>no such thing</html>"
    server.files[path_of(5)] = jpeg(5)[:-200]
    assert run_fetch(server, folder) == 1
    printed = capsys.readouterr()
    assert "1 of 6 pictures are there" in printed.out
    with (folder / "FAILURES.csv").open(newline="") as file:
        reasons = {int(line["id"], 16): line["reason"] for line in csv.DictReader(file)}
    assert reasons[1] == "HTTP 404"
    assert reasons[2] == "HTTP 503 (5 attempts)"
    assert "(5 attempts)" in reasons[3] and "without sending complete" in reasons[3]
    assert "which is no JPEG" in reasons[4]
    assert "truncated or corrupt" in reasons[5]
    assert all(f"train/{image_id(number)}: {reason}" in printed.err for number, reason in reasons.items())
    assert [server.asked[path_of(number)] for number in range(1, 6)] == [1, 5, 5, 1, 1]
    assert there(folder) == {f"train/{image_id(6)}.jpg"}
    assert list(sources(folder)) == [image_id(6)]
    for number in range(1, 6):
        server.files[path_of(number)], server.faults[path_of(number)] = jpeg(number), []
    assert run_fetch(server, folder) == 0
    assert not (folder / "FAILURES.csv").exists()


def test_sources_name_author_and_licence_and_add_up(server, folder, capsys):
    info = "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title"
    licence = "https://creativecommons.org/licenses/by/2.0/"
    lines = [f'{image_id(n)},train,o{n},land{n},{licence},prof{n},Ann {n},"Two, or {n}"' for n in range(1, 5)]
    (folder / "train-images-boxable-with-rotation.csv").write_text("\n".join([info, *lines]) + "\n\n")
    write_tables(folder, [*(row(number, "Car") for number in range(1, 6)), row(6, "Dog")])
    assert run_fetch(server, folder) == 0
    first = sources(folder)
    assert sorted(first) == [image_id(number) for number in range(1, 6)]
    assert first[image_id(2)] == {
        "id": image_id(2),
        "split": "train",
        "url": server.url + path_of(2),
        "author": "Ann 2",
        "author_profile": "prof2",
        "title": "Two, or 2",
        "licence": licence,
        "original": "land2",
    }
    assert first[image_id(5)]["licence"] == ""
    assert run_fetch(server, folder, "--classes", "dog") == 0
    assert sources(folder) == first | {image_id(6): sources(folder)[image_id(6)]}
    (folder / "SOURCES.csv").write_text("my,own,list\n1,2,3\n")
    assert run_fetch(server, folder) == 1
    assert "SOURCES.csv has not the columns id, split" in capsys.readouterr().err
    assert (folder / "SOURCES.csv").read_text() == "my,own,list\n1,2,3\n"


def test_limit_exclusions_and_seed_choose(server, folder, tmp_path):
    (tmp_path / "skip.txt").write_text(image_id(1))
    assert run_fetch(server, folder, "--exclusions", str(tmp_path / "skip.txt")) == 0
    assert path_of(1) not in server.asked and len(server.asked) == 5
    server.asked.clear()
    choices = set()
    for seed in range(8):
        assert (
            run_fetch(
                server,
                write_tables(tmp_path / str(seed), [row(n, "Car") for n in range(1, 7)]),
                "--limit-per-class",
                "2",
                "--seed",
                str(seed),
            )
            == 0
        )
        choices.add(frozenset(there(tmp_path / str(seed))))
    assert {len(choice) for choice in choices} == {2}
    assert len(choices) > 1


def test_no_more_at_a_time_than_asked_for(server, folder):
    for number in range(1, 7):
        server.faults[path_of(number)] = ["crowded"]  # answered when three are asked for at a time
    assert run_fetch(server, folder, "--parallel", "3") == 0
    assert server.busiest == 3


def test_it_gives_up_when_nothing_comes(server, tmp_path):
    urls = {tmp_path / f"{number}.jpg": f"{server.url}/{number}" for number in range(200)}
    with pytest.raises(ToolError, match="the first 40 pictures all failed, the last with: HTTP 404"):
        fetch(urls, 2)
    assert sum(server.asked.values()) < 60


def test_no_server_is_one_line_a_picture(folder, server, capsys):
    assert run_fetch(server, folder, "--url", "http://127.0.0.1:1/{id}.jpg") == 1
    assert capsys.readouterr().err.count("refused") == 6


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--url", "http://127.0.0.1/x.jpg"], "no template"),
        (["--url", "file:///{id}"], "no template"),
        (["--parallel", "0"], "at least 1"),
        (["--limit-per-class", "0"], "at least 1"),
        (["--classes", "bird"], "no class 'bird'"),
        (["--classes", "dog"], "no boxes of dog"),
    ],
)
def test_wrong_use_is_one_line(flags, named, server, folder, capsys):
    assert run_fetch(server, folder, *flags) == 1
    assert named in capsys.readouterr().err
    assert not server.asked


def test_a_disk_that_cannot_be_written_is_one_line(server, folder, capsys):
    (folder / "images").mkdir()
    (folder / "images" / "train").write_text("in the way")
    assert run_fetch(server, folder) == 1
    assert "File exists" in capsys.readouterr().err
