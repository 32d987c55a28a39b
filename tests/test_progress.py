"""tools.progress: on a terminal and where there is none."""

import pytest

from tools import progress
from tools.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_without_a_terminal_there_is_a_plain_line_now_and_then(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("trying", 60, "things") as shown:
        shown.show()
        for _ in range(60):
            clock.now += 0.5
            shown.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["trying: 0 of 60 things   0 %", "trying: 21 of 60 things, 2.0 a second, 20 s left  35 %"]
    assert [line.split()[1] for line in lines] == ["0", "21", "42"]


def test_short_work_is_silent_without_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", None) as shown:
        for _ in range(100):
            clock.now += 0.099
            shown.advance(1_000_000)
        assert capsys.readouterr().err == ""
        clock.now += 1
        shown.advance(1_000_000)
    assert capsys.readouterr().err == "reading: 101.0 MB\n"


def test_on_a_terminal_one_line_is_redrawn_and_goes(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("counting", None, "sheep") as shown:
        for _ in range(6):
            clock.now += 0.0625
            shown.advance()
    first, second, third, end = capsys.readouterr().err.split("\r")[1:]
    assert (first, second, third) == tuple(f"counting: {count} sheep, 16.0 a second\x1b[K" for count in (2, 4, 6))
    assert end == "\x1b[K"
