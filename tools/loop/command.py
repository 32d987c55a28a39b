"""marina loop FILE.yaml"""

import argparse
from pathlib import Path

from tools.errors import ToolError
from tools.labelstudio.command import add_project

FOLDER = Path("loops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE.yaml",
        help="the parameters of a pipeline, whose `dataset` is what annotations are added to; without `live` the run"
        " MODEL_NAME@production",
    )
    add_project(parser)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="instead of the file's; may be given often"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help=f"to work in (default: {FOLDER}/FILE)")
    parser.add_argument(
        "--every", type=float, metavar="HOURS", help="go round again and again; a round that fails does not end it"
    )


def run(args: argparse.Namespace) -> int:
    from tools.labelstudio.client import connect
    from tools.loop.loop import Loop, again_and_again
    from tools.pipeline.parameters import read_parameters

    if args.every is not None and not args.every > 0:
        raise ToolError(f"--every {args.every:g}: give hours above 0")
    loop = Loop(read_parameters(args.file, args.set), args.project, args.folder or FOLDER / args.file.stem)

    def go_round() -> None:
        with connect(args.url, args.token_file) as studio:
            loop.go_round(studio)

    if args.every is None:
        go_round()
    else:
        again_and_again(go_round, args.every * 3600)
    return 0
