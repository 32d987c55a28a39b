"""What is evaluated: an archive, weights with a recipe, a running server, or a file of predictions.

    weights + recipe -> archive -> Pipeline -> Answer
                        server <- requests  -> Answer
                               predictions  -> Answer

Everything that is asked decodes, resizes and selects as serving does. An answer is in the data set's classes: those
of the model and of the set are the same where their names are.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from handlers import errors
from handlers.settings import Postprocess
from tools.archive.reader import open_archive
from tools.data.dataset import Picture
from tools.errors import ToolError
from tools.evaluate.metrics import Found, found_of

if TYPE_CHECKING:
    import httpx

    from handlers.options import Options
    from handlers.pipeline import Item, Pipeline

# How detectors are compared: nearly every candidate, little suppression (COCO takes the best hundred of a class).
RANKED: dict[str, Any] = {
    "score_threshold": 0.001,
    "iou_threshold": 0.6,
    "max_detections": 300,
    "class_agnostic": False,
}
RANKED_TEXT = "score above 0.001, NMS at IoU 0.6, at most 300 a picture"
LOWEST_SCORE = 0.001
REFUSALS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.RequestError)
}
CONNECTIONS = 4
ATTEMPTS = 8  # of a request that a busy server turns away, the first included
PAUSE_S = 0.5  # before the second, twice as long before each that follows
TIMEOUT_S = 120
EXAMPLE = "one such as http://127.0.0.1:8080/predictions/NAME"
WRONG_KEY = "InvalidKeyException"


class Answer(NamedTuple):
    """What was found in one picture, in the data set's labels.

    ranked: for average precision. swept: as served, but with every score above 0.001. served: as served.
    timing_ms: of the stages of serving. foreign: how many served detections were of classes that the data set has
    not, and are left out. refusal: why there is no answer, which counts as nothing found.
    """

    ranked: Found
    swept: Found
    served: Found
    timing_ms: dict[str, float]
    foreign: int = 0
    refusal: str | None = None


class Source(Protocol):
    """name: what is evaluated. setting, serving: how `ranked` and `served` are found, for people. classes: the
    model's, None if unknown."""

    name: str
    setting: str
    serving: str
    classes: Sequence[str] | None

    def answers(self, pictures: Sequence[Picture], classes: Sequence[str]) -> Iterator[Answer]:
        """One a picture, in order. classes: the data set's. Raises ToolError when it cannot be asked."""
        ...


class PipelineSource:
    """A model in this process."""

    setting = f"{RANKED_TEXT}, every class of a box"

    def __init__(self, pipeline: "Pipeline", name: str):
        self.pipeline = pipeline
        self.name = name
        self.classes: Sequence[str] | None = pipeline.labels
        defaults = pipeline.defaults
        across = ", across classes" if defaults.class_agnostic else ""
        self.serving = (
            f"as served: score above {defaults.score_threshold:g}, NMS at IoU {defaults.iou_threshold:g}{across}"
        )

    def answers(self, pictures: Sequence[Picture], classes: Sequence[str]) -> Iterator[Answer]:
        """Picture by picture, as a server without batches would, so that no answer depends on its neighbours."""
        index = {name: label for label, name in enumerate(classes)}
        served = self.pipeline.defaults
        ranked = replace(served, **RANKED, multi_label=True)
        swept = replace(served, score_threshold=min(LOWEST_SCORE, served.score_threshold))
        for picture in pictures:
            job = self.pipeline.read({"body": picture_bytes(picture)}, {})
            if job.error:
                yield _refused(str(job.error))
                continue
            (item,) = job.items
            other = replace(item, options=ranked, timing_ms={})
            item.options = swept
            for each in (item, other):
                job.items = [each]
                self.pipeline.infer([job])
            yield self._answer(item, other, served, index)

    def _answer(self, item: "Item", ranked: "Item", served: "Options", index: dict[str, int]) -> Answer:
        error = item.error or ranked.error
        if error or item.detections is None or ranked.detections is None:
            return _refused(str(error))
        # Suppression goes from the best score down: a higher threshold leaves the beginning of the same answer.
        above = item.detections.scores > served.score_threshold
        parts = [part[above] for part in item.detections]
        found, foreign = self._in_set(parts, index)
        return Answer(
            self._in_set(ranked.detections, index)[0],
            self._in_set(item.detections, index)[0],
            found,
            item.timing_ms,
            foreign,
        )

    def _in_set(self, detections: Sequence[Any], index: dict[str, int]) -> tuple[Found, int]:
        boxes, labels, scores = (part.tolist() for part in detections)
        return in_set(boxes, [self.pipeline.labels[label] for label in labels], scores, index)


