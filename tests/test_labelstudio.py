"""`marina label` and the ML backend, as far as they need no Label Studio."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import captured_items
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.capture_store import open_store, write_item
from handlers.drawing import class_colour
from tools.cli import main
from tools.data.dataset import INFO
from tools.errors import ToolError
from tools.gateway.app import create_app
from tools.gateway.auth import new_key
from tools.gateway.settings import Limits, Server, Settings
from tools.labelstudio.access import Access, picture_url
from tools.labelstudio.client import LabelStudio, connect
from tools.labelstudio.config import extend_config, make_config, read_config
from tools.labelstudio.history import FILE, read_history
from tools.labelstudio.items import Captured, Source
from tools.labelstudio.project import classes_of, control_of
from tools.labelstudio.pull import Entry, place
from tools.labelstudio.regions import prediction, to_boxes, to_regions

CONFIG = make_config(["circle", "star"])
CONTROL = read_config(CONFIG)

names = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1), min_size=1, unique=True)


@given(names, names)
def test_a_configuration_gives_its_labels_back_and_can_be_extended(first: list[str], second: list[str]) -> None:
    config = make_config(first)
    assert read_config(config).labels == tuple(first)
    both = extend_config(config, second)
    assert read_config(both).labels == tuple(dict.fromkeys([*first, *second]))
    assert extend_config(both, first + second) == both


def test_colours_are_those_of_answers_also_of_labels_that_come_later() -> None:
    config = extend_config(make_config(["a", "b"]), ["c"])
    for index in range(3):
        assert 'background="#{:02x}{:02x}{:02x}"'.format(*class_colour(index)) in config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("<View>", "no XML"),
        ("<View/>", "0 tags RectangleLabels"),
        (CONFIG.replace("</View>", '<RectangleLabels name="b" toName="image"/></View>'), "2 tags"),
        (CONFIG.replace("<Image", "<Video"), "no tag Image"),
        (CONFIG.replace('"$image"', '"image"'), "no tag Image"),
        (CONFIG.replace("star", "circle"), "name of its own"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]>' + CONFIG, "document type"),
        (CONFIG + " " * 1_000_000, "too long"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_config(config)
    with pytest.raises(ToolError, match=f"project 'x' does not fit: .*{said}"):
        control_of({"title": "x", "label_config": config})


sizes = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))


@given(sizes, st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=5), st.data())
def test_boxes_come_back_from_per_cent(size: tuple[int, int], corners: list[tuple[float, ...]], data: Any) -> None:
    width, height = size
    boxes = []
    for x1, y1, x2, y2 in corners:
        box = min(x1, x2) * width, min(y1, y2) * height, max(x1, x2) * width, max(y1, y2) * height
        if box[2] - box[0] > 0.2 and box[3] - box[1] > 0.2:
            boxes.append((data.draw(st.sampled_from(CONTROL.labels)), 0.5, box))
    detections = [{"label": label, "score": score, "box": box} for label, score, box in boxes]
    regions = to_regions(detections, width, height, CONTROL)
    assert all(0 <= region["value"][key] <= 100 for region in regions for key in ("x", "y", "width", "height"))
    found = to_boxes(json.loads(json.dumps(regions)), width, height)
    assert not found.unusable and not found.turned
    assert [label for label, _ in found.boxes] == [label for label, _, _ in boxes]
    for (_, back), (_, _, box) in zip(found.boxes, boxes, strict=True):
        assert back == pytest.approx(box, abs=1e-4)


def region(x: float, y: float, width: float, height: float, rotation: float = 0, **changes: object) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": ["star"]}
    return {"type": "rectanglelabels", "value": value, **changes}


def test_a_turned_rectangle_becomes_the_upright_box_around_it() -> None:
    # A quarter clockwise about the upper left corner, of 40 x 10 pixels, in a picture that is not square.
    found = to_boxes([region(50, 50, 20, 10, rotation=90)], 200, 100)
    assert found.turned == 1 and found.boxes == [("star", pytest.approx((90, 50, 100, 90)))]
    found = to_boxes([region(50, 50, 10, 20, rotation=45)], 200, 100)
    assert found.boxes[0][1] == pytest.approx((100 - 14.1421, 50, 100 + 14.1421, 50 + 28.2843), abs=1e-3)


def test_a_box_is_clipped_to_the_picture() -> None:
    found = to_boxes([region(-10, 90, 200, 20)], 64, 48)
    assert found.boxes == [("star", (0, pytest.approx(43.2), 64, 48))]


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (region(10, 10, 0, 10), "no area"),
        (region(110, 10, 10, 10), "no area"),
        (region(float("nan"), 10, 10, 10), "no area"),
        (region(10, 10, 10, 10, image_rotation=90), "picture was turned"),
        (region(10, 10, "wide", 10), "could not convert"),
        ({"type": "rectanglelabels", "value": {"x": 1}}, "no labelled rectangle"),
        ({"type": "rectangle", "value": {"x": 1, "y": 1, "width": 5, "height": 5}}, "no labelled rectangle"),
        ({"type": "polygonlabels", "value": {"points": [[1, 1]], "polygonlabels": ["star"]}}, "no labelled rectangle"),
    ],
)
def test_a_region_that_gives_no_box_is_told(odd: dict[str, Any], why: str) -> None:
    found = to_boxes([odd, region(0, 0, 50, 50)], 64, 48)
    assert len(found.boxes) == 1 and len(found.unusable) == 1 and why in found.unusable[0]


def test_what_is_said_of_the_whole_picture_is_no_region() -> None:
    whole = [{"type": "choices", "value": {"choices": ["blurred"]}}, {"type": "relation", "from_id": "a", "to_id": "b"}]
    assert to_boxes(whole, 64, 48) == to_boxes([], 64, 48)


def test_a_prediction_has_the_score_of_its_least_sure_box() -> None:
    detections = [{"label": "star", "score": score, "box": (0, 0, 5, 5)} for score in (0.9, 0.3, 0.5)]
    assert prediction("shapes 1.0", to_regions(detections, 10, 10, CONTROL))["score"] == 0.3
    assert prediction("shapes 1.0", [])["score"] == 0


@pytest.mark.parametrize("base", ["http://labels:8080", "http://labels:8080/studio", "https://labels"])
def test_pictures_are_at_label_studio_alone(base: str) -> None:
    prefix = httpx.URL(base).path.rstrip("/")
    for path in ("/data/upload/1/a.jpg", "/tasks/12/resolve/?fileuri=czM6", "/storage-data/uploaded/?filepath=a"):
        assert picture_url(base, prefix + path) == base + path
        assert picture_url(base, base + path) == base + path
    for address in (
        *(None, 7, "", "/", "/api/projects/", "/data", "/user/logout", "/upload/data/a.jpg"),
        *("http://elsewhere/data/a.jpg", "//elsewhere/data/a.jpg", "http://labels:8081/data/a.jpg"),
        *("http://labels:8080@elsewhere/data/a.jpg", "http://me:pw@labels:8080/data/a.jpg", "ftp://labels/data/a.jpg"),
        *("http://labels.elsewhere:8080/data/a.jpg", "file:///data/a.jpg", "/data/../api/projects/"),
        *(
            "s3://bucket/data/a.jpg",
            "\\\\elsewhere\\data\\a.jpg",
            "http://[::1/data/a.jpg",
            "/d\x00",
        ),
    ):
        assert picture_url(base, address) is None, address


def test_captured_items_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    ids = [captured_items.write_item(tmp_path, number, b"picture", (96, 64)) for number in (2, 0, 1)]
    (tmp_path / captured_items.DAY / f"{captured_items.item_id(5)}.jpg").write_bytes(b"not whole yet")
    (tmp_path / captured_items.DAY / "notes.json").write_text("{}")
    source = Source(str(tmp_path))
    assert source.ids() == sorted(ids)
    found = dict(source.read(source.ids()))
    one = found[ids[0]]
    assert isinstance(one, Captured) and one.item.width == 96 and source.picture(one) == b"picture"


def test_what_a_server_captures_is_read(tmp_path: Path) -> None:
    detection = {"label": "star", "index": 4, "score": 0.26, "box": [1.0, 2.0, 30.5, 40.0]}
    record = {
        "model": "shapes",
        "version": "1.0",
        "checksum": "0" * 64,
        "reasons": ["near-threshold", "class:star"],
        "width": 96,
        "height": 64,
        "detections": [detection],
        "score_threshold": 0.25,
        "blurred": False,
    }
    name = write_item(open_store(str(tmp_path)), 1_790_000_000.0, b"picture", ".jpg", record)
    source = Source(str(tmp_path))
    assert source.ids() == [name]
    ((_, found),) = source.read([name])
    assert isinstance(found, Captured) and source.picture(found) == b"picture"
    assert found.item.detections[0].box == (1.0, 2.0, 30.5, 40.0) and found.item.reasons == record["reasons"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": captured_items.item_id(8)}, "names itself"),
        ({"image": "../../secret.jpg"}, "image"),
        ({"image": f"{captured_items.item_id(8)}.jpg"}, "names itself"),
        ({"width": 0}, "width"),
        ({"detections": [{"label": "a", "score": 2, "box": [0, 0, 1, 1]}]}, "detections.0.score"),
    ],
)
def test_an_item_that_is_not_as_captures_are_is_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    name = captured_items.write_item(tmp_path, 1, b"picture", (96, 64), **changes)
    ((_, found),) = Source(str(tmp_path)).read([name])
    assert isinstance(found, ToolError) and said in str(found) and name in str(found)


def test_a_picture_that_is_gone_is_told(tmp_path: Path) -> None:
    name = captured_items.write_item(tmp_path, 1, b"picture", (96, 64))
    (tmp_path / captured_items.DAY / f"{name}.jpg").unlink()
    source = Source(str(tmp_path))
    ((_, found),) = source.read([name])
    assert isinstance(found, Captured) and "cannot be read" in str(source.picture(found))


@pytest.mark.parametrize("place", ["nowhere", "nosuch://bucket/prefix", ""])
def test_a_place_without_captures_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(ToolError, match=r"holds no captured item|cannot be read|another package"):
        Source(place if "://" in place else str(tmp_path / place))


class Studio(ThreadingHTTPServer):
    """Answers as Label Studio does to tokens and questions for pictures; anything else is 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bought = 0
        self.valid = ""
        self.seen: list[tuple[str, str]] = []


