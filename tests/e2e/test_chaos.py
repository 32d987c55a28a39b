"""A short storm of broken requests and one killed worker; `make fuzz`, `make chaos` and `make soak` take their time."""

import time

import pytest
from survive.chaos import back_after, kill_a_worker, load, unclean
from survive.pictures import drawn_seeds
from survive.served import held, workers
from survive.storm import Storm

from tools.serve.base import ModelServer
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e

LATEST_S = 180
REQUESTS = 300


def test_broken_requests_are_refused_and_nobody_else_notices(shapes_engine: ModelServer) -> None:
    before = held(shapes_engine.pid)
    storm = Storm(shapes_engine, seed=1, seeds=drawn_seeds())
    storm.run(0, REQUESTS)
    tally = storm.tally
    assert tally.wrong == []
    assert tally.answers.total() == REQUESTS
    # Most are refused by us, some are pictures after all, a few are forms that TorchServe itself cannot read.
    refused = sum(count for name, count in tally.answers.items() if name.startswith("4"))
    assert refused > REQUESTS / 3 and tally.frontend.total() < REQUESTS / 10
    assert {one.pid for one in held(shapes_engine.pid)} == {one.pid for one in before}


def test_a_worker_is_killed_under_load(shapes_server: TorchServe) -> None:
    """No picture of a client with retries is lost; each request of the others is answered, or refused in our form."""
    (victim,) = workers(shapes_server.pid)
    with load(shapes_server.url, shapes_server.token) as found:
        _wait(lambda: len(found.replies) > 4)
        killed = time.monotonic()
        kill_a_worker(shapes_server.pid)
        _wait(lambda: back_after(list(found.replies), killed) is not None)
        retried = found.retried
        _wait(lambda: found.retried > retried)
    assert found.lost == []
    assert unclean(found.replies, away=False) == []
    (successor,) = workers(shapes_server.pid)
    assert successor.pid != victim.pid


def _wait(until) -> None:
    deadline = time.monotonic() + LATEST_S
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)
