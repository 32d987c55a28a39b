"""marina image bake"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    bake = actions.add_parser("bake", help="the serving image with archives inside, for places that mount nothing")
    bake.add_argument("store", type=Path, metavar="STORE", help="the folder of .mar files")
    bake.add_argument("--tag", required=True, metavar="NAME", help="of the new image")
    bake.add_argument("--base", default="marina/serve", metavar="IMAGE", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from tools.container.bake import bake
    from tools.container.engine import running_engine

    archives = bake(running_engine(), args.store, args.tag, args.base)
    print(f"{args.tag}: {args.base} with {', '.join(map(str, archives))}")
    return 0