@contextmanager
def archive_source(path: Path) -> Iterator[PipelineSource]:
    """An archive that Marina built. Raises BadArchive or BadSettings with one line."""
    with open_archive(path) as archive, TemporaryDirectory(prefix="marina-") as folder:
        if archive.settings is None:
            raise errors.BadArchive(f"{path}: Marina did not build it, so only TorchServe can run it")
        archive.extract(Path(folder))
        from handlers.lean_import import import_torchvision

        import_torchvision()
        from handlers.pipeline import Pipeline

        yield PipelineSource(Pipeline.load(Path(folder), archive.config), f"{archive.name} {archive.version}")


@contextmanager
def recipe_source(path: Path, weights: Path | None) -> Iterator[PipelineSource]:
    """Weights, packed into an archive as they would be served.

    path: a recipe or its folder. weights: the file to take instead of the recipe's. Raises BadArchive, BadSettings
    or ToolError with one line.
    """
    from tools.archive.build import build_archive
    from tools.archive.recipe import load_recipe

    # Golden pictures say how one set of weights answers; these may be others.
    recipe = load_recipe(path).model_copy(update={"golden": []})
    with TemporaryDirectory(prefix="marina-") as folder:
        built = build_archive(recipe, Path(folder) / f"{recipe.name}.mar", weights)
        with archive_source(built.path) as source:
            yield source


class ServerSource:
    """A model of a running TorchServe. A request cannot ask for every class of a box, only for the best one."""

    setting = f"{RANKED_TEXT}, the best class of a box only, since a request cannot ask for more"
    serving = "as the server answers a request without options"
    classes: Sequence[str] | None = None

    def __init__(self, url: str, token: str | None):
        """url: of the model's predictions, such as http://127.0.0.1:8080/predictions/shapes."""
        self.name = url
        self._headers = {"Marina-Format": "detections", "Content-Type": "application/octet-stream"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def answers(self, pictures: Sequence[Picture], classes: Sequence[str]) -> Iterator[Answer]:
        import httpx

        index = {name: label for label, name in enumerate(classes)}
        pool = ThreadPoolExecutor(CONNECTIONS)
        with httpx.Client(headers=self._headers, timeout=TIMEOUT_S) as client:
            try:
                yield from pool.map(partial(self._answer, client, index), pictures)
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, client: "httpx.Client", index: dict[str, int], picture: Picture) -> Answer:
        body = picture_bytes(picture)
        answers = []
        for options in ({}, {"score_threshold": LOWEST_SCORE}, RANKED):
            headers = {f"Marina-{name.replace('_', '-').title()}": str(value) for name, value in options.items()}
            answer = self._ask(client, body, headers)
            if answer.status_code != 200:
                return _refused(self._refusal(answer))
            answers.append(answer)
        (served, foreign), (swept, _), (ranked, _) = (self._found(answer, index) for answer in answers)
        return Answer(ranked, swept, served, answers[0].json().get("timing_ms", {}), foreign)

    def _ask(self, client: "httpx.Client", body: bytes, headers: dict[str, str]) -> "httpx.Response":
        """Raises ToolError when the server cannot be asked or stays busy, which says nothing about the model."""
        import httpx

        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                answer = client.post(self.name, content=body, headers=headers)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise ToolError(f"{self.name} is no address of a model ({error}); give {EXAMPLE}") from error
            except httpx.TimeoutException as error:
                raise ToolError(f"{self.name} does not answer within {TIMEOUT_S} s; see the server's log") from error
            except httpx.TransportError as error:
                raise ToolError(
                    f"{self.name} cannot be reached ({error}); is the server up, the port right?"
                ) from error
            if answer.status_code != 503:
                return answer
        raise ToolError(f"{self.name} was busy {ATTEMPTS} times in a row (503); see the server's log")

    def _refusal(self, answer: "httpx.Response") -> str:
        """Why the model refuses a picture. Raises ToolError when it is something else that went wrong."""
        try:
            content = answer.json()
        except ValueError:
            content = None
        if isinstance(content, dict) and content.get("type") in REFUSALS:
            return str(content.get("message"))
        if answer.status_code == 413:
            return "the server takes no request of this size (413)"
        hint = ""
        if WRONG_KEY in answer.text:
            hint = "; give the server's token with --token-file"
        elif answer.status_code in (404, 405):
            hint = f"; give {EXAMPLE}"
        raise ToolError(f"{self.name} answers {answer.status_code}: {_short(answer)}{hint}")

    def _found(self, answer: "httpx.Response", index: dict[str, int]) -> tuple[Found, int]:
        try:
            rows = [(row["box"], row["label"], row["score"]) for row in answer.json()["detections"]]
            return in_set([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], index)
        except (KeyError, TypeError, ValueError) as error:
            raise ToolError(
                f"{self.name} does not answer in Marina's format `detections` ({_short(answer)}); only models that"
                " Marina built can be evaluated"
            ) from error


