import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image

from handlers.geometry import letterbox, plan_letterbox
from handlers.image import decode
from handlers.settings import Limits, Preprocess
from tools.data.dataset import Box, Picture
from tools.data.draw import CLASSES, draw_scene
from tools.errors import ToolError
from tools.train.augmentation import Augmentation
from tools.train.cache import Cache, LoaderSettings, Mode, Wanted, loader_settings, scaled
from tools.train.pictures import Batch, TrainingPictures, ValidationPictures, make_loader, validation_batches
from tools.train.sampler import EpochBatches

SIZE = 96
SHAPES = ((120, 90), (90, 120), (200, 50), (64, 64), (97, 41), (120, 90))
OFF = Augmentation(**dict.fromkeys(Augmentation.model_fields, 0.0))
ALONE = LoaderSettings(0, None, False, None)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """Drawn scenes of several shapes; the last picture is background."""
    found = []
    for index, (width, height) in enumerate(SHAPES):
        image, shapes = draw_scene(default_rng(index), width, height)
        file = tmp_path / f"{index}.png"
        image.save(file)
        boxes = tuple(Box(CLASSES.index(shape.label), *map(float, shape.box)) for shape in shapes)
        found.append(Picture(file, file.name, width, height, boxes if index < len(SHAPES) - 1 else ()))
    return found


def training(pictures: Sequence[Picture], cache: Cache | None = None, canvas: bool = True, **changes: float):
    return TrainingPictures(pictures, SIZE, Augmentation(**changes), 7, canvas, cache or Cache("none"))


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sample_depends_on_seed_epoch_and_index_alone(pictures: list[Picture]) -> None:
    data = training(pictures, mixup=0.5)
    sample = data[3, 1]
    assert sample.pixels.shape == (3, SIZE, SIZE) and sample.pixels.dtype == torch.uint8
    assert sample.boxes.dtype == torch.float32 and sample.labels.dtype == torch.int64
    data[3, 2], data[4, 1]
    assert same(sample, data[3, 1])
    other = TrainingPictures(pictures, SIZE, Augmentation(mixup=0.5), 8, True, Cache("none"))
    for different in (data[3, 2], data[4, 1], other[3, 1]):
        assert not torch.equal(sample.pixels, different.pixels)


@pytest.mark.parametrize("settings", [LoaderSettings(2, "fork", False, None), LoaderSettings(2, "fork", True, None)])
def test_workers_change_nothing(pictures: list[Picture], settings: LoaderSettings) -> None:
    data = training(pictures, Cache("ram"))
    batches = EpochBatches(len(pictures), 2, seed=1)
    loaders = [make_loader(data, batches, how) for how in (ALONE, settings)]
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        for alone, from_worker in zip(*loaders, strict=True):
            assert isinstance(from_worker, Batch)
            assert alone.images.shape == (2, 3, SIZE, SIZE)
            assert same(alone, from_worker)


def test_pipes_take_ragged_batches_and_validation(pictures: list[Picture]) -> None:
    piped = LoaderSettings(1, "fork", True, None)
    data = training(pictures, canvas=False)
    (batch,) = make_loader(data, [[(0, index) for index in range(len(data))]], piped)
    alone = data.collate([data[0, index] for index in range(len(data))])
    assert same(batch.images, alone.images) and torch.equal(batch.targets, alone.targets)

    valid = ValidationPictures(pictures, Preprocess(SIZE, "rect"), 32, Cache("none"))
    (batch,) = make_loader(valid, [[0, 5]], piped)
    assert batch.indices == [0, 5] and batch.plans == [valid[0][1], valid[5][1]]
    assert torch.equal(batch.images[1], valid[5][0])


def test_loader_settings_follow_shared_memory() -> None:
    assert loader_settings(0, 1 << 60) == ALONE
    small = loader_settings(2, 1)
    assert (small.workers, small.multiprocessing_context, small.by_pipe, small.note) == (2, "fork", False, None)
    large = loader_settings(2, 1 << 60)
    assert large.by_pipe and large.note is not None and "/dev/shm" in large.note


