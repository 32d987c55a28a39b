"""The whole way in one command: build the archive `shapes`, serve it on TorchServe, ask it.

python -m tools.demo [--once] [--port 8080]
"""

import argparse
import json
import sys
from pathlib import Path

import httpx

from handlers.errors import MarinaError
from tools.archive.build import build_archive
from tools.archive.recipe import load_recipe
from tools.errors import ToolError
from tools.serve.command import serve_until_stopped
from tools.serve.server import TorchServe

RECIPE = Path(__file__).resolve().parent.parent / "archives" / "shapes"
STORE = Path("model-store")
DRAWN = Path("demo-output") / "shapes.jpg"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build shapes, serve it, ask it.")
    parser.add_argument("--once", action="store_true", help="end after the first answer")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    try:
        recipe = load_recipe(RECIPE)
        built = build_archive(recipe, STORE / f"{recipe.name}.mar")
        print(f"built {built.path}, {built.size:,} bytes", flush=True)
        server = TorchServe(STORE, [recipe.name], port=args.port, report=tell)
        return serve_until_stopped(server, ask if args.once else ask_and_stay)
    except MarinaError as error:
        print(f"marina: {error}", file=sys.stderr)
        return 1


def ask(server: TorchServe) -> bool:
    """Post the golden picture, print the JSON, save the picture with boxes; whether to go on serving."""
    (served,) = server.archives
    headers = server.headers | {"Content-Type": served.content_type}
    for form in ("detections", "image"):
        answer = httpx.post(
            server.prediction_url(served.name),
            content=served.image,
            headers=headers | {"Marina-Format": form},
            timeout=served.response_timeout,
        )
        if answer.status_code != 200:
            raise ToolError(f"{served} answered its picture with {answer.status_code} {answer.text}")
        if form == "detections":
            print(json.dumps(answer.json(), indent=1))
        else:
            DRAWN.parent.mkdir(exist_ok=True)
            DRAWN.write_bytes(answer.content)
            print(f"with boxes drawn: {DRAWN}", flush=True)
    return False


def ask_and_stay(server: TorchServe) -> bool:
    ask(server)
    print(f"serving at {server.url} until Ctrl-C", flush=True)
    return True


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
