"""`marina serve`: a server on a model store, until Ctrl-C or SIGTERM."""

import argparse
import ipaddress
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tools.errors import ToolError
from tools.serve import ENGINES
from tools.serve.asgi.server import AsgiServer
from tools.serve.base import GRACE_S, LOOPBACK, Interrupted, ModelServer
from tools.serve.server import TorchServe
from tools.serve.store import Served
from tools.sign.command import add_keys, check_signatures, trusted_keys

GRPC_PORT = 7070


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the folder of .mar files")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="serve these only (default: every archive)")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what serves: TorchServe, or our own server without Java, for the same archives, with the same answers;"
        " it takes archives of Marina alone, has no gRPC and no management port, and wants the extra `gateway`"
        " (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one (default: %(default)s)")
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument("--no-auth", action="store_true", help="answer requests that carry no token")
    tokens.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="write the token of this start there, in place of that of an earlier one (default: a new private folder)",
    )
    parser.add_argument(
        "--grpc",
        type=int,
        nargs="?",
        const=GRPC_PORT,
        metavar="PORT",
        help=f"offer predictions over gRPC too (default port: {GRPC_PORT}; 0 picks a free one)",
    )
    parser.add_argument(
        "--management-port",
        type=int,
        metavar="PORT",
        help="let `marina store deploy` change what is served, by way of this port of 127.0.0.1, which wants a token of"
        " its own (0 picks a free one; default: nothing can be changed)",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="show Prometheus the server's figures at this port of 127.0.0.1, /metrics, without a token (0 picks a free"
        " one; default: nobody sees them)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="how long answers under way may take at the end (default: %(default)s)",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the server again, on the same ports, when it ends by itself, with growing pauses while it does not"
        " stay up; TorchServe then makes a new token, in the same file, and refuses the old one (default: end with exit"
        " code 1, for systemd, Docker or Kubernetes to start anew)",
    )
    add_keys(
        parser,
        "--require-signature",
        "start only if each archive is signed by one of them, and serve copies that nobody can exchange; with"
        " --management-port, which takes other archives on, the files themselves, checked at each start",
    )
    parser.add_argument("--verbose", action="store_true", help="show all that the server and its workers print")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, see `serve_until_stopped`."""
    if args.no_auth and not is_loopback(args.host):
        _tell(
            f"WARNING: --no-auth on {args.host}: everyone who can reach this machine can use the models. "
            "Leave --no-auth out, or put an authenticating proxy in front."
        )
    if args.no_auth and args.management_port is not None:
        raise ToolError("--management-port wants tokens: who reaches it can change what is served; omit --no-auth")
    return serve_until_stopped(_server(args))


def _server(args: argparse.Namespace) -> ModelServer[Any]:
    def vet(archives: Sequence[Path]) -> None:
        for line in check_signatures(archives, args.keys):
            _tell(line)

    settings = {
        "host": args.host,
        "port": args.port,
        "auth": not args.no_auth,
        "token_file": args.token_file,
        "metrics_port": args.metrics_port,
        "grace": args.grace,
        "supervise": args.supervise,
        "vet": vet if trusted_keys(args.keys) else None,
        "report": _tell,
        "verbose": args.verbose,
    }
    if args.engine == "torchserve":
        ports = {"grpc_port": args.grpc, "management_port": args.management_port}
        return TorchServe(args.store, args.models, **ports, **settings)
    for flag, value in (("--grpc", args.grpc), ("--management-port", args.management_port)):
        if value is not None:
            raise ToolError(f"{flag} goes with --engine torchserve alone; leave it out, or serve with that")
    return AsgiServer(args.store, args.models, **settings)


S = TypeVar("S", bound=ModelServer[Any])


def serve_until_stopped(server: S, when_up: Callable[[S], bool] = lambda server: True) -> int:
    """Start `server`, print how to ask it, serve until Ctrl-C, SIGTERM or a closed terminal; then drain and close it.

    when_up is called once every model answers; serving ends there and then if it returns False. Returns
    the exit code 0; raises MarinaError when a model does not come up or the server ends by itself.
    """
    with _signals_to(server.request_stop):
        try:
            server.start(_announcer(server))
            print(curl_line(server, server.archives[0]), flush=True)
            if when_up(server):
                server.wait()
                _tell("stopping; once more stops at once")
            if not server.drain():
                _tell("stopped before every answer under way was given")
        except Interrupted as error:
            _tell(str(error))
        finally:
            server.close()
    return 0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _announcer(server: ModelServer[Any]) -> Callable[[Served], None]:
    """Prints the address of each model as soon as it answers, and before the first what all of them share."""
    answering: list[Served] = []

    def announce(served: Served) -> None:
        if not answering:
            print(_access(server))
        answering.append(served)
        print(f"{served}  {server.prediction_url(served.name, served.version)}", flush=True)

    return announce


def _access(server: ModelServer[Any]) -> str:
    lines = [f"token  {server.token_file}" if server.token_file else "token  none needed (--no-auth)"]
    lines.append(f"log  {server.log_file}")
    if isinstance(server, TorchServe) and server.grpc_port is not None:
        lines.append(f"gRPC  {server.host}:{server.grpc_port}")
    if isinstance(server, TorchServe) and server.management_port is not None:
        lines.append(f"deploy  {deploy_line(server)}")
    if server.metrics_port is not None:
        lines.append(f"metrics  http://{LOOPBACK}:{server.metrics_port}/metrics")
    return "\n".join(lines)


def deploy_line(server: TorchServe) -> str:
    """A shell command that replaces what `server` serves, all but its target."""
    words = ["--management", f"http://{LOOPBACK}:{server.management_port}", "--inference", server.url]
    words += ["--token-file", str(server.key_file), "--store-dir", str(server.store)]
    return f"marina store deploy NAME@TAG {shlex.join(words)}"


def curl_line(server: ModelServer[Any], served: Served) -> str:
    """A shell command that posts the picture of `served`."""
    words = ["curl"]
    if server.token_file:
        words += ["-H", f'"Authorization: Bearer $(cat {shlex.quote(str(server.token_file))})"']
    words += ["-H", shlex.quote(f"Content-Type: {served.content_type}")]
    words += ["--data-binary", shlex.quote(f"@{server.image_file(served)}")]
    return " ".join([*words, shlex.quote(server.prediction_url(served.name))])


@contextmanager
def _signals_to(stop: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and a closed terminal call `stop`."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, lambda number, frame: stop()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
