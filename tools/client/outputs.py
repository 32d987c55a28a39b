"""Answers as people and programs want them.

    to a stream   table, jsonl, csv: line by line; coco: one document at the end
    to a folder   <stem>.jpg and <stem>.mp4 with boxes; labels/<stem>.txt; crops/<class>/<stem>-<n>.jpg
                  of a frame: labels/<stem>/<frame>.txt, crops/<class>/<stem>/<frame>-<n>.jpg

Each is a context manager; one that ends by an exception leaves no half-written file.
"""

import csv
import io
import json
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np
from PIL import Image

from handlers.image import decode
from tools.checkpoint.safetensors_format import replacing
from tools.client.answer import Answer
from tools.client.client import Asked
from tools.client.naming import CROPS, LABELS, safe
from tools.client.sources import Film
from tools.data.check import LIMITS

if TYPE_CHECKING:
    from tools.video.overlay import Overlay
    from tools.video.writer import VideoWriter

JPEG_QUALITY = 95
CSV_HEADER = (
    "source",
    "frame",
    "seconds",
    "width",
    "height",
    "index",
    "label",
    "score",
    "x1",
    "y1",
    "x2",
    "y2",
    "track",
)


class Result:
    """An answer to a picture or frame, and its picture. stem: names its files; that of the video for a frame."""

    def __init__(self, asked: Asked, answer: Answer, stem: str, overlay: "Overlay"):
        self.shot = asked.shot
        self.answer = answer
        self.stem = stem
        self._body = asked.body
        self._overlay = overlay

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 `[H, W, 3]`, RGB, upright. Raises RequestError when it cannot be decoded."""
        return decode(self._body, LIMITS) if self.shot.pixels is None else self.shot.pixels

    @cached_property
    def drawn(self) -> np.ndarray:
        """As `pixels`, with the boxes."""
        return self._overlay.draw(self.pixels, [found.to_json() for found in self.answer.detections])

    def file(self, folder: Path, ending: str, joint: str = "") -> Path:
        """In `folder`, which is made: <stem><joint><ending>, or <stem>/<frame><joint><ending> for a frame."""
        frame = self.answer.frame
        name = self.stem if frame is None else f"{self.stem}/{frame:06d}"
        path = folder / f"{name}{joint}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Closed(Exception):
    """Whoever looked at the results has seen enough."""


class Output:
    """What is done with the results, in their order."""

    def add(self, result: Result) -> None:
        """Raises Closed."""
        raise NotImplementedError

    def fail(self, answer: Answer) -> None:
        """An answer with an error; people are told of it elsewhere."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def finish(self) -> None:
        """After the last result."""


class Table(Output):
    """A line a detection, for people."""

    def __init__(self, out: TextIO):
        self._out = out

    def add(self, result: Result) -> None:
        answer = result.answer
        name = answer.source if answer.frame is None else f"{answer.source} {answer.frame}"
        for found in answer.detections:
            x1, y1, x2, y2 = found.box
            track = "" if found.track is None else f"  #{found.track}"
            self._line(name, f"{found.label:16} {found.score:5.3f}  {x1:7.1f} {y1:7.1f} {x2:7.1f} {y2:7.1f}{track}")
        if not answer.detections:
            self._line(name, "nothing found")

    def _line(self, name: str, text: str) -> None:
        print(f"{name:32}  {text}", file=self._out, flush=True)


class JsonLines(Output):
    """A line a picture or frame, those without an answer included."""

    def __init__(self, out: TextIO):
        self._out = out

    def add(self, result: Result) -> None:
        self.fail(result.answer)

    def fail(self, answer: Answer) -> None:
        # At once, since what reads it may wait for the next frame of a camera.
        print(json.dumps(answer.to_json(), ensure_ascii=False), file=self._out, flush=True)


