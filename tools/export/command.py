"""marina export RECIPE --output FOLDER"""

import argparse
from pathlib import Path
from typing import get_args

from handlers.errors import BadSettings
from handlers.settings import Backend, Precision, Runtime
from tools.errors import ToolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="an archive.yaml, or its folder")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    backends = [name for name in get_args(Backend) if name != "torch"]
    parser.add_argument("--backend", choices=backends, help="the engine to write for (default: the recipe's)")
    parser.add_argument("--precision", choices=get_args(Precision), help="(default: the recipe's, or fp32)")
    parser.add_argument("--shape", choices=("dynamic", "fixed"), help="(default: the recipe's, or dynamic)")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="pictures, or a prepared data set, that int8 is fitted to"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", required=True, help="for the network's files and network.json"
    )


def run(args: argparse.Namespace) -> int:
    from tools.archive.recipe import load_recipe
    from tools.export.bare import write_network
    from tools.export.support import warn_untested

    recipe = load_recipe(args.recipe)
    given = {key: getattr(args, key) for key in ("backend", "precision", "shape") if getattr(args, key)}
    try:
        runtime = Runtime(**(vars(recipe.runtime) | given))
    except ValueError as error:
        raise BadSettings(f"runtime: {error}") from error
    if runtime.backend == "torch":
        raise ToolError(f"recipe {recipe.path} runs in torch, which needs no export; name an engine with --backend")
    warn_untested(runtime)
    recipe = recipe.model_copy(update={"runtime": runtime, "golden": []})
    written = write_network(recipe, args.weights, args.calibration, args.output)
    total = sum(path.stat().st_size for path in written)
    print(f"{args.output}: {', '.join(path.name for path in written)}, {total:,} bytes")
    return 0
