"""The recipe, `archive.yaml`: one file that says everything about an archive."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from handlers.errors import BadSettings
from handlers.settings import Capture, Limits, Model, Postprocess, Preprocess, Response, Runtime
from tools.strict import Strict, parse, read_yaml

NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Weights(Strict):
    """file: beside the recipe, or `s3://` or `https://` with a sha256. source: where to get a file that does
    not lie there, for people."""

    file: str
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    source: str | None = None

    @model_validator(mode="after")
    def _remote_needs_checksum(self) -> "Weights":
        if is_remote(self.file) and self.sha256 is None:
            raise ValueError(f"{self.file} is fetched over a network: give its sha256")
        return self


class GoldenEntry(Strict):
    """image: a picture. detections: the answer it must get, as JSON of format `detections`; without one, the
    answer at build is what the archive must keep giving."""

    image: str
    detections: str | None = None


class Serving(Strict):
    """How TorchServe runs the archive; times in milliseconds and seconds as the names say.

    batch_size: left out, 8 with device gpu and else 1, for TorchServe makes every batch that is not full wait.
    """

    min_workers: int = Field(1, ge=1, le=256)
    max_workers: int = Field(1, ge=1, le=256)
    batch_size: int | None = Field(None, ge=1, le=1024)
    max_batch_delay_ms: int = Field(5, ge=1, le=60_000)
    response_timeout_s: int = Field(60, ge=1, le=86_400)
    device: Literal["auto", "cpu", "gpu"] = "auto"

    @model_validator(mode="after")
    def _order(self) -> "Serving":
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers is {self.max_workers}, less than min_workers {self.min_workers}")
        return self


class Parity(Strict):
    """How far the answers may be from those of torch in fp32; `tools.export.parity` says what each means. What is left
    out follows from the precision."""

    min_iou: float | None = Field(None, ge=0, le=1)
    max_score_difference: float | None = Field(None, ge=0, le=1)
    max_gained: float | None = Field(None, ge=0, le=100)
    max_lost: float | None = Field(None, ge=0, le=100)
    max_map_drop: float | None = Field(None, ge=0, le=1)


class Recipe(Strict):
    name: str = Field(pattern=NAME)
    version: str = Field(pattern=r"^[0-9]+(\.[0-9]+)*$")
    license: str
    model: Model
    weights: Weights
    labels: str = "index_to_name.json"
    preprocess: Preprocess = Preprocess()
    postprocess: Postprocess = Postprocess()
    limits: Limits = Limits()
    response: Response = Response()
    runtime: Runtime = Runtime()
    parity: Parity = Parity()
    serving: Serving = Serving()
    golden: list[GoldenEntry] = Field(default_factory=list)
    capture: Capture | None = None

    _path: Path = PrivateAttr()

    @property
    def path(self) -> Path:
        return self._path

    def beside(self, reference: str) -> Path:
        """A file that the recipe names."""
        return self._path.parent / reference


def is_remote(reference: str) -> bool:
    return reference.startswith(("s3://", "https://"))


def load_recipe(path: Path) -> Recipe:
    """Parse a recipe, given the file or its folder, and see that the files it names are there (the weights
    apart, which may lie elsewhere). Raises BadSettings with one line."""
    if path.is_dir():
        path = path / "archive.yaml"
    try:
        content = read_yaml(path, "recipe")
    except ValueError as error:
        raise BadSettings(f"{error}; give an archive.yaml") from error
    try:
        recipe = parse(Recipe, content)
    except ValueError as error:
        raise BadSettings(f"recipe {path}: {error}") from error
    recipe._path = path.resolve()
    named = [recipe.labels]
    for golden in recipe.golden:
        named += [golden.image] + ([golden.detections] if golden.detections else [])
    for reference in named:
        if not recipe.beside(reference).is_file():
            raise BadSettings(f"recipe {path} names {reference!r}, but {recipe.beside(reference)} is not there")
    return recipe