def test_without_augmentation_training_sees_what_is_served(pictures: list[Picture]) -> None:
    data = TrainingPictures(pictures, SIZE, OFF, 0, True, Cache("none"))
    for index, picture in enumerate(pictures):
        sample = data[0, index]
        pixels = torch.from_numpy(decode(picture.file.read_bytes(), Limits())).permute(2, 0, 1)
        plan = plan_letterbox(picture.height, picture.width, Preprocess(SIZE, "square"), stride=32)
        assert torch.equal(sample.pixels, letterbox(pixels, plan))
        scale = plan.content_width / picture.width, plan.content_height / picture.height
        expected = torch.tensor([box.xyxy for box in picture.boxes]).reshape(-1, 4) * torch.tensor(scale * 2)
        assert torch.allclose(sample.boxes, expected + torch.tensor((plan.left, plan.top) * 2), atol=1e-4)
        assert sample.labels.tolist() == [box.label for box in picture.boxes]


def test_models_that_resize_get_pictures_in_their_own_shape(pictures: list[Picture]) -> None:
    data = training(pictures, canvas=False)
    shapes = [tuple(data[0, index].pixels.shape[1:]) for index in range(len(pictures))]
    assert shapes == [(72, 96), (96, 72), (24, 96), (64, 64), (41, 96), (72, 96)]  # 64x64 is not enlarged
    batch = data.collate([data[0, 0], data[0, 3], data[0, 5]])
    assert isinstance(batch.images, list) and len(batch.by_picture()) == 3
    boxes, labels = batch.by_picture()[1]
    assert torch.allclose(boxes, data[0, 3].boxes, atol=1e-4)
    assert torch.equal(labels, data[0, 3].labels)


def test_targets_are_centres_and_sides_in_pixels(pictures: list[Picture]) -> None:
    data = TrainingPictures(pictures, SIZE, OFF, 0, True, Cache("none"))
    batch = data.collate([data[0, 5], data[0, 0]])  # the first is background
    assert batch.targets[:, 0].tolist() == [1.0] * len(pictures[0].boxes)
    x1, y1, x2, y2 = data[0, 0].boxes[0].tolist()
    expected = [1, pictures[0].boxes[0].label, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    assert batch.targets[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert data.collate([data[0, 5]]).targets.shape == (0, 6)


def test_crowds_are_not_trained_on(pictures: list[Picture]) -> None:
    crowd = Box(1, 0, 0, 60, 60, crowd=True)
    marked = [Picture(p.file, p.name, p.width, p.height, (crowd, Box(4, 10, 10, 50, 50))) for p in pictures]
    data = training(marked)
    assert {label for index in range(6) for label in data[0, index].labels.tolist()} == {4}


@pytest.mark.parametrize("preprocess", [Preprocess(SIZE, "rect"), Preprocess(SIZE, "square"), None])
@pytest.mark.parametrize("mode", ["none", "ram"])
def test_validation_sees_what_is_served(pictures: list[Picture], preprocess: Preprocess | None, mode: Mode) -> None:
    data = ValidationPictures(pictures, preprocess, 32, Cache(mode))
    batches = validation_batches(pictures, preprocess, 32, 2)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pictures)))
    assert max(map(len, batches)) == 2
    for batch in make_loader(data, batches, ALONE):
        for image, plan, index in zip(*batch, strict=True):
            pixels = torch.from_numpy(decode(pictures[index].file.read_bytes(), Limits())).permute(2, 0, 1)
            if preprocess is not None:
                assert plan == plan_letterbox(pictures[index].height, pictures[index].width, preprocess, 32)
                pixels = letterbox(pixels, plan)
            assert torch.equal(image, pixels)


def test_validation_batches_are_few(pictures: list[Picture]) -> None:
    shapes = [SHAPES[index] for batch in validation_batches(pictures, None, 1, 4) for index in batch]
    assert sum(a != b for a, b in pairwise(shapes)) == len(set(SHAPES)) - 1
    assert validation_batches(pictures, Preprocess(SIZE, "square"), 32, 4) == [[0, 1, 2, 3], [4, 5]]


