"""HTTP load on a server: pictures in turn, over so many connections, for so long, sent by wrk."""

import json
import subprocess
import tempfile
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from handlers.image import sniff
from tools.errors import ToolError

SCRIPT = Path(__file__).with_name("load.lua")
MARK = "\nMARINA "
# An answer that takes longer makes the run a failure.
LATEST_S = 60


@dataclass(frozen=True)
class Load:
    """What a server has done, every answer with 200.

    The latencies are those of wrk: for an answer that took more than twice the mean of its connection, it adds those
    that would have been waited for meanwhile ("coordinated omission").
    """

    connections: int
    seconds: float
    requests: int
    images_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


class LoadFailure(ToolError):
    """The server did not give every answer, so that its figures mean nothing."""


def run_load(url: str, bodies: Sequence[bytes], connections: int, seconds: int, token: str | None = None) -> Load:
    """Post encoded pictures to the predictions of a model. Each connection waits for its answer before it sends again.

    The token goes into files that nobody else can read, never into a command line.
    Raises LoadFailure when an answer is not 200, comes late or not at all, under load or right after it, ToolError
    when wrk is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="marina-") as folder:  # of mode 0700
        for number, body in enumerate(bodies, start=1):
            (Path(folder) / str(number)).write_bytes(_request(url, body, token))
        command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
        command += ["--timeout", f"{LATEST_S}s", "--script", str(SCRIPT), url]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        except FileNotFoundError:
            raise ToolError("wrk is not installed; apt install wrk") from None
    output = done.stdout.decode(errors="replace")
    if done.returncode or MARK not in output:
        said = (output + done.stderr.decode(errors="replace")).strip().partition("\n")[0]
        raise LoadFailure(f"{url} cannot be loaded: {said or f'wrk ended with exit code {done.returncode}'}")
    load = _read(url, output.partition(MARK)[2], connections)
    _check_alive(url, bodies[0], token, load)
    return load


def _check_alive(url: str, body: bytes, token: str | None, load: Load) -> None:
    """wrk forgets what is still without an answer at its end: of a server that died, everything."""
    status: int | str
    try:
        status = httpx.post(url, content=body, headers=_headers(body, token), timeout=LATEST_S).status_code
    except httpx.HTTPError as error:
        status = type(error).__name__
    if status != httpx.codes.OK:
        raise LoadFailure(f"{url}: {load.requests} answers under load, but {status} to the first request after it")


def _headers(body: bytes, token: str | None) -> dict[str, str]:
    kind = sniff(body)
    headers = {"Content-Type": f"image/{kind.lower()}" if kind else "application/octet-stream"}
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _request(url: str, body: bytes, token: str | None) -> bytes:
    """The bytes of one HTTP request."""
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in _headers(body, token).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _read(url: str, output: str, connections: int) -> Load:
    """The figures that the script has printed, unless they are those of a failure."""
    line, _, first_body = output.partition("\n")
    found = json.loads(line)
    if found["wrong"]:
        said = " ".join(first_body.split())[:300]
        raise LoadFailure(
            f"{url}: {found['wrong']} of {found['answers']} answers over {connections} connections were not 200,"
            f" the first {found['first_status']}: {said or 'without a body'}"
        )
    if found["broken"]:
        raise LoadFailure(
            f"{url}: connections broke {found['broken']} times, after {found['answers']} answers; is the server alive?"
        )
    seconds = found["microseconds"] / 1e6
    if found["late"]:
        raise LoadFailure(f"{url}: an answer did not come within {LATEST_S} s, after {found['answers']} answers")
    if not found["answers"]:
        raise LoadFailure(f"{url}: no answer in {seconds:.0f} s; the server hangs, or needs more --seconds")
    return Load(
        connections=connections,
        seconds=round(seconds, 3),
        requests=found["answers"],
        images_per_s=round(found["answers"] / seconds, 2),
        p50_ms=round(found["p50"] / 1000, 2),
        p90_ms=round(found["p90"] / 1000, 2),
        p99_ms=round(found["p99"] / 1000, 2),
    )
