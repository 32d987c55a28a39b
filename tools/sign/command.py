"""marina archive keygen | sign, and what its other actions say of signatures."""

import argparse
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tools.errors import ToolError

if TYPE_CHECKING:
    from tools.sign.keys import Keys

# Where the public keys are that this machine trusts: a file, or a folder of them.
VARIABLE = "MARINA_KEYS"


def add_arguments(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    keygen = actions.add_parser("keygen", help="a pair of keys: NAME.key.pem to sign with, NAME.pub.pem to check with")
    keygen.add_argument("name", type=Path, metavar="NAME", help="of the files, with their folder")
    _add_passphrase(keygen)

    sign = actions.add_parser("sign", help="say that an archive is yours; writes ARCHIVE.sig.json beside it")
    sign.add_argument("archive", type=Path)
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the private key, NAME.key.pem")
    sign.add_argument(
        "--expires", default="365d", metavar="TIME", help="for how long: days or hours, as 12h (default: %(default)s)"
    )
    _add_passphrase(sign)


def _add_passphrase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help="what the private key is encrypted with (default: $MARINA_KEY_PASSPHRASE; without either it is not)",
    )


def add_keys(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    """A flag for public keys, which may be given several times."""
    parser.add_argument(
        flag,
        dest="keys",
        type=Path,
        action="append",
        default=[],
        metavar="KEYS",
        help=f"{help}: a public key, or a folder of *.pem; may be given several times (default: ${VARIABLE})",
    )


def trusted_keys(given: list[Path]) -> "Keys":
    """Those, else those of the environment; empty when neither says any. Raises ToolError for what is no public key."""
    paths = given or [Path(path) for path in [os.environ.get(VARIABLE)] if path]
    if not paths:
        return {}
    from tools.sign.keys import read_public

    return read_public(paths)


def keygen(args: argparse.Namespace) -> int:
    from tools.sign.keys import make_keys, read_passphrase

    private, public, key = make_keys(args.name, read_passphrase(args.passphrase_file))
    print(f"{private}: signs; yours alone, keep it secret")
    print(f"{public}: checks; give it to whoever serves")
    print(f"key {key}")
    return 0


def sign(args: argparse.Namespace) -> int:
    from tools.sign.keys import key_id, read_passphrase, read_private
    from tools.sign.signature import sign_archive
    from tools.sign.state import signature_state, state_line

    key, now = read_private(args.key, read_passphrase(args.passphrase_file)), datetime.now(UTC)
    path = sign_archive(args.archive, key, lifetime_of(args.expires), now)
    print(f"{path}: {state_line(signature_state(args.archive, {key_id(key.public_key()): key.public_key()}, now))}")
    return 0


def check_signatures(archives: Iterable[Path], given: list[Path]) -> list[str]:
    """A line for each archive; none where no key is given or in the environment. Raises BadSignature at the first that
    no trusted key has signed."""
    trusted = trusted_keys(given)
    if not trusted:
        return []
    from tools.sign.signature import verify_signature

    lines = []
    for archive in archives:
        expires = verify_signature(archive, trusted, datetime.now(UTC)).predicate.expires
        lines.append(f"{archive.name}: signed by a trusted key until {expires}")
    return lines


def lifetime_of(text: str) -> timedelta:
    """Raises ToolError for anything but days or hours."""
    found = re.fullmatch(r"([1-9]\d{0,4})([dh])", text)
    if not found:
        raise ToolError(f"--expires {text!r}: give days or hours, such as 365d or 12h")
    return timedelta(**{{"d": "days", "h": "hours"}[found[2]]: int(found[1])})