class PredictionsSource:
    """A list of results as COCO writes them: `image_id` and `category_id` as in the split's annotations, `bbox`
    x, y, width, height, and `score`. Nothing is known of serving: its defaults say from which score one counts."""

    setting = "all that the file has"
    serving = f"those of the file with a score above {Postprocess().score_threshold}"
    classes: Sequence[str] | None = None

    def __init__(self, path: Path):
        """Raises ToolError, naming the entry, for anything else."""
        self.name = str(path)
        try:
            self._results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ToolError(f"predictions {path} cannot be read ({error}); give a COCO list of results") from error
        if not isinstance(self._results, list):
            raise ToolError(f"predictions {path} are no list of results, as COCO has them")

    def answers(self, pictures: Sequence[Picture], classes: Sequence[str]) -> Iterator[Answer]:
        rows: list[list[tuple[list[float], int, float]]] = [[] for _ in pictures]
        for number, result in enumerate(self._results):
            try:
                picture, label, score = result["image_id"], result["category_id"] - 1, float(result["score"])
                x, y, width, height = map(float, result["bbox"])
                if not 1 <= picture <= len(pictures) or not 0 <= label < len(classes):
                    raise ValueError(f"the split has image_id 1 to {len(pictures)}, category_id 1 to {len(classes)}")
                if not all(map(math.isfinite, (x, y, width, height, score))):
                    raise ValueError("a number is not finite")
                rows[picture - 1].append(([x, y, x + width, y + height], label, score))
            except (KeyError, TypeError, ValueError) as error:
                raise ToolError(f"predictions {self.name}: entry {number} cannot be used ({error!r})") from error
        for each in rows:
            everything = found_of([row[0] for row in each], [row[1] for row in each], [row[2] for row in each])
            above = everything.scores > Postprocess().score_threshold
            served = Found(everything.boxes[above], everything.labels[above], everything.scores[above])
            yield Answer(everything, everything, served, {})


def in_set(
    boxes: Sequence[Sequence[float]], names: Sequence[str], scores: Sequence[float], index: dict[str, int]
) -> tuple[Found, int]:
    """Detections by class name to those in the data set's classes, and how many are of other classes."""
    known = [row for row, name in enumerate(names) if name in index]
    found = found_of(
        [boxes[row] for row in known], [index[names[row]] for row in known], [scores[row] for row in known]
    )
    return found, len(names) - len(known)


def picture_bytes(picture: Picture) -> bytes:
    """Raises ToolError when it cannot be read."""
    try:
        return picture.file.read_bytes()
    except OSError as error:
        raise ToolError(
            f"picture {picture.file} cannot be read ({error.strerror}); prepare the data set again"
        ) from error


def _refused(why: str) -> Answer:
    nothing = found_of([], [], [])
    return Answer(nothing, nothing, nothing, {}, refusal=why)


def _short(answer: "httpx.Response") -> str:
    return " ".join(answer.text.split())[:200] or "(empty)"
