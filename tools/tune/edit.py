"""`runtime` and `serving` of an archive.yaml, changed in its text, so that all else stays as its author wrote it.

The places come from PyYAML's own parser; the result is parsed again and must differ in nothing but the two sections.
"""

import math
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import yaml

from handlers.settings import Runtime
from tools.archive.recipe import Recipe, Serving
from tools.checkpoint.safetensors_format import replacing
from tools.errors import ToolError
from tools.strict import parse

MARK = "# marina tune:"
# The values of both sections are numbers and words, so that this cannot stand in one of them.
COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.MULTILINE)


def check_editable(recipe: Recipe) -> None:
    """Raises ToolError for a recipe that `write_winner` would not be able to change."""
    for path in (recipe.path, recipe.path.parent):
        if not os.access(path, os.W_OK):
            raise ToolError(f"{path} cannot be written, where the winner has to go; make it writable, or tune a copy")
    edited(recipe, recipe.runtime, recipe.serving, "")


def write_winner(recipe: Recipe, runtime: Runtime, serving: Serving, evidence: str) -> None:
    """Change the recipe's file. evidence: one line, which becomes a comment above `runtime`; an earlier one goes.

    Raises ToolError when it cannot be changed.
    """
    text = edited(recipe, runtime, serving, evidence)
    try:
        with replacing(recipe.path) as file:
            file.write(text.encode())
            shutil.copymode(recipe.path, file.name)
    except OSError as error:
        raise ToolError(f"recipe {recipe.path} cannot be written ({error.strerror})") from error


def edited(recipe: Recipe, runtime: Runtime, serving: Serving, evidence: str) -> str:
    """The text of the recipe's file with other sections. Raises ToolError when that would say anything else too."""
    sections = {"runtime": _runtime_section(runtime), "serving": serving.model_dump(exclude_unset=True)}
    wanted = recipe.model_copy(update={"runtime": runtime, "serving": serving}).model_dump()
    try:
        text = with_sections(recipe.path.read_bytes().decode(), sections, evidence)
        same = parse(Recipe, yaml.safe_load(text)).model_dump() == wanted
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _beyond_edit(recipe, str(error)) from error
    if not same:
        raise _beyond_edit(recipe, "other keys would change with them")
    return text


def _beyond_edit(recipe: Recipe, reason: str) -> ToolError:
    return ToolError(
        f"runtime and serving of recipe {recipe.path} cannot be replaced: {reason}; write each as"
        " `key: {name: value, …}` on a line of its own"
    )


def _runtime_section(runtime: Runtime) -> dict[str, Any]:
    fixed = {"shape": runtime.shape} if runtime.shape == "fixed" else {}
    return {"backend": runtime.backend, "precision": runtime.precision, **fixed}


def with_sections(text: str, sections: Mapping[str, Mapping[str, Any]], evidence: str) -> str:
    """YAML text with the sections replaced where they stand, or put at its end, in the flow style.

    Comments inside of a section go above it. Raises ValueError or YAMLError for text that is not laid out for it.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ValueError("the file is no block of lines, `key: value` each")
    newline = "\r\n" if "\r\n" in text else "\n"
    between = newline + " " * root.start_mark.column
    remarks = {"runtime": [f"{MARK} {evidence}"]} if evidence else {}
    places = {key.value: (key.start_mark.index, _end(value)) for key, value in root.value if key.value in sections}
    # From the end on, so that the places before it stay where they are.
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1], reverse=True):
        if end < start:
            raise ValueError(f"{name} is an alias")
        before = text[:start]
        if evidence and name == "runtime":
            before = _without_remark(before, between)
        comments = [comment.rstrip() for comment in COMMENT.findall(text[start:end])]
        text = before + between.join([*comments, *remarks.get(name, []), _line(name, sections[name])]) + text[end:]
    for name in (name for name in sections if name not in places):
        lines = between.join(["", *remarks.get(name, []), _line(name, sections[name])])
        text = text.removesuffix(newline) + lines + newline
    return text


def _line(name: str, section: Mapping[str, Any]) -> str:
    content = yaml.safe_dump(dict(section), default_flow_style=True, sort_keys=False, width=math.inf)
    return f"{name}: {content.strip()}"


def _without_remark(before: str, between: str) -> str:
    """The text without its last whole line, if that is one of ours."""
    head, separator, remark = before.removesuffix(between).rpartition(between)
    return head + separator if remark.startswith(MARK) else before


def _end(node: yaml.Node) -> int:
    """Where its last value ends; the mark of a block lies behind the comments that follow."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    return node.end_mark.index
