"""`marina doctor`: one line a finding, with the mend."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, nargs="?", help="an archive (.mar) or a recipe to look at too")
    parser.add_argument(
        "--store", type=Path, default=Path("model-store"), metavar="DIR", help="the model store (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings as they come. Returns 1 if something is broken, else 0."""
    from tools.doctor.checks import examine

    broken = 0
    for finding in examine(args.store, args.target):
        print(finding, flush=True)
        broken += finding.level == "broken"
    return 1 if broken else 0
