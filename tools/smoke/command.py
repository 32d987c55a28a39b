"""`marina smoke`: does a running server do its job?"""

import argparse
import mimetypes
from pathlib import Path

from tools.errors import ToolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="the server, e.g. http://127.0.0.1:8080")
    # TorchServe lists its models on the management port alone.
    parser.add_argument("--model", required=True, metavar="NAME", help="the model to ask")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token, where the server wants one")
    parser.add_argument("--image", type=Path, metavar="FILE", help="the picture to send (default: a generated one)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for each answer (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when every answer is right; raises ToolError at the first that is not."""
    from tools.serve.store import gradient_jpeg
    from tools.smoke.checks import Server, smoke

    token = _read(args.token_file).decode().strip() if args.token_file else None
    image = _read(args.image) if args.image else gradient_jpeg()
    content_type = mimetypes.guess_type(args.image.name)[0] if args.image else "image/jpeg"
    server = Server(args.url, args.model, token, args.timeout)
    smoke(server, image, content_type or "application/octet-stream", print)
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ToolError(f"{path} cannot be read ({error.strerror})") from error
