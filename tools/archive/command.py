"""marina archive build | inspect | verify | diff | keygen | sign"""

import argparse
import json
from pathlib import Path

from tools.errors import ToolError
from tools.sign import command as signing

DEFAULT_STORE = Path("model-store")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = actions.add_parser("build", help="recipe to verified .mar")
    build.add_argument("recipe", type=Path, help="an archive.yaml, or its folder")
    build.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    build.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures, or a prepared data set: what int8 is fitted to, and what an engine's answers are compared on",
    )
    build.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        help="pictures, or a prepared data set (its splits valid and test): what `marina drift` compares traffic with",
    )
    build.add_argument(
        "--output", type=Path, metavar="FILE.mar", help=f"where to write it (default {DEFAULT_STORE}/NAME.mar)"
    )

    inspect = actions.add_parser("inspect", help="what is inside; runs nothing of it")
    inspect.add_argument("archive", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    signing.add_keys(inspect, "--key", "whose signature counts")

    verify = actions.add_parser("verify", help="check signature, names, checksums and golden answers again")
    verify.add_argument("archive", type=Path)
    signing.add_keys(verify, "--key", "refuse an archive that is not signed by one of them")

    diff = actions.add_parser("diff", help="two archives in the terms of the recipe; exits 1 when they differ")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)

    signing.add_arguments(actions)


def run(args: argparse.Namespace) -> int:
    actions = {"build": _build, "inspect": _inspect, "verify": _verify, "diff": _diff}
    actions |= {"keygen": signing.keygen, "sign": signing.sign}
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from tools.archive.dryload import CleanProcess

    # Before all else: importing torch takes longest.
    with CleanProcess() as process:
        from tools.archive.build import build_archive
        from tools.archive.recipe import load_recipe
        from tools.archive.sbom import write_sbom
        from tools.export.support import warn_untested

        recipe = load_recipe(args.recipe)
        warn_untested(recipe.runtime)
        output = args.output or DEFAULT_STORE / f"{recipe.name}.mar"
        if output.suffix != ".mar":
            raise ToolError(f"--output {output}: TorchServe takes no file with another ending than .mar; give FILE.mar")
        built = build_archive(recipe, output, args.weights, process, args.calibration, baseline=args.baseline)
        sbom = write_sbom(built.path)
    for note in built.notes:
        print(f"note: {note}")
    found = sum(len(answer["detections"]) for answer in built.answers)
    print(f"{built.path}: {built.size:,} bytes; {len(built.answers)} golden pictures answered, {found} detections")
    print(f"{sbom}: what it is made of")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from tools.archive.inspect import as_table, inspect_archive

    report = inspect_archive(args.archive, signing.trusted_keys(args.keys))
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else as_table(report))
    return int(report["signature"]["state"] == "refused")


def _verify(args: argparse.Namespace) -> int:
    from tools.archive.verify import verify_archive

    # Before anything of the archive is opened: the golden answers are given by its own code.
    signed = signing.check_signatures([args.archive], args.keys)
    report = verify_archive(args.archive)
    report.known[:0] = signed
    if not signed:
        report.unknown.append("who has signed it, for want of --key")
    for line in report.known:
        print(f"ok       {line}")
    for line in report.unknown:
        print(f"unknown  {line}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from tools.archive.diff import diff_archives

    lines = diff_archives(args.old, args.new)
    print("\n".join(lines) if lines else "the archives say the same")
    return 1 if lines else 0
