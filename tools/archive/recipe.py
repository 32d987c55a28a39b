"""The recipe, `archive.yaml`: one file that says everything about an archive."""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from handlers.errors import BadSettings
from handlers.settings import Limits, Model, Postprocess, Preprocess, Response, Runtime

NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
    """How TorchServe runs the archive; times in milliseconds and seconds as the names say."""

    min_workers: int = Field(1, ge=1, le=256)
    max_workers: int = Field(1, ge=1, le=256)
    batch_size: int = Field(8, ge=1, le=1024)
    max_batch_delay_ms: int = Field(5, ge=1, le=60_000)
    response_timeout_s: int = Field(60, ge=1, le=86_400)
    device: Literal["auto", "cpu", "gpu"] = "auto"

    @model_validator(mode="after")
    def _order(self) -> "Serving":
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers is {self.max_workers}, less than min_workers {self.min_workers}")
        return self


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
    serving: Serving = Serving()
    golden: list[GoldenEntry] = []

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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSettings(f"recipe {path} cannot be read ({error.strerror}); give an archive.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSettings(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadSettings(f"recipe {path} is no mapping of keys to values")
    try:
        # By way of JSON, so that strict types still let a mapping become a section.
        recipe = Recipe.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise BadSettings(f"recipe {path}: {_first_problem(error)}") from error
    recipe._path = path.resolve()
    named = [recipe.labels]
    for golden in recipe.golden:
        named += [golden.image] + ([golden.detections] if golden.detections else [])
    for reference in named:
        if not recipe.beside(reference).is_file():
            raise BadSettings(f"recipe {path} names {reference!r}, but {recipe.beside(reference)} is not there")
    return recipe


def _first_problem(error: ValidationError) -> str:
    # A key that nobody knows explains another that is missing.
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in unknown)
    first = problems[0]
    where = ".".join(map(str, first["loc"])) or "recipe"
    if first["type"] in unknown:
        *section, key = first["loc"]
        close = difflib.get_close_matches(str(key), _keys(section), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(_keys(section))}"
        text = f"{where}: unknown key; {hint}"
    elif first["type"] == "missing":
        text = f"{where}: missing"
    else:
        text = f"{where}: {first['msg'].removeprefix('Value error, ')} (it is {_shown(first['input'])})"
    return text + (f"; and {len(problems) - 1} more" if len(problems) > 1 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys(section: list[int | str]) -> list[str]:
    """The keys that a section of the recipe may have."""
    kind: Any = Recipe
    for part in section:
        if isinstance(part, int):
            continue
        kind = kind.model_fields[part].annotation
        kind = getattr(kind, "__args__", [kind])[0]
    names = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
    return list(names)