class _Answers(BaseHTTPRequestHandler):
    server: Studio

    def do_POST(self) -> None:
        refresh = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["refresh"]
        if self.path != "/api/token/refresh/" or refresh != "a.good.token":
            return self._say(401, b'{"detail": "Token is invalid"}')
        self.server.bought += 1
        self.server.valid = f"access{self.server.bought}"
        return self._say(200, json.dumps({"access": self.server.valid}).encode())

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        self.server.seen.append((self.path, given))
        if given not in (f"Bearer {self.server.valid}", "Token legacy"):
            return self._say(401, b'{"detail": "Authentication credentials were not provided."}')
        if self.path == "/data/elsewhere.jpg":
            return self._say(302, b"", Location=f"{self.server.url}/data/large.jpg")
        if self.path == "/data/large.jpg":
            return self._say(200, b"x" * 100_000)
        return self._say(404, b"{}")

    def _say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def studio() -> Iterator[Studio]:
    with Studio() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_personal_token_buys_access_and_again_when_that_has_ended(studio: Studio) -> None:
    with LabelStudio(studio.url, "a.good.token") as client:
        assert len(client.picture("/data/large.jpg")) == 100_000
        assert len(client.picture("/data/large.jpg")) == 100_000
        assert studio.bought == 1
        studio.valid = "ended"
        assert len(client.picture("/data/large.jpg")) == 100_000
        assert studio.bought == 2


