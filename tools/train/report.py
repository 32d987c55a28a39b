"""What a run leaves to look at, and what it takes to serve it.

labels.png        where the boxes of training lie, and how large they are
batches.jpg       augmented pictures of the first batches, with their boxes
curves.png        results.csv as curves
archive.yaml      the recipe, with index_to_name.json and golden/
evaluation/       `best` on the validation pictures as it will be served, as `marina evaluate` writes it
report.html       all of that in one page
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from handlers.pipeline import Pipeline
from handlers.runtimes.torch import TorchNetwork
from model_defs.contract import Detections, Detector
from tools.archive.build import settings_of
from tools.archive.recipe import load_recipe
from tools.checkpoint.safetensors_format import replacing
from tools.data.dataset import Dataset, Picture
from tools.data.show import label_statistics
from tools.errors import ToolError
from tools.evaluate.evaluation import Evaluation, evaluate
from tools.evaluate.metrics import operating_points, truth_of
from tools.evaluate.report import PICTURES, write_report
from tools.evaluate.sources import PipelineSource
from tools.evaluate.table import HEADER, rows_of, sentences
from tools.report.boxes import class_colour, draw_boxes, sheet
from tools.report.charts import box_statistics, learning_curves
from tools.report.page import Page
from tools.train.config import TrainSettings
from tools.train.pictures import TrainingPictures
from tools.train.recipe import write_recipe
from tools.train.run import BEST, RESULTS, writing

LABELS_PICTURE = "labels.png"
BATCHES_PICTURE = "batches.jpg"
CURVES_PICTURE = "curves.png"
EVALUATION = "evaluation"
PAGE = "report.html"

SAMPLES, COLUMNS, CELL = 24, 6, 320
LEAST_THRESHOLD, MOST_THRESHOLD = 0.05, 0.95  # of what is served
GOLDEN_PICTURES = 2


def draw_data(run: Path, dataset: Dataset, samples: TrainingPictures) -> None:
    """Before training: what it will see."""
    statistics = label_statistics(dataset.split("train"), dataset.classes)
    _write(run / LABELS_PICTURE, box_statistics(statistics, dataset.classes))
    drawn = []
    for index in range(min(SAMPLES, len(samples))):
        pixels, boxes, labels = samples[0, index]
        picture = draw_boxes(
            np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()),
            [tuple(box) for box in boxes.tolist()],
            [dataset.classes[label] for label in labels.tolist()],
            [class_colour(label) for label in labels.tolist()],
        )
        drawn.append((picture, f"{len(boxes)} boxes"))
    buffer = io.BytesIO()
    sheet(drawn, COLUMNS, CELL).save(buffer, "JPEG", quality=85)
    _write(run / BATCHES_PICTURE, buffer.getvalue())


def write_results(
    run: Path,
    settings: TrainSettings,
    dataset: Dataset,
    detector: Detector,
    labels: list[str],
    found: Mapping[int, Detections],
) -> None:
    """After training: recipe, evaluation and page.

    detector: with the best weights, on the CPU; it is made ready for serving. labels: its own, in order.
    found: what it found on the pictures of validation, by their number.
    """
    pictures = dataset.split("valid")
    threshold = _threshold(pictures, found, len(dataset.classes))
    write_recipe(run, settings, labels, threshold, [])
    recipe = load_recipe(run)
    device = torch.device("cpu")
    pipeline = Pipeline(settings_of(recipe), labels, TorchNetwork(detector, device, torch.float32), device)
    evaluation = evaluate(PipelineSource(pipeline, f"{recipe.name} {recipe.version}"), dataset, "valid")
    if all(answer.refusal for answer in evaluation.answers):
        why = evaluation.answers[0].refusal
        raise ToolError(f"{run}: as it would be served, the network answers no picture of validation ({why})")
    write_report(evaluation, run / EVALUATION)
    golden = _golden(evaluation)
    if not golden:
        print("no picture of validation is answered right, so the recipe has no golden one to prove an archive by")
    write_recipe(run, settings, labels, threshold, golden)
    _write_page(run, evaluation)


def _threshold(pictures: Sequence[Picture], found: Mapping[int, Detections], num_classes: int) -> float:
    """Where F1 is best, in two digits, and not where only noise would decide."""
    numbers = sorted(found)
    truths = [truth_of(pictures[number]) for number in numbers]
    best, _ = operating_points(truths, [found[number] for number in numbers], num_classes).best(beta=1)
    return round(min(max(best, LEAST_THRESHOLD), MOST_THRESHOLD), 2)


def _golden(evaluation: Evaluation) -> list[Picture]:
    """The pictures with the fewest faults, and of those the ones with most objects: what any good copy of the model
    answers alike."""
    faults = (evaluation.counts.fp + evaluation.counts.fn).sum(axis=1)
    objects = evaluation.counts.tp.sum(axis=1)
    order = np.lexsort((-objects, faults))
    chosen = [evaluation.pictures[index] for index in order if objects[index]]
    by_stem = {picture.file.stem: picture for picture in reversed(chosen)}  # a recipe wants stems that differ
    return [picture for picture in chosen if by_stem[picture.file.stem] is picture][:GOLDEN_PICTURES]


def _write_page(run: Path, evaluation: Evaluation) -> None:
    from tools.evaluate.evaluation import document

    with (run / RESULTS).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}
    _write(run / CURVES_PICTURE, learning_curves(columns))
    content = document(evaluation)
    page = Page(f"Training run {run.resolve().name}")
    page.paragraph(f"{len(rows)} epochs. {BEST} on {content['data']['pictures']} pictures of validation:")
    page.table(HEADER, [[float("nan") if cell is None else cell for cell in row] for row in rows_of(content)])
    for sentence in sentences(content):
        page.paragraph(sentence)
    for heading, folder, names in (
        ("Training", run, {CURVES_PICTURE: "losses, metrics and rates by epoch"}),
        ("Evaluation", run / EVALUATION, PICTURES),
        (
            "Data",
            run,
            {LABELS_PICTURE: "boxes of the training pictures", BATCHES_PICTURE: "augmented pictures as trained on"},
        ),
    ):
        page.heading(heading)
        for name, caption in names.items():
            if (folder / name).exists():
                page.picture((folder / name).read_bytes(), caption)
    with writing(run / PAGE):
        page.write(run / PAGE)


def _write(path: Path, content: bytes) -> None:
    with writing(path), replacing(path) as file:
        file.write(content)
