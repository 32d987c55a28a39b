"""Requests in, answers out: a batch against each request alone, the reference photographs, loading."""

import base64
import io
import json
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import LABELS, ask, encode, oriented, scene, write_labels, write_model
from PIL import Image
from torchvision.ops import box_iou

import handlers.pipeline
from handlers import response
from handlers.errors import BadArchive, BadSettings, InvalidImage, MarinaError, RequestError
from handlers.image import decode
from handlers.pipeline import MAX_FORWARD, Job, Pipeline, _decode_jpeg, dry_run, load_checked
from handlers.runtimes.torch import TorchNetwork
from handlers.settings import Limits, parse_settings
from model_defs import build
from model_defs.yolov5 import YOLOv5
from tools.checkpoint import open_checkpoint, write_safetensors

DETECTIONS = {"Marina-Format": "detections"}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def torchvision_pipeline():
    """A detector that resizes pictures itself, and refuses some."""
    torch.manual_seed(0)
    detector = build("fasterrcnn_mobilenet_v3_large_320_fpn", 6, min_size=96, max_size=160).eval()
    section = {
        "name": "tv", "version": "1", "model": {"definition": "x"}, "weights": "", "labels": "", "device": "cpu",
        "preprocess": {}, "postprocess": {"score_threshold": 0.16}, "limits": {}, "response": {}, "runtime": {},
        "golden": [],
    }  # fmt: skip
    labels = ["__background__", *LABELS]
    network = TorchNetwork(detector, torch.device("cpu"), torch.float32)
    return Pipeline(parse_settings(section), labels, network, torch.device("cpu"))


@pytest.fixture
def pipeline(request, small_pipeline):
    return small_pipeline if request.param == "yolov5" else request.getfixturevalue("torchvision_pipeline")


both = pytest.mark.parametrize("pipeline", ["yolov5", "torchvision"], indirect=True)


def detections(answer):
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["detections"]


def recorded(monkeypatch, detector, fails=lambda images: False):
    """The shapes that go through the network from now on."""
    shapes, original = [], detector.candidates

    def candidates(images, *settings):
        shapes.append(tuple(images.shape))
        if fails(images):
            raise RuntimeError("the secret cause")
        return original(images, *settings)

    monkeypatch.setattr(detector, "candidates", candidates)
    return shapes


@both
def test_a_mixed_batch_answers_each_as_it_would_alone(pipeline):
    large = np.tile(scene(400, 600), (10, 10, 1)) if pipeline.network.letterbox else scene(600, 400)
    requests = [
        encode(scene(200, 320), "JPEG")[:900],
        encode(Image.fromarray(scene(240, 320)).convert("L"), "JPEG"),
        encode(Image.fromarray(scene(160, 320)).convert("RGBA")),
        oriented(scene(320, 288), 6, "JPEG"),
        b"this is no picture",
        encode(scene(1, 1)),
        encode(large, "JPEG", quality=75),
        ({"data": encode(scene(320, 192)), "score_threshold": b"0.05", "class_agnostic": b"true"}, {}),
    ]
    together = ask(pipeline, *requests)
    alone = [ask(pipeline, request)[0] for request in requests]
    assert together == alone
    assert [answer.status for answer in together] == [400, 200, 200, 200, 415, 200, 200, 200]
    assert sum(len(json.loads(answer.body)) > 0 for answer in together if answer.status == 200) >= 5