def test_access_is_bought_by_clients_that_do_not_block(studio: Studio) -> None:
    async def ask() -> int:
        async with httpx.AsyncClient(auth=Access(studio.url, "a.good.token")) as client:
            return (await client.get(f"{studio.url}/data/large.jpg")).status_code

    assert asyncio.run(ask()) == 200


@pytest.mark.parametrize("token", ["a.bad.token", "unknown"])
def test_a_token_that_is_not_taken_is_one_line(studio: Studio, token: str) -> None:
    with LabelStudio(studio.url, token) as client, pytest.raises(ToolError, match="does not take the token") as caught:
        client.call("GET", "/api/projects/")
    assert token not in str(caught.value)


@pytest.mark.parametrize("token", ["", " \n", "two words", "schlüssel"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(ToolError, match="just the token"):
        Access("http://labels", token)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "LABEL_STUDIO_URL"),
        ("labels:8080", "no address"),
        ("http://me:secret@labels", "no credentials"),
        ("http://labels/?token=1", "no address"),
        ("http://127.0.0.1:9", "does not answer"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(
    url: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LABEL_STUDIO_URL", raising=False)
    (tmp_path / "token").write_text("legacy")
    given = ["--url", url] if url else []
    assert main(["label", "push", "captured", "--token-file", str(tmp_path / "token"), *given]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "secret" not in error


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    with pytest.raises(ToolError, match="LABEL_STUDIO_API_KEY"):
        connect("http://labels", None)
    with pytest.raises(ToolError, match="cannot be read"):
        connect("http://labels", tmp_path / "none")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "legacy")
    connect("http://labels", None).__exit__()


def test_a_key_without_a_backend_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("legacy")
    given = ["--url", "http://labels", "--token-file", str(tmp_path / "token"), "--ml-key-file", "key"]
    assert main(["label", "setup", str(tmp_path), *given]) == 1
    assert "--ml-backend URL" in capsys.readouterr().err


def test_classes_come_from_a_data_set_and_nothing_else_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no prepared data set"):
        classes_of(tmp_path)
    (tmp_path / INFO).write_text('{"classes": ["b", "a"]}')
    assert classes_of(tmp_path) == ["b", "a"]


def test_a_folder_of_something_else_is_not_pulled_to(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None and read_history(tmp_path / "none") is None
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ToolError, match="not from `marina label pull`"):
        read_history(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ToolError, match="not as Marina writes it"):
        read_history(tmp_path)


def entry(number: int, label: str) -> Entry:
    return Entry(Path(f"{number}.jpg"), "", 10, 10, [(label, (0, 0, 5, 5))], None)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_splits_are_shared_alike_and_kept_however_few_come_at_once(pulls: list[int]) -> None:
    entries: list[Entry] = []
    for count in pulls:
        before = [one.split for one in entries]
        entries += [entry(len(entries) + number, "ab"[number % 2]) for number in range(count)]
        place(entries)
        assert [one.split for one in entries][: len(before)] == before
    for label in "ab":
        splits = Counter(one.split for one in entries if one.boxes[0][0] == label)
        total = splits.total()
        for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
            assert abs(splits[split] - share * total) <= 2


SERVED = {"name": "m", "version": "1.0", "labels": ["circle"], "checksum": ""}


def backend_answers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, *requests: tuple[str, Any]
) -> list[httpx.Response]:
    """Of the gateway, whose model is one that answers nothing but what it is."""
    from tools.gateway.backend import Backend, Model

    async def model(self: Backend, name: str, version: str | None = None) -> Model:
        return Model(**SERVED)

    monkeypatch.setattr(Backend, "model", model)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return [await client.post(f"/label-studio/{path}", json=content) for path, content in requests]

    return asyncio.run(ask())


def gateway_settings(folder: Path, **changes: Any) -> Settings:
    (folder / "token").write_text("legacy")
    return Settings(
        backends=[Server(url="http://127.0.0.1:9", models=["m"])],
        no_auth=True,
        storage=str(folder / "uploads"),
        label_studio_token_file=folder / "token",
        **{"label_studio_model": "m"} | changes,
    )


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("http://169.254.169.254/data/latest", 400, "is not at http"),
        ("/api/projects/", 400, "is not at http"),
        ("/data/elsewhere.jpg", 503, "answers 302"),
        ("/data/none.jpg", 503, "answers 404"),
        ("/data/large.jpg", 400, "more than 50000 bytes"),
    ],
)
def test_the_gateway_fetches_pictures_of_label_studio_alone(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, status: int, said: str
) -> None:
    settings = gateway_settings(tmp_path, label_studio_url=studio.url, limits=Limits(max_bytes=50_000))
    content = {"tasks": [{"id": 1, "data": {"image": address}}], "label_config": CONFIG}
    (answer,) = backend_answers(settings, monkeypatch, ("predict", content))
    assert answer.status_code == status and said in answer.json()["message"]
    assert all(path == address for path, _ in studio.seen)


