"""marina pipeline run | check | gate | recipe | tekton"""

import argparse
from pathlib import Path

from tools.errors import ToolError

FOLDER = Path("pipelines")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    run = actions.add_parser("run", help="data set in the store to a promoted archive, on this machine")
    run.add_argument("file", type=Path, metavar="FILE.yaml", help="the parameters; `tekton` shows them all")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="instead of the file's; may be given often"
    )
    run.add_argument("--folder", type=Path, metavar="DIR", help=f"to work in (default: {FOLDER}/FILE)")
    run.add_argument("--resume", action="store_true", help="go on after the last step that ended well")

    actions.add_parser("check", help="for the step scripts: whether the parameters in the environment are right")

    gate = actions.add_parser("gate", help="for the step scripts: whether a run reached what is required")
    gate.add_argument("run", type=Path, help="folder of the run")
    gate.add_argument("--evaluation", type=Path, required=True, metavar="DIR", help="what `marina evaluate` wrote")
    gate.add_argument("--require", required=True, metavar="FIGURE=NUMBER,…", help="what must be reached")

    gate.add_argument("--live", type=Path, metavar="DIR", help="the same of the model that serves now")
    gate.add_argument("--live-drop", type=float, default=0.0, metavar="NUMBER", help="how much lower mAP50 may be")

    recipe = actions.add_parser("recipe", help="for the step scripts: another version or engine in a run's recipe")
    recipe.add_argument("run", type=Path, help="folder of the run")
    recipe.add_argument("--version", help="digits and dots")
    recipe.add_argument("--backend", help="what executes the network")

    actions.add_parser("tekton", help="write the Tasks and the Pipeline, as docker/tekton/pipeline.yaml has them")


def run(args: argparse.Namespace) -> int:
    return {"run": _run, "check": _check, "gate": _gate, "recipe": _recipe, "tekton": _tekton}[args.action](args)


def _run(args: argparse.Namespace) -> int:
    from tools.pipeline.parameters import read_parameters
    from tools.pipeline.run import run_pipeline

    parameters = read_parameters(args.file, args.set)
    folder = args.folder or FOLDER / args.file.stem
    state = run_pipeline(parameters, folder, args.resume)
    if state.failed:
        raise ToolError(f"step {state.failed} failed: {state.reason}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from tools.pipeline.parameters import check

    print(check())
    return 0


def _gate(args: argparse.Namespace) -> int:
    from tools.pipeline.gate import check_gate, check_live

    lines = [check_gate(args.run, args.evaluation, args.require).line()]
    if args.live:
        lines.append(check_live(args.evaluation, args.live, args.live_drop))
    print(f"the gate is passed: {'; '.join(lines)}")
    return 0


def _recipe(args: argparse.Namespace) -> int:
    from tools.pipeline.recipe import change_recipe

    change_recipe(args.run, args.version, args.backend)
    return 0


def _tekton(args: argparse.Namespace) -> int:
    from tools.pipeline.tekton import documents

    print(documents(), end="")
    return 0
