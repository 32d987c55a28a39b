"""An evaluation as a folder.

    evaluation.json   every figure
    matches.npz       what became of every detection, which `marina evaluate compare` resamples
    report.html       the figures with curves, confusion matrix and the worst pictures, which lie beside it too

It is written whole or not at all.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.errors import RequestError
from handlers.image import decode
from handlers.settings import Limits
from tools.data.write import check_place, replacing_folder, write_json
from tools.evaluate.evaluation import CURVE, MATCHES, RATES, RESULT, Evaluation, document
from tools.evaluate.metrics import Floats, truth_of
from tools.evaluate.sources import picture_bytes
from tools.evaluate.table import HEADER, rows_of, sentences
from tools.report.boxes import class_colour, draw_boxes, sheet
from tools.report.charts import confusion, curves
from tools.report.page import Page

PAGE = "report.html"
PRECISION_RECALL, CONFUSION, WORST = "precision_recall.png", "confusion.png", "worst.jpg"
# File and caption of each; the last is absent where no picture has a fault.
PICTURES = {
    **{f"{rate}.png": f"{rate} over the score threshold" for rate in RATES},
    PRECISION_RECALL: "precision over recall at IoU 0.5",
    CONFUSION: "what was served for what is there",
    WORST: "the worst pictures: on the left what is there, on the right what was served",
}
COLUMNS = 2
CELL = 700  # pixels of a pair of pictures on the sheet of the worst


def check_output(folder: Path) -> None:
    """Raises ToolError unless `write_report` may write there."""
    check_place(folder, RESULT, replace=True)


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Make the folder with everything in it, or nothing; an earlier evaluation there is replaced. Raises ToolError
    when something else is there, or nothing can be written."""
    with replacing_folder(folder, RESULT, replace=True) as draft:
        _write(evaluation, draft)


def _write(evaluation: Evaluation, folder: Path) -> None:
    content = document(evaluation)
    write_json(folder / RESULT, content)
    counts, matches = evaluation.counts, evaluation.matches
    np.savez_compressed(folder / MATCHES, tp=counts.tp, fp=counts.fp, fn=counts.fn, **matches._asdict())
    page = Page(f"Evaluation of {content['model']}")
    page.paragraph(f"{content['data']['pictures']} pictures of split {content['data']['split']}.")
    for sentence in sentences(content):
        page.paragraph(sentence)
    page.table(HEADER, [[float("nan") if cell is None else cell for cell in row] for row in rows_of(content)])
    for name, picture in _pictures(evaluation):
        (folder / name).write_bytes(picture)
        page.picture(picture, PICTURES[name])
    page.write(folder / PAGE)


def _pictures(evaluation: Evaluation) -> Iterator[tuple[str, bytes]]:
    """File name and content of each."""
    over = evaluation.curves.over(CURVE)
    overall, by_class = over.total().rates(), over.rates()
    for rate in RATES:
        name = f"{rate}.png"
        yield name, _curves(evaluation, overall[rate], by_class[rate], PICTURES[name], "score threshold", rate)
    at = evaluation.ap.precision_at
    known = at[:, ~np.isnan(at[0])]
    mean = known.mean(axis=1) if known.size else np.full(len(at), np.nan)
    yield PRECISION_RECALL, _curves(evaluation, mean, at, PICTURES[PRECISION_RECALL], "recall", "precision")
    yield CONFUSION, confusion(evaluation.confusion, evaluation.classes)
    pairs = _worst_pairs(evaluation)
    if pairs:
        buffer = io.BytesIO()
        sheet(pairs, COLUMNS, CELL).save(buffer, "JPEG", quality=85)
        yield WORST, buffer.getvalue()


def _curves(evaluation: Evaluation, overall: Floats, by_class: Floats, title: str, x_label: str, y_label: str) -> bytes:
    """overall: `[101]`. by_class: `[101, num_classes]`."""
    columns = zip(evaluation.classes, by_class.T.tolist(), strict=True)
    return curves({"all classes": overall.tolist(), **dict(columns)}, CURVE.tolist(), title, x_label, y_label)


def _worst_pairs(evaluation: Evaluation) -> list[tuple[Image.Image, str]]:
    """Each of the worst pictures with its truths, beside itself with what was served."""
    pairs = []
    faults = evaluation.counts.total()
    for index in evaluation.worst():
        picture, served = evaluation.pictures[index], evaluation.answers[index].served
        try:
            pixels = decode(picture_bytes(picture), Limits())
        except RequestError:
            continue  # nothing to draw on; the note about refused pictures names it
        truth = truth_of(picture)
        names = [evaluation.classes[label] for label in truth.labels]
        left = _drawn(pixels, truth.boxes, truth.labels, names)
        names = [
            f"{evaluation.classes[label]} {score:.2f}"
            for label, score in zip(served.labels, served.scores, strict=True)
        ]
        right = _drawn(pixels, served.boxes, served.labels, names)
        pair = Image.new("RGB", (2 * left.width, left.height))
        pair.paste(left, (0, 0))
        pair.paste(right, (left.width, 0))
        pairs.append((pair, f"{picture.name}: {faults.fn[index]} missed, {faults.fp[index]} false"))
    return pairs


def _drawn(pixels: np.ndarray, boxes: Floats, labels: np.ndarray, captions: list[str]) -> Image.Image:
    return draw_boxes(
        pixels, [tuple(box) for box in boxes.tolist()], captions, [class_colour(int(label)) for label in labels]
    )
