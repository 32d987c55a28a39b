"""marina store push | list | show | pull | tag | promote | rollback | history | trust | distrust | deploy | gc"""

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tools.errors import ToolError
from tools.store.manifest import KINDS, check_name
from tools.store.tags import TAGS

if TYPE_CHECKING:
    from tools.store.store import Store
    from tools.store.tags import Move

VARIABLE = "MARINA_STORE"
AGE_DAYS = 7.0
NAME_HINT = "give the name of what was pushed"
TARGET = "an id, a NAME (its newest push) or NAME@TAG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help)
        sub.add_argument(
            "--store",
            metavar="URL",
            help=f"s3://BUCKET[/PREFIX] or a folder (default: ${VARIABLE}); the endpoint of another S3 than AWS and the"
            " credentials come from AWS_ENDPOINT_URL and its like",
        )
        return sub

    action("check", "whether it can be reached, written to, and keeps tags")

    push = action("push", "store a file or folder; prints its id")
    push.add_argument("path", type=Path, help="a .mar, weights, a run's folder, a data set's folder or .zip")
    push.add_argument("--name", help="instead of the file's or folder's; an archive has its name inside")
    push.add_argument(
        "--evaluation", type=Path, metavar="DIR", help="how good it is: what `marina evaluate --output` wrote"
    )
    push.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="FIGURE=NUMBER",
        help="what the evaluation must reach to be promoted, e.g. map50=0.8; may be given several times",
    )

    listing = action("list", "what there is, the oldest first")
    listing.add_argument("--kind", choices=KINDS, help="of this kind only")
    listing.add_argument("--name", help="of this name only")

    _with_target(action("show", "all that is known of a push, as JSON"))
    pull = _with_target(action("pull", "write what was pushed to this machine, checked"))
    pull.add_argument("--output", type=Path, metavar="PATH", help="a file, or a folder (default: its name, here)")

    tag = _with_target(action("tag", "point latest or staging at a push"))
    tag.add_argument("tag", choices=TAGS)
    tag.add_argument("--why", metavar="TEXT", help="for the history")

    promote = _with_target(action("promote", "point a tag at a push that has passed its gate"))
    promote.add_argument("--to", required=True, choices=TAGS)
    promote.add_argument("--why", metavar="TEXT", help="for the history (default: the gates)")
    promote.add_argument("--force", metavar="REASON", help="although no gate was passed; the reason is recorded")

    rollback = _with_name(action("rollback", "point a tag at what it pointed at before"))
    rollback.add_argument("tag", choices=TAGS)
    rollback.add_argument("--why", metavar="TEXT", default="", help="for the history")

    history = _with_name(action("history", "who moved the tags, when, to what and why"))
    history.add_argument("tag", nargs="?", choices=TAGS, help="this one only")

    trust = action("trust", "have nothing become production that is not signed by one of these keys; list them")
    trust.add_argument("public_keys", nargs="*", type=Path, metavar="KEY", help="a public key, or a folder of *.pem")

    distrust = action("distrust", "take a key away; without any, nothing has to be signed")
    distrust.add_argument("key", metavar="ID", help="as `trust` lists it")

    deploy = action("deploy", "bring an archive onto a running TorchServe, without losing a request")
    deploy.add_argument("target", help=TARGET)
    deploy.set_defaults(kind="archives")
    deploy.add_argument("--management", required=True, metavar="URL", help="the server's management API")
    deploy.add_argument("--inference", required=True, metavar="URL", help="where the server takes pictures")
    deploy.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the server's key_file.json, where it wants tokens"
    )
    deploy.add_argument(
        "--store-dir", type=Path, required=True, metavar="DIR", help="the server's model store, as seen from here"
    )

    gc = action("gc", "remove what pushes have left that were cut off")
    gc.add_argument(
        "--age", type=float, default=AGE_DAYS, metavar="DAYS", help="of those that count (default: %(default)s)"
    )


