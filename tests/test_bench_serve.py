"""Load by wrk: a run counts only when every answer was 200. Small servers of Python stand for real ones."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tools.bench.load import Load, LoadFailure, run_load
from tools.bench.serve import Measured, Row, ServeReport, Target, bench_url
from tools.bench.table import table
from tools.bench.usage import Usage, columns, metered
from tools.cli import main
from tools.errors import ToolError

PICTURES = [b"\xff\xd8\xff first", b"\x89PNG\r\n\x1a\n second", b"\xff\xd8\xff third"]
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="WRK MISSING: apt install wrk; no load is tested")


class Server:
    """Answers posts with `status(request number)`, and remembers what came."""

    def __init__(self) -> None:
        self.status = lambda number: 200
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in one piece

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.seen.append((self.path, dict(self.headers), body))
                status = server.status(len(server.seen))
                if status is None:
                    self.close_connection = True
                    return
                said = json.dumps({"type": "Odd", "message": "no\nluck"}).encode() if status != 200 else b"[]"
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients leave without their answer
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/predictions/a%20b?x=1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@needs_wrk
def test_load_sends_the_pictures_in_turn(server: Server) -> None:
    load = run_load(server.url, PICTURES, 1, 1, token="secret-token")
    # wrk asks the script for one request before it starts.
    *bodies, after = [body for _, _, body in server.seen]
    assert after == PICTURES[0]
    start = PICTURES.index(bodies[0])
    assert bodies == [PICTURES[(start + index) % 3] for index in range(len(bodies))]
    kinds = {body: headers["Content-Type"] for _, headers, body in server.seen}
    assert kinds == dict(zip(PICTURES, ("image/jpeg", "image/png", "image/jpeg"), strict=True))
    assert {path for path, _, _ in server.seen} == {"/predictions/a%20b?x=1"}
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret-token"}
    # What is under way at the end has no answer.
    assert 0 <= len(bodies) - load.requests <= 1
    assert load.images_per_s == pytest.approx(load.requests / load.seconds, rel=0.01)
    assert 0 < load.p50_ms <= load.p90_ms <= load.p99_ms


@needs_wrk
def test_connections_are_used_at_once(server: Server) -> None:
    busy = most = 0
    lock = threading.Lock()

    def slowly(number: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        with lock:
            busy -= 1
        return 200

    server.status = slowly
    assert run_load(server.url, PICTURES, 3, 1).p50_ms >= 50
    assert most == 3


@needs_wrk
def test_an_answer_that_is_not_200_is_a_failure(server: Server) -> None:
    server.status = lambda number: {5: 500, 6: 404}.get(number, 200)
    with pytest.raises(LoadFailure, match=r"2 of \d+ answers over 1 connections .* the first 500: .*Odd.*no.nluck"):
        run_load(server.url, PICTURES, 1, 1)
    server.status = lambda number: 204
    with pytest.raises(LoadFailure, match="the first 204"):
        run_load(server.url, PICTURES, 1, 1)


@needs_wrk
def test_a_connection_that_breaks_is_a_failure(server: Server) -> None:
    server.status = lambda number: None if number == 4 else 200
    with pytest.raises(LoadFailure, match="connections broke 1 times, after"):
        run_load(server.url, PICTURES, 1, 1)


@needs_wrk
def test_a_server_that_never_answers_is_a_failure(server: Server) -> None:
    release = threading.Event()
    server.status = lambda number: 200 * release.wait()
    try:
        with pytest.raises(LoadFailure, match="no answer in 1 s; the server hangs"):
            run_load(server.url, PICTURES, 1, 1)
    finally:
        release.set()


@needs_wrk
def test_a_server_that_hangs_late_is_a_failure(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench.load.LATEST_S", 2)
    release = threading.Event()
    server.status = lambda number: 200 if number < 50 else 200 * release.wait()
    try:
        with pytest.raises(LoadFailure, match="49 answers under load, but ReadTimeout to the first request after it"):
            run_load(server.url, PICTURES, 1, 1)
    finally:
        release.set()


@needs_wrk
def test_a_server_that_dies_is_a_failure() -> None:
    code = """
import http.server, os
count = 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        global count
        count += 1
        if count == 20:
            os._exit(1)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        url = f"http://127.0.0.1:{int(child.stdout.readline())}/"
        with pytest.raises(LoadFailure, match=r"connections broke .* is the server alive"):
            run_load(url, PICTURES, 2, 1)
    with pytest.raises(LoadFailure, match="cannot be loaded: unable to connect"):
        run_load(url, PICTURES, 2, 1)


@needs_wrk
def test_the_token_is_on_no_command_line_and_in_no_open_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    modes: list[int] = []
    run = subprocess.run

    def spying(command: list[str], cwd: str, **options: Any) -> Any:
        commands.extend(command)
        modes.append(stat.S_IMODE(os.stat(cwd).st_mode))
        assert any(b"secret-token" in path.read_bytes() for path in Path(cwd).iterdir())
        return run(command, cwd=cwd, **options)

    monkeypatch.setattr(subprocess, "run", spying)
    server.status = lambda number: 400
    with pytest.raises(LoadFailure) as failure:
        run_load(server.url, PICTURES, 1, 1, token="secret-token")
    assert modes == [0o700]
    assert "secret-token" not in " ".join([*commands, str(failure.value)])


def test_without_wrk_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"^wrk is not installed; apt install wrk$"):
        run_load("http://127.0.0.1:1/", PICTURES, 1, 1)


