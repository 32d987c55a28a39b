"""marina shadow --url GATEWAY"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tools.errors import ToolError

if TYPE_CHECKING:
    from tools.shadow.report import Report

TIMEOUT_S = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="of the gateway, as http://127.0.0.1:8000")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds a key of the gateway")
    parser.add_argument("--model", metavar="NAME", help="the shadow of this model alone (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--require-verdict", action="store_true", help="exit with 1 unless the verdict is promote")


def run(args: argparse.Namespace) -> int:
    """Returns 1 where promotion is required and not advised, else 0. Raises ToolError."""
    from tools.shadow.report import Reports
    from tools.shadow.text import as_text

    reports = _asked(args)
    if args.json:
        print(Reports(shadows=reports).model_dump_json(indent=2))
    else:
        print("\n\n".join(as_text(report) for report in reports))
    return int(args.require_verdict and any(report.verdict.verdict != "promote" for report in reports))


def _asked(args: argparse.Namespace) -> "list[Report]":
    import httpx

    from tools.labelstudio.client import read_token
    from tools.shadow.report import Reports

    headers = {"Authorization": f"Bearer {read_token(args.token_file)}"} if args.token_file else {}
    url = f"{args.url.rstrip('/')}/shadow"
    try:
        answer = httpx.get(url, headers=headers, timeout=TIMEOUT_S)
        if answer.status_code == 401:
            raise ToolError(f"{url} wants a key; give --token-file FILE with one that it knows")
        answer.raise_for_status()
        reports = Reports.model_validate_json(answer.content).shadows
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ToolError(f"{url} tells nothing ({error}); is it the gateway's URL?") from error
    except ValueError as error:
        raise ToolError(f"{url} gives no report of shadows; is it the URL of a gateway of this version?") from error
    chosen = [report for report in reports if args.model in (None, report.model)]
    if not chosen:
        known = ", ".join(report.model for report in reports)
        told = f"no shadow of model {args.model!r}; it has those of {known}" if known else "no shadows"
        raise ToolError(f"{url} has {told}; they are named in the gateway's settings, section `shadows`")
    return chosen