@both
def test_neighbours_of_one_shape_share_a_forward_pass(pipeline, monkeypatch):
    pictures = [encode(scene(240, 320, seed)) for seed in range(5)]
    requests = [({"body": picture}, DETECTIONS) for picture in pictures]
    alone = [detections(ask(pipeline, request)[0]) for request in requests]
    shapes = recorded(monkeypatch, pipeline.network)
    together = ask(pipeline, *requests[:3], encode(scene(320, 200)), *requests[3:])
    assert [(shape[0], shape[2:]) for shape in shapes] == (
        [(5, (256, 320)), (1, (320, 224))] if pipeline.network.letterbox else [(5, (240, 320)), (1, (320, 200))]
    )
    for one, other in zip(alone, [*map(detections, together[:3]), *map(detections, together[4:])], strict=True):
        assert len(one) == len(other) > 10
        for mine, theirs in zip(by_place(one), by_place(other), strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert mine["box"] == pytest.approx(theirs["box"], abs=0.01)


@both
def test_detect_finds_what_the_server_answers_and_says_what_it_refuses(pipeline):
    pictures = [encode(scene(240, 320, 1)), b"\xff\xd8\xff no picture", encode(scene(320, 200, 2))]
    found = pipeline.detect(pictures, pipeline.defaults)
    assert isinstance(found[1], InvalidImage)
    for picture, mine in ((pictures[0], found[0]), (pictures[2], found[2])):
        answered = by_place(detections(ask(pipeline, ({"body": picture}, DETECTIONS))[0]))
        assert sorted(mine.scores.tolist()) == pytest.approx(sorted(d["score"] for d in answered), abs=1e-4)
        assert len(mine.boxes) > 10


def test_detect_looks_at_every_class_of_a_box_when_asked(small_pipeline):
    options = replace(small_pipeline.defaults, score_threshold=0.0, iou_threshold=1.0, max_detections=100_000)
    picture = [encode(scene(240, 320, 1))]
    (best,), (every,) = (small_pipeline.detect(picture, replace(options, multi_label=m)) for m in (False, True))
    assert len(every.scores) == min(len(best.scores) * len(LABELS), 30_000)


def by_place(found):
    """In batches, the last digits differ, and with them the order of all but equal scores."""
    return sorted(found, key=lambda row: (row["label"], [round(value) for value in row["box"]], row["score"]))


def test_forward_passes_are_bounded(small_pipeline, monkeypatch):
    shapes = recorded(monkeypatch, small_pipeline.network)
    ask(small_pipeline, *[encode(scene(32, 320))] * (MAX_FORWARD + 1))
    assert [shape[0] for shape in shapes] == [MAX_FORWARD, 1]
    monkeypatch.setattr(handlers.pipeline, "MAX_FORWARD_PIXELS", 2 * 32 * 320)
    ask(small_pipeline, *[encode(scene(32, 320))] * 3, encode(scene(320, 320)))
    assert [shape[0] for shape in shapes[2:]] == [2, 1, 1]


def test_a_picture_that_the_model_fails_on_is_alone_with_it(small_pipeline, monkeypatch, caplog):
    white = encode(np.full((240, 320, 3), 255, np.uint8))
    good = [encode(scene(240, 320, seed)) for seed in range(2)]
    alone = [ask(small_pipeline, picture)[0] for picture in good]
    recorded(
        monkeypatch,
        small_pipeline.network,
        fails=lambda images: bool((images[:, :, 100:150] == 255).all((1, 2, 3)).any()),
    )
    with caplog.at_level(logging.ERROR):
        first, failed, last = ask(small_pipeline, good[0], white, good[1])
    assert [first, last] == alone
    assert (failed.status, failed.phrase) == (500, "Internal Server Error")
    assert json.loads(failed.body) == {
        "code": 500,
        "type": "ModelFailure",
        "message": "the model failed on this picture; the server's log has the cause",
    }
    assert "the secret cause" in caplog.text and "Traceback" in caplog.text


def test_options_change_their_own_answer_only(small_pipeline):
    picture = encode(scene(240, 320, 3))

    def found(**options):
        headers = {f"Marina-{name.replace('_', '-').title()}": str(value) for name, value in options.items()}
        return {"body": picture}, headers | DETECTIONS

    plain, strict, few, dogs, lax, apart, agnostic, loose = map(
        detections,
        ask(
            small_pipeline,
            found(),
            found(score_threshold=0.9),
            found(max_detections=3),
            found(classes="dog"),
            found(score_threshold=0.01, max_detections=1000),
            found(iou_threshold=0, score_threshold=0.5, max_detections=1000),
            found(iou_threshold=0, score_threshold=0.5, max_detections=1000, class_agnostic="true"),
            found(iou_threshold=1, max_detections=1000),
        ),
    )
    assert len(plain) == 300 and all(row["score"] > 0.25 for row in plain)
    assert strict == [row for row in plain if row["score"] > 0.9] != []
    assert few == plain[:3]
    assert dogs and {row["label"] for row in dogs} == {"dog"}
    assert len(lax) == 1000 and lax[: len(plain)] == plain
    assert 5 < len(agnostic) < len(apart)
    assert len(loose) == 1000


def test_answers_are_sorted_and_clipped(small_pipeline):
    for height, width in ((240, 320), (1, 1), (7, 900)):
        (answer,) = ask(small_pipeline, ({"body": encode(scene(height, width, 5))}, DETECTIONS))
        found = detections(answer)
        assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
        for row in found:
            x1, y1, x2, y2 = row["box"]
            assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
            assert LABELS[row["index"]] == row["label"]
        stages = ["decode", "preprocess", "inference", "postprocess"]
        assert list(json.loads(answer.body)["timing_ms"]) == stages


def test_orientations_of_one_picture_get_one_answer(small_pipeline):
    first, *others = ask(small_pipeline, *(oriented(scene(240, 320), orientation) for orientation in range(1, 9)))
    alone = [ask(small_pipeline, oriented(scene(240, 320), orientation))[0] for orientation in range(1, 9)]
    assert alone == [alone[0]] * 8
    assert len(json.loads(first.body)) > 10
    for other in others:
        assert [list(row) for row in json.loads(other.body)] == [list(row) for row in json.loads(first.body)]


@pytest.mark.parametrize("form", ["torchserve", "detections", "coco", "yolo", "image"])
def test_every_format_arrives_as_what_it_says(small_pipeline, form):
    (answer,) = ask(small_pipeline, ({"body": encode(scene(240, 320))}, {"marina-format": form}))
    assert answer.status == 200
    types = {"image": "image/jpeg", "yolo": "text/plain; charset=utf-8"}
    assert answer.content_type == types.get(form, "application/json")
    if form == "image":
        assert answer.body.startswith(b"\xff\xd8\xff")
    else:
        rows = answer.body.splitlines() if form == "yolo" else json.loads(answer.body)
        assert len(rows["detections"] if form == "detections" else rows) == 300


def instance(picture, **options):
    return {"b64": base64.b64encode(picture).decode()} | options


def test_kserve_instances_are_answered_in_their_form(small_pipeline):
    pictures = [encode(scene(240, 320)), encode(scene(320, 200))]
    alone = [json.loads(ask(small_pipeline, picture)[0].body) for picture in pictures]
    (answer,) = ask(small_pipeline, ({"body": {"instances": [instance(picture) for picture in pictures]}}, {}))
    assert json.loads(answer.body) == {"predictions": alone}
    own = {"instances": [instance(pictures[0], format="coco", max_detections=2), instance(pictures[1])]}
    (answer,) = ask(small_pipeline, ({"body": own}, DETECTIONS))
    first, second = json.loads(answer.body)["predictions"]
    assert len(first) == 2 and "category_id" in first[0]
    assert (second["width"], second["height"]) == (200, 320)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"instances": [instance(b"GIF89a"), instance(encode(scene(9, 9)))]}, 400, "instances[0]: the GIF picture is"),
        ({"instances": [instance(encode(scene(9, 9))), instance(b"text")]}, 415, "instances[1]: the body begins with"),
        ({"instances": [instance(encode(scene(9, 9)), score_threshold=2)]}, 400, "instances[0]: score_threshold is 2;"),
        ({"instances": [instance(encode(scene(9, 9)))], "format": "yolo"}, 400, "format yolo is no JSON"),
        ({"instances": [instance(encode(scene(9, 9)))], "format": "image"}, 400, "format image is no JSON"),
        ({"instances": []}, 400, '"instances" must be a list'),
    ],
)  # fmt: skip
def test_kserve_errors_name_their_instance(small_pipeline, body, status, message):
    (answer,) = ask(small_pipeline, ({"body": body}, {}))
    assert answer.status == status
    assert message in json.loads(answer.body)["message"]


