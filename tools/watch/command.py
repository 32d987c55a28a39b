"""marina drift ARCHIVE --metrics URL | --pictures FOLDER"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from handlers.baseline import Baseline
    from tools.watch.drift import Counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, help="a .mar that was built with --baseline")
    traffic = parser.add_mutually_exclusive_group(required=True)
    traffic.add_argument(
        "--metrics", metavar="URL", help="what a server has seen that serves it, as http://127.0.0.1:8082/metrics"
    )
    traffic.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="pictures, or a prepared data set (its splits valid and test), which the archive answers here",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="with --metrics: look twice, so far apart, and compare what came between (default: all since its start)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="INDEX",
        help="exit with 1 where a quantity has drifted and its index is above this, or nothing can be said; 0.1 is"
        " moderate, 0.25 large",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 for drift that is not to be, else 0."""
    from tools.errors import ToolError
    from tools.watch.drift import as_document, as_table, compare, is_told

    if args.fail_above is not None and not args.fail_above >= 0:
        raise ToolError(f"--fail-above {args.fail_above:g}: give 0 or more")

    baseline, counts = _compared(args)
    shifts = compare(baseline, counts)
    if args.json:
        print(json.dumps(as_document(baseline, counts, shifts), indent=2, ensure_ascii=False))
    else:
        print(as_table(baseline, counts, shifts))
    if args.fail_above is None:
        return 0
    if not is_told(shifts):
        raise ToolError("too few pictures to say anything; look again when there are more")
    return int(any(shift.drifted and (shift.index or 0) > args.fail_above for shift in shifts))


def _compared(args: argparse.Namespace) -> "tuple[Baseline, Counts]":
    from handlers.baseline import BASELINE, parse_baseline
    from tools.archive.reader import open_archive
    from tools.errors import ToolError
    from tools.watch.looks import counted, find_pictures
    from tools.watch.server import watched

    if args.seconds < 0 or (args.seconds and args.pictures):
        raise ToolError(f"--seconds {args.seconds:g}: give 0 or more, and with --metrics alone")
    with open_archive(args.archive) as archive:
        if BASELINE not in archive.names():
            raise ToolError(f"{args.archive} has no baseline; build it with: marina archive build ... --baseline DIR")
        baseline = parse_baseline(archive.read(BASELINE))
        if not baseline.quantities:
            raise ToolError(
                f"{args.archive}: {baseline.pictures} pictures are too few for a baseline; build it with more"
            )
        if args.metrics:
            return baseline, watched(args.metrics, archive.name, archive.version, baseline, args.seconds)
    return baseline, counted(args.archive, baseline, find_pictures(args.pictures, "--pictures"))
