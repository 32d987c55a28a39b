"""`marina gateway`: what stands before one or more TorchServes, until Ctrl-C or SIGTERM."""

import argparse
import logging
import ssl
import sys
from pathlib import Path
from typing import Any

from tools.config import add_flags, settle
from tools.errors import ToolError
from tools.gateway.settings import Flags, Settings, Video
from tools.serve.command import is_loopback
from tools.serve.process import bindable_port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, Flags, "gateway")
    parser.add_argument("--backend", metavar="URL", help="the TorchServe behind it; several only in the file")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="its token, where `marina serve` writes it")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="its models that are offered here")
    parser.add_argument(
        "--video-folder", type=Path, metavar="DIR", help=f"where video jobs lie (default {Video().folder})"
    )
    parser.add_argument(
        "--no-auth", action="store_true", default=argparse.SUPPRESS, help="answer callers that show no key"
    )
    parser.add_argument("--new-key", metavar="NAME", help="print a new API key and its line for the keys file, and end")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes. Raises ToolError for settings that cannot be used."""
    if args.new_key is not None:
        return _print_key(args.new_key)
    settings = read_settings(args)
    _check_tls(settings)
    if settings.no_auth and not is_loopback(settings.host):
        _tell(f"WARNING: --no-auth on {settings.host}: everyone who can reach this machine can use the models")
    from tools.gateway.app import create_app
    from tools.gateway.server import serve

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("tools.gateway").setLevel(logging.INFO)
    # A form that cannot be read is the caller's mistake, who is told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    port = bindable_port(settings.host, settings.port)
    if settings.grpc_port is not None:
        settings = settings.model_copy(update={"grpc_port": bindable_port(settings.host, settings.grpc_port)})
    serve(create_app(settings), settings, port)
    return 0


def _check_tls(settings: Settings) -> None:
    """Raises ToolError for a certificate and key that do not fit, which uvicorn would tell by a stack trace."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    try:
        # The empty password, lest a key that has one be asked for on the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.tls_certificate, settings.tls_key, password=""
        )
    except OSError as error:
        raise ToolError(
            f"tls_certificate {settings.tls_certificate} and tls_key {settings.tls_key} cannot be used together"
            f" ({error.strerror or error}); give the two as PEM, the key without a password"
        ) from error


def read_settings(args: argparse.Namespace) -> Settings:
    """Flags over the file; those of a backend replace every one of the file. Raises ToolError."""
    flags = {"url": args.backend, "token_file": args.token_file, "models": args.models}
    given = {name: value for name, value in flags.items() if value is not None}
    if given and args.models is None:
        raise ToolError("a backend needs the models that are offered here: name them with --models")
    if given:
        args.backends = [given]
    settings = settle(args, Settings, "gateway")
    if args.config is not None:
        settings = settings.model_copy(update=_beside(settings, args))
    if args.video_folder is None:
        return settings
    return settings.model_copy(update={"video": settings.video.model_copy(update={"folder": args.video_folder})})


def _beside(settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """What of `settings` names paths that lie beside the file, since they came from it."""
    folder = args.config.parent
    changed: dict[str, Any] = {}
    if not hasattr(args, "backends"):
        changed["backends"] = [
            server.model_copy(update={"token_file": server.token_file and folder / server.token_file})
            for server in settings.backends
        ]
    changed["shadows"] = [
        shadow.model_copy(update={"token_file": shadow.token_file and folder / shadow.token_file})
        for shadow in settings.shadows
    ]
    if "shadow_folder" in settings.model_fields_set:
        changed["shadow_folder"] = folder / settings.shadow_folder
    if "folder" in settings.video.model_fields_set:
        changed["video"] = settings.video.model_copy(update={"folder": folder / settings.video.folder})
    if "storage" in settings.model_fields_set and not hasattr(args, "storage") and "://" not in settings.storage:
        changed["storage"] = str(folder / settings.storage)
    return changed


def _print_key(name: str) -> int:
    from tools.gateway.auth import new_key

    key, line = new_key(name)
    _tell(f"the key, shown only now: {key}\nits line for the keys file:")
    print(line)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
