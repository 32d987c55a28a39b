"""Schemas of files that people write, and one clear line for what is wrong in them."""

import difflib
import json
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class Strict(BaseModel):
    """No unknown key, no value of another type, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Kind = TypeVar("Kind", bound=Strict)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError with one line; `what` names the file in it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path} is no mapping of keys to values")
    return content


def parse(kind: type[Kind], content: dict[str, Any]) -> Kind:
    """Raises ValueError with one line that names the key, the value and, for an unknown key, the nearest one."""
    try:
        # By way of JSON, so that strict types still let a mapping become a section.
        return kind.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ValueError(first_problem(kind, error)) from error


def first_problem(kind: type[BaseModel], error: ValidationError) -> str:
    """The first of the problems in one line; a key that nobody knows goes before another that is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN)
    first = problems[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] in UNKNOWN:
        *section, key = first["loc"]
        known = _keys(kind, section)
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        text = f"{where}: unknown key; {hint}"
    elif first["type"] == "missing":
        description = _description(kind, first["loc"])
        text = f"{where}: missing" + (f"; it is: {description}" if description else "")
    elif first["type"] == "string_pattern_mismatch" and (description := _description(kind, first["loc"])):
        text = f"{where}: {_shown(first['input'])} does not fit; it is: {description}"
    elif first["type"] == "string_type" and isinstance(first["input"], int | float):
        text = f"{where}: {_shown(first['input'])} is a number where text belongs; put it in quotes"
    else:
        message = first["msg"].removeprefix("Value error, ")
        # What concerns the whole names the values that it is about.
        text = f"{where}: {message} (it is {_shown(first['input'])})" if where else message
    return text + (f"; and {len(problems) - 1} more to mend" if len(problems) > 1 else "")


def _description(kind: type[BaseModel], place: tuple[int | str, ...]) -> str | None:
    """Of a key that lies in no section: for people, where a pattern is none."""
    return kind.model_fields[str(place[0])].description if len(place) == 1 else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys(kind: Any, section: list[int | str]) -> list[str]:
    """The keys that a section may have."""
    for part in section:
        if isinstance(part, int):
            continue
        fields = getattr(kind, "model_fields", None)
        kind = fields[part].annotation if fields else get_type_hints(kind)[part]
        if get_origin(kind) in (list, Union, UnionType):
            kind = get_args(kind)[0]
    names = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
    return list(names)