def test_caches_give_the_same_samples_and_need_no_pictures(pictures: list[Picture], tmp_path: Path) -> None:
    plain = training(pictures)
    expected = [plain[0, index] for index in range(len(pictures))]
    folder = tmp_path / "cache"
    kept = [training(pictures, cache) for cache in (Cache("ram"), Cache("disk", folder=folder))]
    for picture in pictures:
        picture.file.unlink()
    for data in kept:
        assert all(same(sample, data[0, index]) for index, sample in enumerate(expected))


def test_memory_is_bounded(pictures: list[Picture], capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [scaled(picture, SIZE) for picture in pictures]
    cache = Cache("ram", limit_bytes=wanted[0].nbytes + wanted[1].nbytes)
    cache.fill(wanted)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 6 pictures" in line
    assert np.array_equal(cache.read(wanted[5]), Cache("none").read(wanted[5]))
    cache.fill(wanted[:2])
    assert not capsys.readouterr().err
    for index in (0, 1, 5):
        pictures[index].file.unlink()
    assert cache.read(wanted[1]).shape == (96, 72, 3)
    with pytest.raises(ToolError, match=r"5\.png"):
        cache.read(wanted[5])


def test_entries_on_disk_follow_their_pictures(pictures: list[Picture], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    wanted = scaled(pictures[0], SIZE)
    Cache("disk", folder=folder).fill([wanted])
    (entry,) = folder.iterdir()
    written = entry.stat().st_mtime_ns
    Cache("disk", folder=folder).fill([wanted, wanted])
    assert entry.stat().st_mtime_ns == written and len(list(folder.iterdir())) == 1

    entry.write_bytes(entry.read_bytes()[:-100])  # cut short
    cache = Cache("disk", folder=folder)
    cache.fill([wanted])
    assert np.array_equal(cache.read(wanted), Cache("none").read(wanted))

    for colour in (9, 8, 7), (1, 2, 3):  # files of one size, at two times
        Image.new("RGB", (wanted.picture.width, wanted.picture.height), colour).save(wanted.picture.file, "BMP")
        os.utime(wanted.picture.file, (sum(colour), sum(colour)))
        cache = Cache("disk", folder=folder)
        cache.fill([wanted])
        assert (cache.read(wanted) == colour).all()


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_a_broken_picture_is_named(pictures: list[Picture], mode: Mode, tmp_path: Path) -> None:
    pictures[2].file.write_bytes(pictures[2].file.read_bytes()[:200])
    with pytest.raises(ToolError, match=r"2\.png cannot be read .*marina data prepare"):
        training(pictures, Cache(mode, folder=tmp_path / "cache"))


@pytest.mark.parametrize("settings", [ALONE, LoaderSettings(1, "fork", False, None)])
def test_a_picture_that_breaks_during_training_is_named_in_one_line(
    pictures: list[Picture], settings: LoaderSettings
) -> None:
    data = training(pictures)
    pictures[2].file.unlink()
    with pytest.raises(ToolError) as raised:
        list(make_loader(data, [[(0, 2)]], settings))
    problem = "cannot be read (No such file or directory); run `marina data prepare` again"
    assert str(raised.value) == f"{pictures[2].file} {problem}"


def test_a_picture_that_is_not_as_labelled_is_named(pictures: list[Picture]) -> None:
    first = pictures[0]
    with pytest.raises(ToolError, match=r"0\.png has 120x90 pixels, but its labels are for 60x90"):
        Cache("ram").fill([scaled(Picture(first.file, first.name, 60, 90), SIZE)])


def test_a_folder_that_cannot_be_written_is_named(pictures: list[Picture], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match=r"file/cache cannot be written"):
        Cache("disk", folder=tmp_path / "file" / "cache").fill([Wanted(pictures[0], 90, 120)])
