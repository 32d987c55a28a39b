"""marina data draw: a whole data set of drawn shapes, for a first training run and for tests.

A picture depends on the seed, its split and its number alone, so the set is the same however many processes
draw it.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from numpy.random import default_rng
from pydantic import Field, field_validator

from tools.config import add_flags, settle
from tools.data.dataset import INFO, SPLITS, Box, Dataset, Picture, read_dataset
from tools.data.draw import CLASSES, DIFFICULTIES, SMALLEST_SIDE, draw_scene
from tools.data.pool import in_order
from tools.data.split import totals
from tools.data.write import replacing_folder, write_annotations
from tools.progress import Progress
from tools.strict import Strict

SECTION = "draw"
SHARES = (0.8, 0.1, 0.1)  # of the splits, when only the total is given
LARGEST_SIDE = 4096
JPEG_QUALITY = 90
FEWEST_A_PROCESS = 100  # pictures: for fewer, starting the process takes longer than drawing


class DrawSettings(Strict):
    output: Path = Field(description="folder of the new data set")
    pictures: list[int] = Field([1000], description="how many in all (80 % train, 10 % valid, 10 % test), or in each")
    width: list[int] = Field([256, 640], description="of the pictures in pixels, or from and to")
    height: list[int] = Field([256, 640], description="of the pictures in pixels, or from and to")
    classes: list[str] = Field(list(CLASSES), description="which shapes")
    most_shapes: int = Field(8, ge=1, le=100, description="on one picture")
    difficulty: Literal["easy", "normal", "hard"] = Field("normal", description="size, contrast and overlap of shapes")
    background: float = Field(0.05, ge=0, le=1, description="share of pictures without a shape")
    seed: int = Field(0, ge=0, description="another one gives other pictures")
    workers: int | None = Field(None, ge=1, le=256, description="processes; the default is one a core")
    replace: bool = Field(False, description="put the set in the place of another at the same output")

    @field_validator("pictures")
    @classmethod
    def _splits(cls, pictures: list[int]) -> list[int]:
        """Kept as one number a split."""
        if len(pictures) == 1 and pictures[0] > 0:
            pictures = totals(pictures[0], SHARES)
        if len(pictures) != len(SPLITS) or min(pictures) < 0 or sum(pictures) < 1:
            raise ValueError(f"give one total or three numbers, for {', '.join(SPLITS)}")
        return pictures

    @field_validator("width", "height")
    @classmethod
    def _range(cls, sides: list[int]) -> list[int]:
        """Kept as from and to."""
        if len(sides) not in (1, 2) or not SMALLEST_SIDE <= sides[0] <= sides[-1] <= LARGEST_SIDE:
            raise ValueError(f"give one side or from and to, between {SMALLEST_SIDE} and {LARGEST_SIDE} pixels")
        return [sides[0], sides[-1]]

    @field_validator("classes")
    @classmethod
    def _known(cls, classes: list[str]) -> list[str]:
        if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(CLASSES):
            raise ValueError(f"choose from {', '.join(CLASSES)}, each once")
        return classes


class _Job(NamedTuple):
    split: str
    number: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DrawSettings, SECTION)


def run(args: argparse.Namespace) -> int:
    dataset = draw_dataset(settle(args, DrawSettings, SECTION))
    counts = ", ".join(f"{len(pictures):,} {split}" for split, pictures in dataset.splits.items())
    boxes = sum(len(picture.boxes) for pictures in dataset.splits.values() for picture in pictures)
    print(f"{dataset.folder}: {counts} pictures, {boxes:,} boxes, classes {', '.join(dataset.classes)}")
    return 0


def draw_dataset(settings: DrawSettings) -> Dataset:
    """Draws the set into `settings.output`, whole or not at all. Raises ToolError where that is taken."""
    wanted = {split: count for split, count in zip(SPLITS, settings.pictures, strict=True) if count}
    jobs = [_Job(split, number) for split, count in wanted.items() for number in range(count)]
    drawn: dict[str, list[Picture]] = {split: [] for split in wanted}
    with (
        replacing_folder(settings.output, INFO, replace=settings.replace) as folder,
        Progress("drawing", len(jobs), unit="pictures") as progress,
    ):
        for split in wanted:
            (folder / split).mkdir()
        workers = min(settings.workers or os.cpu_count() or 1, -(-len(jobs) // FEWEST_A_PROCESS))
        for job, picture in zip(jobs, in_order(partial(_draw, settings, folder), jobs, workers), strict=True):
            drawn[job.split].append(picture)
            progress.advance()
        made_with = settings.model_dump(mode="json", exclude={"output", "workers", "replace"})
        write_annotations(folder, settings.classes, drawn, {SECTION: made_with})
    return read_dataset(settings.output)


def _draw(settings: DrawSettings, folder: Path, job: _Job) -> Picture:
    rng = default_rng([settings.seed, SPLITS.index(job.split), job.number])
    width, height = (int(rng.integers(low, high, endpoint=True)) for low, high in (settings.width, settings.height))
    most_shapes = 0 if rng.random() < settings.background else settings.most_shapes
    difficulty = DIFFICULTIES[settings.difficulty]
    picture, shapes = draw_scene(rng, width, height, most_shapes, tuple(settings.classes), difficulty)
    name = f"{job.number:06d}.jpg"
    picture.save(folder / job.split / name, quality=JPEG_QUALITY)
    boxes = tuple(
        Box(settings.classes.index(label), float(x1), float(y1), float(x2), float(y2))
        for label, (x1, y1, x2, y2) in shapes
    )
    return Picture(folder / job.split / name, name, width, height, boxes)