@given(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from([0, 1, 2]), st.booleans(), st.integers(30, 100),
    st.sampled_from(["RGB", "L", "CMYK"]), st.sampled_from([None, 1, 3, 6]),
)  # fmt: skip
def test_jpegs_are_decoded_as_everywhere_else(height, width, subsampling, progressive, quality, mode, orientation):
    """By the faster way, where it is taken."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture = Image.fromarray(scene(height, width)).convert(mode)
    picture.save(buffer, "JPEG", subsampling=subsampling, progressive=progressive, quality=quality, exif=exif)
    body = buffer.getvalue()
    assert np.array_equal(decode(body, Limits(), _decode_jpeg), decode(body, Limits()))


def test_real_jpegs_are_decoded_as_everywhere_else(shared):
    for path in [*(shared / "real/photos").glob("*.jpg"), *(shared / "real/coco_mini").rglob("*.jpg")]:
        body = path.read_bytes()
        assert np.array_equal(decode(body, Limits(), _decode_jpeg), decode(body, Limits())), path


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_damaged_jpegs_are_refused_as_everywhere_else(seed, cut):
    rng = np.random.default_rng(seed)
    body = bytearray(encode(scene(40, 50)))
    if cut:
        del body[rng.integers(len(body)) :]
    else:
        body[rng.integers(len(body))] = rng.integers(256)
    answers = []
    for way in (None, _decode_jpeg):
        try:
            answers.append(decode(bytes(body), Limits(), way).shape)
        except RequestError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_kserve_answers_are_bounded(small_pipeline, monkeypatch):
    picture = instance(encode(scene(240, 320)))
    (one,) = ask(small_pipeline, ({"body": {"instances": [picture]}}, {}))
    # Its timings may have more digits the next time.
    monkeypatch.setattr(response, "MAX_ANSWER_BYTES", len(one.body) + 30)
    again, two = ask(small_pipeline, *(({"body": {"instances": [picture] * count}}, {}) for count in (1, 2)))
    assert (again.status, two.status) == (200, 400)
    assert "the answer to 2 instances would have" in json.loads(two.body)["message"]


def test_a_picture_too_thin_for_the_model_is_refused(torchvision_pipeline):
    thin, good = ask(torchvision_pipeline, encode(scene(1, 5000)), encode(scene(100, 100)))
    assert (thin.status, good.status) == (400, 200)
    assert "5000x1 pixels is less than one pixel thin" in json.loads(thin.body)["message"]


PICTURES = [encode(scene(20, 30), form) for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")]
BODIES = st.binary(max_size=40) | st.text(max_size=40) | st.sampled_from(PICTURES) | st.none() | st.integers()
NAMES = st.sampled_from(["data", "body", "score_threshold", "classes", "format"]) | st.text(max_size=4)
HEADERS = st.sampled_from(["Content-Type", "marina-format", "Marina-Classes", "marina-x", "describe"]) | st.text(
    max_size=9
)


@given(
    st.dictionaries(NAMES, BODIES | st.builds(lambda picture: {"b64": picture}, BODIES), max_size=3),
    st.dictionaries(HEADERS, st.text(max_size=20), max_size=3),
)
@settings(max_examples=150)
def test_reading_never_raises(small_pipeline, row, headers):
    check_job(small_pipeline, row, headers)


@given(st.data())
@settings(max_examples=150)
def test_reading_broken_pictures_never_raises(small_pipeline, data):
    body = bytearray(data.draw(st.sampled_from(PICTURES)))
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    check_job(small_pipeline, {"body": body[: data.draw(st.integers(0, len(body)))]}, {})


def check_job(pipeline, row, headers):
    job = pipeline.read(row, headers)
    assert isinstance(job, Job)
    assert job.error or job.items
    assert all((item.error is None) == (item.tensor is not None) for item in job.items)
    if job.error or job.items[0].error:
        answer = pipeline.respond(job)
        assert answer.status in (400, 413, 415)
        assert set(json.loads(answer.body)) == {"code", "type", "message"}


# Loading


@pytest.fixture
def model(small_model, tmp_path):
    """A folder and configuration that a test may spoil."""
    folder, config = small_model
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, json.loads(json.dumps(config))


def add_golden(folder, config):
    """A golden picture, and the answer that the archive gives now."""
    (folder / "a.png").write_bytes(encode(scene(240, 320)))
    config["handler"]["golden"] = [{"image": "a.png", "detections": "a.json"}]
    (answer,) = dry_run(str(folder), config)["answers"]
    (folder / "a.json").write_text(json.dumps(answer))
    return answer


def test_an_archive_that_answers_as_it_must_is_loaded_and_warm(model, monkeypatch):
    folder, config = model
    answer = add_golden(folder, config)
    assert len(answer["detections"]) > 10 and answer["timing_ms"] == {}
    shapes = []
    original = YOLOv5.candidates
    monkeypatch.setattr(
        YOLOv5,
        "candidates",
        lambda self, images, *settings: shapes.append(images.shape[0]) or original(self, images, *settings),
    )
    pipeline = load_checked(folder, config | {"batchSize": 8})
    assert shapes == [1, 8]
    assert detections(ask(pipeline, ({"body": encode(scene(240, 320))}, DETECTIONS))[0]) == answer["detections"]


def spoil_answer(folder, config):
    answer = json.loads((folder / "a.json").read_text())
    answer["detections"][0]["box"][0] += 9
    (folder / "a.json").write_text(json.dumps(answer))


def spoil_picture(folder, config):
    (folder / "a.png").write_bytes(encode(np.ascontiguousarray(scene(240, 320)[:, :, ::-1])))


def spoil_labels(folder, config):
    write_labels(folder, [LABELS[3], *LABELS[1:3], LABELS[0], *LABELS[4:]])


@pytest.mark.parametrize("spoil", [spoil_answer, spoil_picture, spoil_labels])
def test_another_golden_answer_stops_the_load(model, spoil):
    folder, config = model
    add_golden(folder, config)
    spoil(folder, config)
    with pytest.raises(
        BadArchive, match=r"golden picture a\.png gets another answer than it has to: \d+ detections missing"
    ):
        load_checked(folder, config)


def change(config, path, value):
    *way, last = path.split(".")
    for key in way:
        config = config[key]
    config[last] = value


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f, c: (f / "a.png").unlink(), BadArchive, "golden picture a.png cannot be read"),
        (
            lambda f, c: (f / "a.png").write_bytes(b"x"),
            BadArchive,
            "golden picture a.png cannot be answered: the body begins",
        ),
        (lambda f, c: (f / "a.json").unlink(), BadArchive, "golden answer a.json cannot be read"),
        (lambda f, c: (f / "a.json").write_text("[]"), BadArchive, "golden answer a.json is not an answer"),
        (lambda f, c: (f / "model.safetensors").unlink(), BadArchive, "model.safetensors cannot be read"),
        (lambda f, c: os.truncate(f / "model.safetensors", 100_000), BadArchive, "tensor .* is inconsistent"),
        (lambda f, c: write_labels(f, LABELS[:-1]), BadArchive, "weights are for 5 classes, but the labels name 4"),
        (lambda f, c: write_labels(f, ["__background__", *LABELS[1:]]), BadSettings, "take '__background__' out"),
        (lambda f, c: (f / "index_to_name.json").unlink(), BadSettings, "index_to_name.json cannot be read"),
        (lambda f, c: c.pop("handler"), BadSettings, "no `handler` section"),
        (
            lambda f, c: change(c, "handler.model.definition", "yolov9"),
            BadSettings,
            "unknown model definition 'yolov9'",
        ),
        (lambda f, c: change(c, "handler.model.args", {"size": "z"}), BadSettings, "unknown YOLOv5 size 'z'"),
        (
            lambda f, c: change(c, "handler.model.args", {"num_classes": 3}),
            BadSettings,
            "does not take these arguments",
        ),
        (
            lambda f, c: change(c, "handler.model.args", {"size": "s"}),
            BadArchive,
            "do not fit the model: .* of another shape",
        ),
        (
            lambda f, c: change(c, "handler.model.definition", "ssd300_vgg16"),
            BadSettings,
            "does not take these arguments",
        ),
        (
            lambda f, c: change(c, "handler.preprocess.size", 330),
            BadSettings,
            "330, not a multiple of the model's stride 32",
        ),
        (lambda f, c: change(c, "handler.postprocess", {"treshold": 1}), BadSettings, "treshold: unknown setting"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(model, spoil, error, message):
    folder, config = model
    add_golden(folder, config)
    spoil(folder, config)
    with pytest.raises(error, match=message) as caught:
        load_checked(folder, config)
    assert isinstance(caught.value, MarinaError)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_wanted_has_to_be_there(model):
    folder, config = model
    change(config, "handler.device", "gpu")
    with pytest.raises(BadSettings, match="device is gpu, but torch finds no usable CUDA device"):
        Pipeline.load(folder, config)
    change(config, "handler.device", "auto")
    assert Pipeline.load(folder, config, gpu=0).device.type == "cpu"


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(8, 2, 4), (8, 3, 2), (8, 8, 1), (2, 5, 1), (8, None, 1), (1, 1, 1), (4, 1, 4)]
)
def test_threads_are_cores_divided_by_workers(model, monkeypatch, cores, workers, threads):
    folder, config = model
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    config.pop("maxWorkers")
    Pipeline.load(folder, config if workers is None else config | {"maxWorkers": workers})
    assert torch.get_num_threads() == threads


def test_describe_is_json(small_pipeline):
    described = json.loads(json.dumps(small_pipeline.describe()))
    assert described["labels"] == LABELS
    assert (described["name"], described["version"], described["definition"]) == ("small", "1.0", "yolov5")
    assert described["postprocess"]["score_threshold"] == 0.25


# Real weights and photographs


@pytest.fixture(scope="module")
def coco_model(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    config = write_model(folder, preprocess={"size": 640, "shape": "rect"})
    with open_checkpoint(shared / "real/agpl/yolov5n.pt") as checkpoint:
        write_safetensors(folder / "model.safetensors", checkpoint.tensors)
        write_labels(folder, checkpoint.names)
    return folder, config


@pytest.mark.parametrize("shape", ["square", "rect"])
def test_reference_photographs(shared, coco_model, shape):
    """YOLOv5's own program found these; real/README.md has the bounds."""
    folder, config = coco_model
    config["handler"]["preprocess"]["shape"] = shape
    pipeline = Pipeline.load(folder, config)
    reference = json.loads((shared / "real/reference/photos_detections.json").read_text())["detections"]
    setting = f"{shape}640_conf0.25_iou0.45"
    assert len(reference[setting]) > 20
    for name, expected in reference[setting].items():
        path = next(path for path in ((shared / "real" / part / name) for part in ("photos", "agpl")) if path.exists())
        (answer,) = ask(pipeline, ({"body": path.read_bytes()}, DETECTIONS))
        compare(name, json.loads(answer.body), expected)


