"""marina data prepare | export | show | draw | fetch"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

ACTIONS = {
    "prepare": ("tools.data.prepare", "labelled pictures in any form to a checked, split data set"),
    "export": ("tools.data.export", "a data set to YOLO or Pascal VOC"),
    "show": ("tools.data.show", "the pictures of a data set with their boxes"),
    "draw": ("tools.data.drawn_set", "a data set of drawn shapes, which needs no download"),
    "fetch": ("tools.data.openimages", "pictures and labels of some classes of Open Images"),
}


class _LateParser(argparse.ArgumentParser):
    """Its flags come from a module that is imported when the subcommand is called, so the others cost nothing."""

    module = ""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # one overload of three: argparse calls no other
        import_module(self.module).add_arguments(self)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_LateParser)
    for name, (module, help_line) in ACTIONS.items():
        actions.add_parser(name, help=help_line).module = module


def run(args: argparse.Namespace) -> int:
    return int(import_module(ACTIONS[args.action][0]).run(args))