def _with_target(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("target", help=TARGET)
    parser.add_argument("--kind", choices=KINDS, default="archives", help="of the name (default: %(default)s)")
    return parser


def _with_name(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("name")
    parser.add_argument("--kind", choices=KINDS, default="archives", help="of the name (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    from tools.store.store import Store

    url = args.store or os.environ.get(VARIABLE)
    if not url:
        raise ToolError(f"say which store: --store s3://BUCKET/PREFIX or a folder, or set {VARIABLE}")
    return {
        "check": _check,
        "push": _push,
        "list": _list,
        "show": _show,
        "pull": _pull,
        "tag": _tag,
        "promote": _promote,
        "rollback": _rollback,
        "history": _history,
        "trust": _trust,
        "distrust": _distrust,
        "deploy": _deploy,
        "gc": _gc,
    }[args.action](Store(url), args)


def _check(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.store import MANIFESTS

    store.check()
    news = "" if store.objects.names(MANIFESTS) else "; nothing was pushed to it yet"
    print(f"{store.url}: can be written to, and keeps tags{news}")
    return 0


def _push(store: "Store", args: argparse.Namespace) -> int:
    manifest = store.push(args.path, args.name, args.evaluation, args.require)
    print(f"{manifest}: {len(manifest.files)} files, {manifest.size:,} bytes", file=sys.stderr)
    print(manifest.id)
    return 0


def _list(store: "Store", args: argparse.Namespace) -> int:
    if args.name:
        check_name(args.name, NAME_HINT)
    tags = store.tagged()
    manifests = store.manifests([args.kind] if args.kind else KINDS, args.name)
    print(f"{'id':38}  {'kind':8}  {'name':24}  {'version':8}  {'bytes':>14}  {'gate':8}  tags")
    for each in manifests:
        gate = "-" if not each.evidence or not each.evidence.gates else "failed" if each.evidence.failed() else "passed"
        line = f"{each.id:38}  {each.kind:8}  {each.name:24}  {each.version or '-':8}  {each.size:>14,}  {gate:8}"
        print(f"{line}  {' '.join(tags.get((each.kind, each.name, each.id), []))}".rstrip())
    return 0


def _show(store: "Store", args: argparse.Namespace) -> int:
    manifest = store.find(args.target, args.kind)
    content = manifest.model_dump(mode="json")
    for file, each in zip(content["files"], manifest.files, strict=True):
        file["location"] = f"{store.url.rstrip('/')}/{each.blob}"
    content["tags"] = store.tagged().get((manifest.kind, manifest.name, manifest.id), [])
    print(json.dumps(content, indent=1, ensure_ascii=False))
    return 0


def _pull(store: "Store", args: argparse.Namespace) -> int:
    manifest = store.find(args.target, args.kind)
    print(store.pull(manifest, args.output or Path(manifest.name if manifest.folder else ".")))
    return 0


def _tag(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.promote import tag

    return _moved(args.tag, tag(store, store.find(args.target, args.kind), args.tag, args.why))


def _promote(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.promote import promote

    manifest = store.find(args.target, args.kind)
    return _moved(args.to, promote(store, manifest, args.to, args.why, args.force))


def _rollback(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.promote import roll_back

    check_name(args.name, NAME_HINT)
    return _moved(args.tag, roll_back(store, args.kind, args.name, args.tag, args.why))


def _moved(tag: str, move: "Move") -> int:
    print(f"{tag} is {move.id} (move {move.number}, {move.action} by {move.who}; before: {move.previous or 'nothing'})")
    return 0


def _history(store: "Store", args: argparse.Namespace) -> int:
    check_name(args.name, NAME_HINT)
    tags = store.tags(args.kind, args.name)
    moves = [(tag, move) for tag in ([args.tag] if args.tag else TAGS) for move in tags.history(tag)]
    if not moves:
        raise ToolError(f"{args.kind} {args.name} has no tag; `marina store list {args.name}` shows what was pushed")
    for tag, move in moves:
        print(f"{tag:10}  {move.number:4}  {move.when}  {move.action:8}  {move.id}  {move.who}  {move.why}".rstrip())
    return 0


def _trust(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.trust import trust, trusted

    if args.public_keys:
        trust(store, args.public_keys)
    records = trusted(store)
    for record in records:
        print(f"{record.id}  {record.when}  {record.who}")
    if not records:
        print("no key: nothing has to be signed")
    return 0


def _distrust(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.trust import distrust, trusted

    distrust(store, args.key)
    print(f"key {args.key} is not trusted any more; {len(trusted(store))} left")
    return 0


def _deploy(store: "Store", args: argparse.Namespace) -> int:
    from tools.serve.rollout import Address, read_tokens
    from tools.store.deploy import deploy

    address = Address(args.management, args.inference, read_tokens(args.token_file))
    deploy(store, store.find(args.target, args.kind), address, args.store_dir, print)
    return 0


def _gc(store: "Store", args: argparse.Namespace) -> int:
    from tools.store.gc import collect

    if not args.age >= 0:
        raise ToolError(f"--age {args.age:g}: give a number of days from 0 up")
    removed = collect(store, timedelta(days=args.age))
    print(
        f"{removed.pushes} pushes given up; {removed.blobs} blobs removed, {removed.size:,} bytes; {removed.uploads}"
        " unfinished uploads removed"
    )
    return 0
