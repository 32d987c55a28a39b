"""marina bench handler | serve | engines | peers | protocols | build

marina bench handler model-store/yolov5n-coco.mar
marina bench serve model-store/yolov5n-coco.mar --image bus.jpg --concurrency 1 4 16
marina bench engines archives/yolov5n-coco --weights yolov5n.pt --calibration photos --threads 2
marina bench peers archives/yolov5n-coco --weights yolov5n.pt --image bus.jpg --chart peers.png
marina bench protocols model-store/yolov5n-coco.mar --image photos/*.jpg --report protocols.json
marina bench build archives/fasterrcnn-oxford-pets --weights pets.pth --report build.json
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handlers.settings import PRECISIONS
from tools.errors import ToolError
from tools.serve import ENGINES as SERVE_ENGINES

ENGINES = ("torch", "onnx", "openvino", "aoti")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_handler(actions.add_parser("handler", help="stage by stage, what the handler adds to the forward pass"))
    _add_serve(actions.add_parser("serve", help="a server under load, beside what its engine can do without one"))
    _add_engines(actions.add_parser("engines", help="every engine that can run a recipe's network, side by side"))
    _add_peers(actions.add_parser("peers", help="TorchServe as it comes, FastAPI, LitServe and mosec, beside ours"))
    _add_protocols(actions.add_parser("protocols", help="every way to ask over the network, with the same pictures"))
    _add_build(actions.add_parser("build", help="seconds and memory of `archive build`, beside torch-model-archiver"))


def _add_handler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path)
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="default: the archive's first golden picture as a 640x480 JPEG"
    )
    parser.add_argument("--runs", type=positive, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="and cores; default: %(default)s")
    _add_output(parser, chart=False)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, nargs="?", help="served for the time of the measurement")
    parser.add_argument(
        "--engine",
        choices=SERVE_ENGINES,
        default=SERVE_ENGINES[0],
        help="what serves ARCHIVE, as of `marina serve`; default: %(default)s",
    )
    parser.add_argument("--url", help="instead: a model on a server, as http://127.0.0.1:8080/predictions/NAME")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token of the server at --url")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures to send in turn; default: the archive's first golden picture as a 640x480 JPEG",
    )
    parser.add_argument(
        "--concurrency", type=positive, nargs="+", default=[1, 4, 16], metavar="N", help="connections; default: 1 4 16"
    )
    _add_seconds(parser)
    _add_output(parser)


def _add_engines(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=list(PRECISIONS),
        default=list(ENGINES),
        metavar="NAME",
        help=f"of {', '.join(PRECISIONS)}; default: {' '.join(ENGINES)}",
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="default: the recipe's first golden picture as a 640x480 JPEG"
    )
    parser.add_argument("--runs", type=positive, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="and cores; default: %(default)s")
    _add_output(parser)


def _add_peers(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="FILE", help="to send in turn")
    parser.add_argument("--connections", type=positive, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="by turns; default: %(default)s")
    _add_seconds(parser)
    _add_output(parser)


def _add_protocols(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archive", type=Path, help="of a YOLOv5; served behind a gateway for the time of the measurement"
    )
    parser.add_argument(
        "--image", type=Path, nargs="+", required=True, metavar="FILE", help="to send, each by every way"
    )
    parser.add_argument(
        "--concurrency", type=positive, nargs="+", default=[1], metavar="N", help="connections; default: 1"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="by turns; default: %(default)s")
    _add_output(parser)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="an archive.yaml, or its folder")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="default: %(default)s")
    _add_output(parser, chart=False)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="an archive.yaml, or its folder; its `runtime` does not count")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    parser.add_argument("--calibration", type=Path, metavar="DIR", help="pictures that int8 is fitted to")


def _add_seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=positive, default=10, metavar="S", help="of load; default: %(default)s")
    parser.add_argument("--warmup", type=positive, default=3, metavar="S", help="before it; default: %(default)s")


def _add_output(parser: argparse.ArgumentParser, chart: bool = True) -> None:
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write every figure there as well")
    if chart:
        parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the figures there as bars")


def positive(text: str) -> int:
    """The type of a flag that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes the files. Returns 1 when something failed under load, 0 otherwise."""
    for path in (args.report, getattr(args, "chart", None)):
        # Measuring takes minutes.
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ToolError(f"{path} cannot be written; name a file in a folder that is there and can be written to")
    report = ACTIONS[args.action](args)
    print(report.as_table())
    if args.report:
        _write(args.report, (json.dumps({"machine": machine(), **asdict(report)}, indent=1) + "\n").encode())
    if getattr(args, "chart", None):
        from tools.report.charts import bars

        names, values = zip(*report.as_bars().items(), strict=True)
        _write(args.chart, bars(names, values, report.chart_title))
    failures = getattr(report, "failures", [])
    for line in failures:
        print(f"marina: {line}", file=sys.stderr)
    return 1 if failures else 0


def _handler(args: argparse.Namespace) -> Any:
    from tools.bench.handler import bench_handler

    return bench_handler(args.archive, args.image, args.runs, args.threads)


def _serve(args: argparse.Namespace) -> Any:
    from tools.bench.serve import Target, bench_archive, bench_url

    if (args.archive is None) == (args.url is None):
        raise ToolError("name one thing to load: an ARCHIVE to serve, or a server with --url")
    if args.archive:
        if args.token_file:
            raise ToolError("--token-file goes with --url; a server of our own has its own token")
        return bench_archive(args.archive, args.image, args.concurrency, args.seconds, args.warmup, args.engine)
    if not args.image:
        raise ToolError("a server at --url gets pictures of yours: give one or more with --image FILE")
    target = Target(args.url, _token(args.token_file))
    return bench_url(target, args.image, args.concurrency, args.seconds, args.warmup)


def _token(path: Path | None) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() if path else None
    except OSError as error:
        raise ToolError(f"token file {path} cannot be read ({error.strerror})") from error


def _engines(args: argparse.Namespace) -> Any:
    from tools.bench.engines import bench_engines

    return bench_engines(
        args.recipe, args.weights, args.backends, args.calibration, args.image, args.runs, args.threads
    )


def _peers(args: argparse.Namespace) -> Any:
    from tools.bench.peers.compare import bench_peers

    return bench_peers(
        args.recipe,
        args.weights,
        args.calibration,
        args.image,
        args.connections,
        args.seconds,
        args.warmup,
        args.rounds,
    )


def _build(args: argparse.Namespace) -> Any:
    from tools.bench.build import bench_build

    return bench_build(args.recipe, args.weights, args.rounds)


def _protocols(args: argparse.Namespace) -> Any:
    from tools.bench.protocols.compare import bench_protocols

    return bench_protocols(args.archive, args.image, args.concurrency, args.rounds)


ACTIONS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "handler": _handler,
    "serve": _serve,
    "engines": _engines,
    "peers": _peers,
    "protocols": _protocols,
    "build": _build,
}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    load, _, _ = os.getloadavg()
    return {"cpu": _cpu(), "cores": os.cpu_count(), "load": round(load, 2), "python": platform.python_version()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ToolError(f"{path} cannot be written ({error.strerror}); name another file") from error
