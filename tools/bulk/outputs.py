"""coco.json, failed.jsonl and summary.json from all parts, one after the other, however many there are."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from handlers.labels import BACKGROUND
from tools.bulk.parts import Answered, read_part
from tools.bulk.plan import COCO, FAILED, SUMMARY, Manifest, Shard, read_lines
from tools.data.write import NO_SPACE
from tools.errors import ToolError
from tools.progress import Progress
from tools.store.objects import Objects, look_at


class CocoWriter:
    """A COCO document that grows: images into one file, annotations into another, which is appended at the end.

    `category_id` is the model's index, as in the served format, and every annotation has its score.
    """

    def __init__(self, images: IO[str], annotations: IO[str], manifest: Manifest, labels: Sequence[str]):
        self._images, self._annotations = images, annotations
        self.images = self.annotations = 0
        self.classes: Counter[str] = Counter()
        info = {"model": manifest.model, "version": manifest.version, "archive_sha256": manifest.archive}
        categories = [{"id": index, "name": name} for index, name in enumerate(labels) if name != BACKGROUND]
        images.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": [')

    def add(self, one: Answered) -> None:
        image = {"id": one.id, "file_name": one.picture, "width": one.width, "height": one.height}
        self._images.write(("," if self.images else "") + f"\n{json.dumps(image)}")
        self.images += 1
        for found in one.detections:
            x1, y1, x2, y2 = found["box"]
            width, height = round(x2 - x1, 3), round(y2 - y1, 3)
            annotation = {
                "id": self.annotations + 1,
                "image_id": one.id,
                "category_id": found["index"],
                "bbox": [x1, y1, width, height],
                "area": round(width * height, 3),
                "iscrowd": 0,
                "score": found["score"],
            }
            self._annotations.write(("," if self.annotations else "") + f"\n{json.dumps(annotation)}")
            self.annotations += 1
            self.classes[found["label"]] += 1

    def finish(self) -> None:
        self._images.write('\n],\n"annotations": [')
        self._annotations.seek(0)
        shutil.copyfileobj(self._annotations, self._images)
        self._images.write("\n]}\n")


def write_outputs(
    target: Objects, manifest: Manifest, labels: Sequence[str], shards: Sequence[Shard], about: dict[str, Any]
) -> dict[str, Any]:
    """All three; what stands in the summary. about: more for the summary.

    Raises ToolError when a part is damaged or the disk is full.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="marina-") as made:
            folder = Path(made)
            summary = manifest.model_dump() | _put_together(folder, target, manifest, labels, shards) | about
            (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            for name in (COCO, FAILED, SUMMARY):
                file = look_at(folder / name)
                with Progress(name, file.size) as progress:
                    target.upload(name, file, progress.advance)
            return summary
    except OSError as error:
        why = "the disk is full" if error.errno in NO_SPACE else error.strerror or str(error)
        raise ToolError(
            f"{COCO} cannot be put together in {tempfile.gettempdir()} ({why}); make room there or set TMPDIR, and run"
            " the same command again"
        ) from error


def _put_together(
    folder: Path, target: Objects, manifest: Manifest, labels: Sequence[str], shards: Sequence[Shard]
) -> dict[str, Any]:
    failed: Counter[str] = Counter()
    with (
        (folder / COCO).open("w", encoding="utf-8") as images,
        (folder / "annotations").open("w+", encoding="utf-8") as annotations,
        (folder / FAILED).open("w", encoding="utf-8") as failures,
        Progress("putting together", len(shards), "parts") as progress,
    ):
        coco = CocoWriter(images, annotations, manifest, labels)
        for shard in shards:
            part = read_part(target, shard, manifest, read_lines(target, shard))
            for one in part.answered:
                coco.add(one)
            for picture in part.failed:
                failures.write(json.dumps(asdict(picture)) + "\n")
                failed[picture.type] += 1
            progress.advance()
        coco.finish()
    return {
        "pictures": sum(shard.pictures for shard in shards),
        "answered": coco.images,
        "failed": dict(failed.most_common()),
        "detections": coco.annotations,
        "classes": dict(coco.classes.most_common()),
    }
