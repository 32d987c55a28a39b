"""marina label setup | push | pull"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tools.errors import ToolError

if TYPE_CHECKING:
    from tools.labelstudio.client import LabelStudio

DEFAULT_PROJECT = "marina"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    setup = actions.add_parser("setup", help="a project whose labels are the classes of a model; once more to add some")
    setup.add_argument("source", type=Path, help="a .mar, or the folder of a prepared data set: its classes")
    setup.add_argument("--add", nargs="+", default=[], metavar="CLASS", help="classes beside those of the source")
    setup.add_argument(
        "--ml-backend",
        metavar="URL",
        help="of a gateway for live predictions, as Label Studio reaches it: http://gateway:8000/label-studio",
    )
    setup.add_argument("--ml-key-file", type=Path, metavar="FILE", help="an API key of that gateway")

    push = actions.add_parser("push", help="captured pictures as tasks, with what the model found on them")
    push.add_argument("source", help="where the capture keeps them: a folder, or s3://BUCKET/PREFIX")

    pull = actions.add_parser("pull", help="annotations to a data set; once more for what is new or changed")
    pull.add_argument("output", type=Path, help="folder of the data set, new or from an earlier pull")

    for action in (setup, push, pull):
        add_project(action)


def add_project(parser: argparse.ArgumentParser) -> None:
    """Flags that name a project, and how Label Studio is asked."""
    parser.add_argument(
        "--project", default=DEFAULT_PROJECT, metavar="TITLE", help=f"in Label Studio (default {DEFAULT_PROJECT})"
    )
    parser.add_argument("--url", help="of Label Studio (default: LABEL_STUDIO_URL in the environment)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="with a personal access token or a legacy one (default: LABEL_STUDIO_API_KEY in the environment)",
    )


def run(args: argparse.Namespace) -> int:
    from tools.labelstudio.client import connect

    with connect(args.url, args.token_file) as studio:
        return {"setup": _setup, "push": _push, "pull": _pull}[args.action](args, studio)


def _setup(args: argparse.Namespace, studio: "LabelStudio") -> int:
    from tools.labelstudio.client import read_token
    from tools.labelstudio.project import Backend, classes_of, set_up

    backend = None
    if args.ml_key_file is not None and args.ml_backend is None:
        raise ToolError("--ml-key-file is the key of an ML backend; say which with --ml-backend URL")
    if args.ml_backend is not None:
        backend = Backend(args.ml_backend, read_token(args.ml_key_file) if args.ml_key_file else None)
    done = set_up(studio, args.project, [*classes_of(args.source), *args.add], backend)
    print(f"{args.project}: {'made' if done.made else 'was there'}, {done.url}")
    print(f"labels: {', '.join(done.labels)}" + (f"; new: {', '.join(done.added)}" if done.added else ""))
    if backend is not None:
        print(f"live predictions: from {backend.url}")
    return 0


def _push(args: argparse.Namespace, studio: "LabelStudio") -> int:
    from tools.labelstudio.push import push

    done = push(studio, args.project, args.source)
    for line in done.unusable:
        print(f"left out: {line}")
    models = ", ".join(f"{count} of {model}" for model, count in sorted(done.models.items()))
    print(f"{args.project}: {done.added} tasks made{f' ({models})' if models else ''}, {done.known} were there")
    return 0


def _pull(args: argparse.Namespace, studio: "LabelStudio") -> int:
    from tools.labelstudio.pull import pull

    done = pull(studio, args.project, args.output)
    for line in (*done.left_out, *done.unusable):
        print(f"left out: {line}")
    notes = {
        f"{done.skipped} tasks were skipped by annotators": done.skipped,
        f"{done.several} tasks have several annotations, of which the latest was taken": done.several,
        f"{done.turned} turned rectangles became the upright boxes around them": done.turned,
        f"{done.gone} pictures stay, whose tasks are no longer in Label Studio": done.gone,
    }
    for note, count in notes.items():
        if count:
            print(f"note: {note}")
    print(
        f"{args.output}: {done.added} pictures added, {done.changed} changed, {done.removed} removed,"
        f" {done.unchanged} as they were"
    )
    return 0
