"""Build the serving image, and try it: `python -m tools.container image|smoke`.

`smoke` uses the engine that runs, else a private one (tools/container/engine.py). Where neither can be had it says so
in its last line and ends well, unless MARINA_REQUIRE_CONTAINER=1 stands in the environment.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from handlers.errors import MarinaError
from tools.container.bake import SERVING_IMAGE
from tools.container.engine import NoEngine, any_engine, running_engine
from tools.container.smoke import build_image, size_of, smoke
from tools.serve.store import find_archives


def run_image(args: argparse.Namespace) -> None:
    engine = running_engine()
    build_image(engine, args.tag, args.base_image, args.torch_index)
    print(f"built {args.tag}")


def run_smoke(args: argparse.Namespace) -> None:
    try:
        with any_engine() as engine:
            find_archives(args.store)
            start = time.monotonic()
            build_image(engine, args.tag, args.base_image, args.torch_index)
            print(f"built in {time.monotonic() - start:.0f} s, {size_of(engine, args.tag)}", flush=True)
            smoke(engine, args.tag, args.store, print)
            print("image-smoke: passed")
    except NoEngine as error:
        if os.environ.get("MARINA_REQUIRE_CONTAINER") == "1":
            raise
        print(f"SKIPPED: {error}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.container", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="image|smoke")
    for name, function, text in (
        ("image", run_image, "build the serving image with the running engine"),
        ("smoke", run_smoke, "build it, run it on a model store under the strictest settings, ask it, stop it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("--tag", default=SERVING_IMAGE)
        command.add_argument("--base-image", help="a Debian 12 image, pinned by digest for a release")
        command.add_argument(
            "--torch-index", help="a package index with CPU builds of torch, for an image without CUDA"
        )
    command.add_argument("--store", type=Path, default=Path("model-store"), help="folder of .mar archives")
    args = parser.parse_args(argv)
    # A stopped run must still stop its engine.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        args.function(args)
    except MarinaError as error:
        print(f"marina: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
