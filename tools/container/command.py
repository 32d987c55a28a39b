"""marina image bake | sbom"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    bake = actions.add_parser("bake", help="the serving image with archives inside, for places that mount nothing")
    bake.add_argument("store", type=Path, metavar="STORE", help="the folder of .mar files")
    bake.add_argument("--tag", required=True, metavar="NAME", help="of the new image")
    bake.add_argument("--base", default="marina/serve", metavar="IMAGE", help="default: %(default)s")

    sbom = actions.add_parser("sbom", help="what an image is made of, as CycloneDX 1.6")
    sbom.add_argument("image", metavar="IMAGE", help="of the container engine that runs")
    sbom.add_argument("--output", type=Path, required=True, metavar="FILE", help="such as serve.cdx.json")


def run(args: argparse.Namespace) -> int:
    return {"bake": _bake, "sbom": _sbom}[args.action](args)


def _bake(args: argparse.Namespace) -> int:
    from tools.container.bake import bake
    from tools.container.engine import running_engine

    archives = bake(running_engine(), args.store, args.tag, args.base)
    print(f"{args.tag}: {args.base} with {', '.join(map(str, archives))}")
    return 0


def _sbom(args: argparse.Namespace) -> int:
    from tools.container.engine import running_engine
    from tools.container.sbom import sbom_of
    from tools.cyclonedx import write_document

    write_document(args.output, sbom_of(running_engine(), args.image))
    print(f"{args.output}: what {args.image} is made of")
    return 0