def compare(name, answer, expected):
    resized = max(answer["width"], answer["height"]) != 640
    least = 0.35 if resized else 0.0
    left = list(answer["detections"])
    for wanted in expected:
        rivals = [row for row in left if row["index"] == wanted["class_id"] and iou(row, wanted) >= 0.5]
        if not rivals:
            assert wanted["score"] < least, (name, wanted)
            continue
        match = max(rivals, key=lambda row: iou(row, wanted))
        left.remove(match)
        if not resized:
            assert np.abs(np.subtract(match["box"], wanted["box"])).max() <= 0.05, (name, wanted, match)
            assert abs(match["score"] - wanted["score"]) <= 0.001, (name, wanted, match)
        elif wanted["score"] >= least:
            assert iou(match, wanted) >= 0.95, (name, wanted, match)
            assert abs(match["score"] - wanted["score"]) <= 0.02, (name, wanted, match)
    assert [row for row in left if row["score"] >= least] == [], name


def iou(one, other):
    boxes = [torch.tensor([row["box"]], dtype=torch.float64) for row in (one, other)]
    return box_iou(*boxes).item()


def test_orientations_of_a_photograph_get_the_same_boxes(shared, coco_model):
    pipeline = Pipeline.load(*coco_model)
    with Image.open(shared / "real/photos/yolox_dog.jpg") as file:
        pixels = np.array(file.convert("RGB"))
    plain = ask(pipeline, encode(pixels))[0]
    assert len(json.loads(plain.body)) >= 3
    for orientation in range(2, 9):
        assert ask(pipeline, oriented(pixels, orientation)) == [plain]
        # Lossy, and so turned before it was compressed.
        (turned,) = ask(pipeline, oriented(pixels, orientation, "JPEG"))
        clear, other = ([row for row in json.loads(body) if row["score"] > 0.35] for body in (plain.body, turned.body))
        for mine, theirs in zip(clear, other, strict=True):
            assert mine.keys() == theirs.keys()
            assert mine["score"] == pytest.approx(theirs["score"], abs=0.02)
