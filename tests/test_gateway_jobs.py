"""Video jobs as lists; all else about them needs a server and stands among the end-to-end tests."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tools.gateway.errors import GatewayError
from tools.gateway.job_queue import JobQueue, Record
from tools.gateway.jobs import Wishes, check_classes
from tools.gateway.listing import new_name, page
from tools.gateway.settings import Video


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), unique=True), st.integers(1, 5))
def test_pages_one_after_the_other_are_all_in_order(names: list[str], limit: int) -> None:
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        found, after = page(names, after, limit)
        assert len(found) <= limit
        seen += found
    assert seen == sorted(names)
    assert page(names, "", len(names))[1] is None


def test_names_sort_by_age() -> None:
    names = [new_name(seconds) for seconds in (9, 10, 255, 256, 2**31)]
    assert names == sorted(names) and {len(name) for name in names} == {32}
    assert new_name(9) != names[0]
    moments = [1.8e9 + index / 1000 for index in range(1000)]
    assert sorted(within := [new_name(moment) for moment in moments]) == within


def test_a_wish_that_is_none_is_told_those_that_are() -> None:
    known = "model, version, score_threshold, iou_threshold, classes, stride, track"
    with pytest.raises(ValidationError, match=f"unknown query parameter 'vid_stride'; known: {known}"):
        Wishes.model_validate({"stride": "2", "vid_stride": "2"})


def test_classes_of_a_video_are_those_of_the_model() -> None:
    labels = ["cat", "Straße", "salt, pepper"]
    for classes in (None, "cat", "2, Straße", "salt, pepper"):
        check_classes(Wishes(classes=classes), labels)
    for classes in ("unicorn", "cat,unicorn", "3", ""):
        with pytest.raises(GatewayError, match="class") as caught:
            check_classes(Wishes(classes=classes), labels)
        assert caught.value.status == 400


@pytest.fixture
def queue(tmp_path: Path) -> JobQueue:
    return JobQueue(Video(folder=tmp_path), backend=None)


def add(queue: JobQueue, owner: str, seconds: int, expires: datetime | None = None) -> str:
    name = new_name(seconds)
    record = Record(
        id=name,
        owner=owner,
        model="m",
        version="1",
        asked_version=None,
        labels=[],
        headers={},
        stride=1,
        track=False,
        created=datetime.fromtimestamp(seconds, UTC),
        expires=expires,
    )
    with queue.arriving(name):
        queue.add(record)
    return name


def test_callers_see_their_own_jobs_alone_and_none_that_expired(queue: JobQueue) -> None:
    now = datetime.now(UTC)
    second, first = add(queue, "ada", 2), add(queue, "ada", 1)
    add(queue, "bob", 3)
    add(queue, "ada", 4, expires=now - timedelta(seconds=1))
    kept = add(queue, "ada", 5, expires=now + timedelta(hours=1))
    assert [job.id for job in queue.page("ada", "", 20).videos] == [first, second, kept]
    some = queue.page("ada", "", 2)
    assert [job.id for job in some.videos] == [first, second] and some.next == second
    assert [job.id for job in queue.page("ada", second, 2).videos] == [kept]
    assert queue.page("nobody", "", 20).videos == []