def work(process: psutil.Process, seconds: float) -> None:
    """Wait until it has computed so long."""
    start = process.cpu_times().user
    while process.cpu_times().user < start + seconds:
        time.sleep(0.02)


def test_usage_of_a_process_and_its_children() -> None:
    code = """
import subprocess, sys
busy = "data = bytes(range(250)) * 200_000; print(1, flush=True); exec('while True: pass')"
subprocess.run([sys.executable, "-c", busy])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as front:
        try:
            assert front.stdout is not None
            front.stdout.readline()
            (child,) = psutil.Process(front.pid).children()
            work(child, 0.3)
            with metered(front.pid) as usages:
                assert usages == []
                work(child, 0.3)
            assert [usage.name for usage in usages] == ["front", "worker"]
            assert usages[1].cpu_seconds >= 0.29 > usages[0].cpu_seconds
            # What it did before does not count.
            assert usages[1].cpu_seconds <= sum(child.cpu_times()[:2]) - 0.29
            assert usages[1].uss > usages[0].uss + 40_000_000
            assert all(usage.rss > usage.uss > 1_000_000 for usage in usages)
            # One that ends under load is left out.
            with metered(front.pid) as usages:
                child.kill()
                front.wait()
            assert usages == []
        finally:
            front.kill()
    with metered(None) as usages:
        pass
    assert usages == []
    with pytest.raises(ToolError, match="has ended"), metered(front.pid):
        pass


def report(*rows: Row) -> ServeReport:
    return ServeReport("shapes 1.0, 2 worker(s)", ["JPEG of 8x8 pixels and 9 bytes"], 10, list(rows))


LOAD = Load(4, 10.0, 200, 20.0, 190.04, 210.0, 250.0)
USAGE = [Usage("front", 1.0, 190_000_000, 150_000_000)] + [
    Usage("worker", 9.0, 500_000_000, size * 1_000_000) for size in (280, 290)
]


def test_the_table_has_ratios_and_what_processes_took() -> None:
    measured = Row(4, Measured(LOAD, USAGE), {"1 bare loop": 25.0, "2 bare loops": 20.0})
    lines = report(measured).as_table().splitlines()
    assert lines[:2] == ["shapes 1.0, 2 worker(s), 10 s a row", "picture: JPEG of 8x8 pixels and 9 bytes"]
    names, cells = (line.split() for line in lines[3:])
    assert names[:3] == ["connections", "images/s", "of"]
    assert " ".join(cells) == "4 20.00 0.800 1.000 190.0 210.0 250.0 0.10 1.80 95.0 190/150 500/290"
    assert columns([], 1, 1) == ["–"] * 5
    # A server of one process has its workers in itself.
    assert columns(USAGE[:1], 10, 200) == ["0.10", "0.00", "5.0", "190/150", "190/150"]


def test_a_row_that_failed_says_why() -> None:
    shown = report(Row(4, Measured(LOAD, []), {}), Row(200, None, {}, "9 of 99 answers were not 200"))
    assert shown.as_table().splitlines()[-1].split(maxsplit=1) == ["200", "FAILED: 9 of 99 answers were not 200"]
    assert shown.failures == ["9 of 99 answers were not 200"]
    assert shown.as_bars() == {"4 connections": 20.0, "200 connections": 0.0}


def test_tables_line_up() -> None:
    assert table(["name", "ms"], [["a", "1.00"], ["longer", "10.00"], ["b", "not there at all"]][:2]) == [
        "name       ms",
        "a        1.00",
        "longer  10.00",
    ]
    assert table(["n", "ms", "s"], [["b", "not there"]]) == ["n  ms  s", "b  not there"]


@needs_wrk
def test_a_running_server_by_its_url(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, token = tmp_path / "a.jpg", tmp_path / "token"
    picture.write_bytes(PICTURES[0])
    token.write_text("secret-token\n")
    arguments = ["bench", "serve", "--url", server.url, "--token-file", str(token), "--image", str(picture)]
    arguments += ["--seconds", "1", "--warmup", "1", "--report", str(tmp_path / "a.json")]
    arguments += ["--chart", str(tmp_path / "a.png")]
    assert main([*arguments, "--concurrency", "2"]) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["measured"]["load"]["connections"] == row["connections"] == 2
    assert row["measured"]["usage"] == []
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret-token"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert "secret-token" not in shown.out + shown.err + (tmp_path / "a.json").read_text()

    # A failure leaves the other rows, and is one all the same.
    server.status = lambda number: 503
    assert main([*arguments, "--concurrency", "1"]) == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out and "the first 503" in shown.err
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["measured"] is None


def test_refusals_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = str(tmp_path / "none.mar")
    for arguments, words in (
        ([], "an ARCHIVE to serve, or a server with --url"),
        ([archive, "--url", "http://127.0.0.1:1"], "an ARCHIVE to serve, or a server with --url"),
        ([archive, "--token-file", "a"], "--token-file goes with --url"),
        ([archive], "none.mar"),
        (["--url", "http://127.0.0.1:1"], "--image FILE"),
        (["--url", "http://127.0.0.1:1", "--image", archive], "none.mar cannot be read"),
        (["--url", "http://127.0.0.1:1", "--image", "a", "--token-file", archive], "token file"),
    ):
        assert main(["bench", "serve", *arguments]) == 1
        error = capsys.readouterr().err
        assert words in error, (arguments, error)
        assert error.count("\n") == 1


def test_nothing_is_left_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    shown = bench_url(Target("http://127.0.0.1:1/"), [tmp_path / "a.jpg"], [1], 1, 1) if shutil.which("wrk") else None
    assert shown is None or shown.failures
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]
