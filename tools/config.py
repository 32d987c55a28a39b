"""Settings of a command: flags over a section of a YAML file over the defaults.

One schema gives the flags, the keys of the file and the record of what a run was made with. A path in the
file is relative to the file, a path on the command line to the working folder.
"""

import argparse
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tools.errors import ToolError
from tools.strict import Kind, Strict, parse, read_yaml


def add_flags(parser: argparse.ArgumentParser, kind: type[Strict], section: str) -> None:
    """`--config FILE`, and a flag for every field of `kind`: its name with dashes, its description as help."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help=f"settings from the section `{section}` of this file"
    )
    for name, field in kind.model_fields.items():
        base, many = _base(field.annotation)
        default = "" if field.is_required() or field.default in (None, [], ()) else f" (default {field.default})"
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        options["help"] = ((field.description or "") + default).replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if base is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if get_origin(base) is Literal:
            options["choices"] = get_args(base)
        else:
            options["type"] = base
            options["metavar"] = base.__name__.upper()
        parser.add_argument(flag, nargs="+" if many else None, **options)


def settle(args: argparse.Namespace, kind: type[Kind], section: str) -> Kind:
    """What the flags and the file say together. Raises ToolError with one line, naming file and key."""
    content: dict[str, Any] = {}
    if args.config is not None:
        try:
            document = read_yaml(args.config, "config")
        except ValueError as error:
            raise ToolError(str(error)) from error
        try:
            content = dict(document.get(section) or {})
            for name in content:
                if name in kind.model_fields:
                    content[name] = _resolve(kind.model_fields[name].annotation, content[name], args.config.parent)
            parse(kind, content | _given(args, kind))
        except ValueError as error:
            raise ToolError(f"config {args.config}, section {section}: {error}") from error
    try:
        return parse(kind, content | _given(args, kind))
    except ValueError as error:
        raise ToolError(str(error)) from error


def _given(args: argparse.Namespace, kind: type[Strict]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in kind.model_fields if hasattr(args, name)}


def _base(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several: `list[X]`, `X | None`."""
    many = False
    while get_origin(annotation) in (list, tuple, Union, UnionType):
        many = many or get_origin(annotation) in (list, tuple)
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return getattr(annotation, "__origin__", annotation) if get_origin(annotation) is not Literal else annotation, many


def _resolve(annotation: Any, value: Any, folder: Path) -> Any:
    if _base(annotation)[0] is not Path or value is None:
        return value
    if isinstance(value, list):
        return [_resolve(Path, item, folder) for item in value]
    return folder / str(value)
