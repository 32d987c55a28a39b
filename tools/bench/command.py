"""marina bench handler | build

marina bench handler model-store/yolov5n-coco.mar
marina bench build archives/fasterrcnn-oxford-pets --weights pets.pth --report build.json
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from tools.errors import ToolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    handler = actions.add_parser("handler", help="stage by stage, what the handler adds to the forward pass")
    handler.add_argument("archive", type=Path)
    handler.add_argument(
        "--image", type=Path, metavar="FILE", help="default: the archive's first golden picture as a 640x480 JPEG"
    )
    handler.add_argument("--runs", type=_positive, default=100, metavar="N", help="default: %(default)s")
    handler.add_argument("--threads", type=_positive, default=1, metavar="N", help="and cores; default: %(default)s")

    build = actions.add_parser("build", help="seconds and memory of `archive build`, beside torch-model-archiver")
    build.add_argument("recipe", type=Path, help="an archive.yaml, or its folder")
    build.add_argument("--weights", type=Path, metavar="FILE", help="weights that lie elsewhere than the recipe says")
    build.add_argument("--rounds", type=_positive, default=3, metavar="N", help="default: %(default)s")

    for action in (handler, build):
        action.add_argument("--report", type=Path, metavar="FILE.json", help="write every figure there as well")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def run(args: argparse.Namespace) -> int:
    report: Any
    if args.action == "handler":
        from tools.bench.handler import bench_handler

        report = bench_handler(args.archive, args.image, args.runs, args.threads)
    else:
        from tools.bench.build import bench_build

        report = bench_build(args.recipe, args.weights, args.rounds)
    print(report.as_table())
    if args.report:
        _write(args.report, {"machine": machine(), **vars(report)})
    return 0


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


def _write(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ToolError(f"report {path} cannot be written ({error.strerror}); name another file") from error