def test_a_project_that_the_model_cannot_help_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = gateway_settings(tmp_path, label_studio_url="http://labels")
    fits, other, odd = backend_answers(
        settings,
        monkeypatch,
        ("setup", {"schema": CONFIG, "access_token": "secret", "hostname": "http://labels"}),
        ("setup", {"schema": make_config(["cat"])}),
        ("setup", {"schema": "<View/>"}),
    )
    assert fits.json() == {"model_version": "m 1.0"}
    assert other.status_code == 400 and "none of the project's labels (cat)" in other.json()["message"]
    assert odd.status_code == 400 and "does not fit" in odd.json()["message"]


def test_a_training_is_refused_and_other_events_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = gateway_settings(tmp_path, label_studio_url="http://labels")
    train, start, event = backend_answers(
        settings,
        monkeypatch,
        ("train", {}),
        ("webhook", {"action": "START_TRAINING", "project": {}}),
        ("webhook", {"action": "ANNOTATION_CREATED"}),
    )
    assert train.status_code == start.status_code == 501 and train.json()["type"] == "NotTrainedHere"
    assert event.status_code == 200


def test_the_gateway_is_no_backend_unless_it_is_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = gateway_settings(tmp_path, label_studio_url="http://labels")
    off = settings.model_copy(update={"label_studio_url": None, "label_studio_token_file": None})
    (answer,) = backend_answers(off, monkeypatch, ("setup", {"schema": CONFIG}))
    assert answer.status_code == 404
    with pytest.raises(ValueError, match="go together"):
        gateway_settings(tmp_path)
    with pytest.raises(ValueError, match="none of the models: m"):
        gateway_settings(tmp_path, label_studio_url="http://labels", label_studio_model="n")
    (tmp_path / "token").unlink()
    with pytest.raises(ToolError, match="cannot be read"):
        create_app(settings)


def test_the_gateway_wants_its_key_as_the_password(tmp_path: Path) -> None:
    key, line = new_key("studio")
    (tmp_path / "keys").write_text(line)
    settings = gateway_settings(tmp_path, label_studio_url="http://labels")
    app = create_app(settings.model_copy(update={"no_auth": False, "keys_file": tmp_path / "keys"}))

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            bearer = {"Authorization": f"Bearer {key}"}
            return [
                await client.get("/label-studio/health", auth=("marina", key)),
                await client.get("/label-studio/health", auth=("marina", "wrong")),
                await client.get("/label-studio/health"),
                await client.get("/label-studio/health", headers=bearer),
            ]

    good, *refused = asyncio.run(ask())
    assert good.status_code == 200
    for answer in refused:
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
