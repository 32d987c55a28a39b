"""marina evaluate MODEL --data SET | marina evaluate compare BEFORE AFTER"""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tools.errors import ToolError

if TYPE_CHECKING:
    from tools.data.dataset import Dataset
    from tools.evaluate.sources import Source

USAGE = """marina evaluate MODEL --data SET [--weights FILE]
       marina evaluate --url URL --data SET [--token-file FILE]
       marina evaluate --predictions FILE.json --data SET
       marina evaluate compare BEFORE AFTER"""
COMPARE = "compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODEL",
        help="a .mar file; or a recipe, or a folder with one, whose weights are packed first; or `compare` and two"
        " folders that --output or a training run made",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    parser.add_argument("--url", help="of a model on a server, as http://127.0.0.1:8080/predictions/NAME")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the server's token")
    parser.add_argument("--predictions", type=Path, metavar="FILE.json", help="a COCO list of results")
    parser.add_argument("--data", type=Path, metavar="SET", help="a data set, as `marina data prepare` makes it")
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), help="default: test, or valid where there is none"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a folder for the figures and a page of them; takes the place of an earlier evaluation",
    )
    parser.add_argument(
        "--save-predictions", type=Path, metavar="FILE.json", help="write the detections as a COCO list of results"
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="FIGURE=NUMBER",
        help="exit with 1 unless it is reached, e.g. map50=0.8, f2=0.75, ap50:cat=0.6; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 when a required figure is not reached."""
    if args.what[:1] == [COMPARE]:
        return _compare(args)
    return _evaluate(args)


def _compare(args: argparse.Namespace) -> int:
    from tools.evaluate.compare import as_table, compare, read_result

    paths = args.what[1:]
    others = [name for name, value in vars(args).items() if name not in ("command", "what") and value]
    if len(paths) != 2 or others:
        raise ToolError("compare takes two evaluations, as --output or a training run made them, and no options")
    before, after = (read_result(Path(path)) for path in paths)
    print(as_table(before, after, compare(before, after)))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from tools.data.dataset import read_dataset
    from tools.evaluate.evaluation import coco_results, evaluate
    from tools.evaluate.gates import failures, parse_gates
    from tools.evaluate.table import as_table

    if args.data is None:
        raise ToolError("say on which data set: --data SET, a folder that `marina data prepare` made")
    dataset = read_dataset(args.data)
    split = args.split or _default_split(dataset)
    dataset.split(split)  # raises now rather than after the model is loaded
    gates = parse_gates(args.require, dataset.classes)
    if args.output:
        from tools.evaluate.report import check_output, write_report

        check_output(args.output)
    with _source(args) as source:
        evaluation = evaluate(source, dataset, split)
    print(as_table(evaluation))
    if args.save_predictions:
        _write_json(args.save_predictions, coco_results(evaluation))
    if args.output:
        write_report(evaluation, args.output)
    failed = failures(gates, evaluation.values())
    for line in failed:
        print(f"marina: {line}", file=sys.stderr)
    return 1 if failed else 0


def _default_split(dataset: "Dataset") -> str:
    return "test" if dataset.splits.get("test") else "valid"


def _source(args: argparse.Namespace) -> "AbstractContextManager[Source]":
    from tools.evaluate.sources import PredictionsSource, ServerSource, archive_source, recipe_source

    given = [name for name in ("what", "url", "predictions") if getattr(args, name)]
    if len(given) != 1 or len(args.what) > 1:
        raise ToolError("name one thing to evaluate: a MODEL, --url or --predictions")
    if args.weights and (not args.what or args.what[0].endswith(".mar")):
        raise ToolError("--weights goes with a recipe; an archive, a server and predictions have theirs")
    if args.token_file and not args.url:
        raise ToolError("--token-file goes with --url")
    if args.predictions:
        return nullcontext(PredictionsSource(args.predictions))
    if args.url:
        return nullcontext(ServerSource(args.url, _token(args.token_file)))
    model = Path(args.what[0])
    if not model.exists():
        raise ToolError(f"{model} is not there; give a .mar file, a recipe or a folder with one")
    if model.is_file() and model.suffix not in (".mar", ".yaml", ".yml"):
        raise ToolError(f"{model} is no archive and no recipe; for weights: marina evaluate RECIPE --weights {model}")
    return archive_source(model) if model.suffix == ".mar" else recipe_source(model, args.weights)


def _token(path: Path | None) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() if path else None
    except OSError as error:
        raise ToolError(f"token file {path} cannot be read ({error.strerror})") from error


def _write_json(path: Path, content: object) -> None:
    from tools.checkpoint.safetensors_format import replacing

    try:
        with replacing(path) as file:
            file.write((json.dumps(content) + "\n").encode())
    except OSError as error:
        raise ToolError(f"{path} cannot be written ({error.strerror}); name another file") from error
