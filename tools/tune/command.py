"""marina tune RECIPE --slo p99=150ms

marina tune archives/yolov5n-coco --weights yolov5n.pt --image bus.jpg --calibration photos --slo p50=100ms p99=150ms
"""

import argparse
import sys
from pathlib import Path

from handlers.settings import PRECISIONS
from tools.bench.command import positive

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="an archive.yaml, or its folder; gets the winner")
    parser.add_argument(
        "--slo",
        nargs="+",
        required=True,
        metavar="PERCENTILE=MS",
        help="latencies to keep, as p99=150ms; of the settings that do, the one with the most images/s wins",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures to send in turn; default: the recipe's first golden picture as a 640x480 JPEG",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="pictures that int8 is fitted to and answers are compared on"
    )
    parser.add_argument("--connections", type=positive, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=positive, default=8, metavar="S", help="of load a trial; default: %(default)s"
    )
    parser.add_argument(
        "--budget", default="20m", metavar="TIME", help="for trials, as 90s or 1h; default: %(default)s"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=list(PRECISIONS),
        metavar="NAME",
        help=f"of {', '.join(PRECISIONS)}; default: those that are installed, aoti apart, which compiles for a minute",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="the trials; default: tuning.json by the recipe"
    )


def run(args: argparse.Namespace) -> int:
    from tools.tune.objective import parse_budget, parse_slo
    from tools.tune.run import Order, tune

    order = Order(
        recipe=args.recipe,
        slos=[parse_slo(text) for text in args.slo],
        weights=args.weights,
        images=args.image,
        calibration=args.calibration,
        connections=args.connections,
        seconds=args.seconds,
        budget_s=parse_budget(args.budget),
        backends=args.backends,
        output=args.output,
    )
    try:
        tune(order, print)
    except KeyboardInterrupt:
        print("marina: interrupted; the same command goes on after the last finished trial", file=sys.stderr)
        return INTERRUPTED
    return 0