class Csv(Output):
    """A row a detection."""

    def __init__(self, out: TextIO):
        self._rows = csv.writer(out, lineterminator="\n")
        self._rows.writerow(CSV_HEADER)

    def add(self, result: Result) -> None:
        answer = result.answer
        for found in answer.detections:
            place = (answer.source, answer.frame, answer.seconds, answer.width, answer.height)
            self._rows.writerow((*place, found.index, found.label, found.score, *found.box, found.track))


class Coco(Output):
    """One COCO document, its annotations with scores. `category_id` is the model's index, as in the served format."""

    def __init__(self, out: TextIO):
        self._out = out
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._categories: dict[int, str] = {}

    def add(self, result: Result) -> None:
        answer = result.answer
        image = {
            "id": len(self._images) + 1,
            "file_name": answer.source,
            "width": answer.width,
            "height": answer.height,
        }
        self._images.append(image if answer.frame is None else image | {"frame": answer.frame})
        for found in answer.detections:
            x1, y1, x2, y2 = found.box
            width, height = round(x2 - x1, 3), round(y2 - y1, 3)
            self._categories[found.index] = found.label
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image["id"],
                    "category_id": found.index,
                    "bbox": [x1, y1, width, height],
                    "area": round(width * height, 3),
                    "iscrowd": 0,
                    "score": found.score,
                }
            )

    def finish(self) -> None:
        categories = [{"id": index, "name": name} for index, name in sorted(self._categories.items())]
        content = {"images": self._images, "annotations": self._annotations, "categories": categories}
        print(json.dumps(content, ensure_ascii=False), file=self._out)


class YoloText(Output):
    """A file a picture, empty where nothing was found: lines `index cx cy w h score`, normalised to the picture."""

    def __init__(self, folder: Path):
        self._folder = folder / LABELS

    def add(self, result: Result) -> None:
        answer = result.answer
        lines = []
        for found in answer.detections:
            x1, y1, x2, y2 = found.box
            cx, cy = (x1 + x2) / 2 / answer.width, (y1 + y2) / 2 / answer.height
            width, height = (x2 - x1) / answer.width, (y2 - y1) / answer.height
            lines.append(f"{found.index} {cx:.6f} {cy:.6f} {width:.6f} {height:.6f} {found.score:.6f}\n")
        with replacing(result.file(self._folder, ".txt")) as file:
            file.write("".join(lines).encode())


class Crops(Output):
    """What lies in each box, as a picture of its own in a folder of its class."""

    def __init__(self, folder: Path):
        self._folder = folder / CROPS

    def add(self, result: Result) -> None:
        for number, found in enumerate(result.answer.detections, start=1):
            x1, y1, x2, y2 = found.box
            left, top = int(x1), int(y1)
            # A box thinner than a pixel still lies in one.
            crop = result.pixels[top : max(top + 1, round(y2)), left : max(left + 1, round(x2))]
            if crop.size:
                write_jpeg(result.file(self._folder / safe(found.label), f"{number}.jpg", "-"), crop)


class Annotated(Output):
    """Pictures and videos with boxes drawn on them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._film: Film | None = None
        self._writer: VideoWriter | None = None
        self._open = ExitStack()

    def add(self, result: Result) -> None:
        film = result.shot.film
        if film is not self._film:
            self.finish()
            self._film = film
        self._folder.mkdir(parents=True, exist_ok=True)
        if film is None:
            write_jpeg(self._folder / f"{result.stem}.jpg", result.drawn)
        else:
            self._write_frame(film, result)

    def _write_frame(self, film: Film, result: Result) -> None:
        from tools.video.frames import Frame
        from tools.video.writer import VideoWriter

        if self._writer is None:
            height, width = result.pixels.shape[:2]
            path = self._folder / f"{result.stem}.mp4"
            self._writer = self._open.enter_context(VideoWriter(path, width, height, film.rate, film.audio_from))
        self._writer.write(Frame(result.shot.frame or 0, result.shot.seconds or 0.0, result.drawn))

    def finish(self) -> None:
        self._writer = None
        self._open.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)


def write_jpeg(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    with replacing(path) as file:
        file.write(buffer.getvalue())
