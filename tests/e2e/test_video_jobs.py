"""Video jobs of a real gateway before a real TorchServe."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from gateway_server import GatewayProcess, until
from numpy.random import default_rng

from tools.data.draw import draw_scene
from tools.serve.server import TorchServe

pytestmark = pytest.mark.e2e

FRAMES = 40


def write_video(path: Path, frames: int) -> Path:
    """Two drawn scenes of 320x240 by turns, ten frames a second, with a tone."""
    scenes = [np.asarray(draw_scene(default_rng(seed), 320, 240)[0]) for seed in (1, 22)]
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(scenes[index // 5 % 2], format="rgb24")))
            tone = np.sin(2 * np.pi * 440 * (np.arange(1600) + 1600 * index) / 16000).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            samples.rate, samples.pts, samples.time_base = 16000, 1600 * index, Fraction(1, 16000)
            container.mux(sound.encode(samples))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", FRAMES)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is still worked on when the next request comes."""
    return write_video(tmp_path_factory.mktemp("clip") / "long.mp4", 600)


@pytest.fixture(scope="module")
def gateway(
    shapes_server: TorchServe, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("video-jobs") / "gateway"
    gateway = GatewayProcess(folder, repository, shapes_server, queue=2, max_bytes=5_000_000)
    yield gateway.start()
    gateway.end()


def submit(gateway: GatewayProcess, video: Path | bytes, **wishes: object) -> httpx.Response:
    body = video if isinstance(video, bytes) else video.read_bytes()
    return httpx.post(f"{gateway.url}/videos", params=wishes, content=body, headers=gateway.headers, timeout=30)


def look(gateway: GatewayProcess, job: str, what: str = "") -> httpx.Response:
    return httpx.get(f"{gateway.url}/videos/{job}{what}", headers=gateway.headers, timeout=30)


def delete(gateway: GatewayProcess, job: str) -> httpx.Response:
    return httpx.delete(f"{gateway.url}/videos/{job}", headers=gateway.headers, timeout=30)


def await_state(gateway: GatewayProcess, job: str, *states: str) -> dict:
    until(lambda: look(gateway, job).json()["state"] in states, f"job is {' or '.join(states)}")
    return look(gateway, job).json()


def await_frames(gateway: GatewayProcess, job: str, least: int) -> None:
    until(lambda: look(gateway, job).json()["frames_done"] >= least, f"{least} frames")


def files(gateway: GatewayProcess) -> set[str]:
    return {str(path.relative_to(gateway.jobs)) for path in gateway.jobs.rglob("*") if path.is_file()}


def test_video_with_sound_comes_back_with_boxes(gateway: GatewayProcess, clip: Path, tmp_path: Path) -> None:
    answer = submit(gateway, clip, track=True)
    assert answer.status_code == 202
    job = answer.json()["id"]
    assert answer.headers["Location"] == f"/videos/{job}"
    assert answer.json()["frames"] == FRAMES
    assert answer.json().keys().isdisjoint({"owner", "labels", "headers", "attempts"})

    seen = set()
    until(lambda: seen.add(state := look(gateway, job).json()["frames_done"]) or state == FRAMES, "all frames")
    assert len(seen) > 1
    done = await_state(gateway, job, "done", "failed")
    assert (done["state"], done["error"], done["damaged"], done["version"]) == ("done", None, None, "1.0")
    listed = httpx.get(f"{gateway.url}/videos", headers=gateway.headers).json()
    assert listed == {"videos": [done], "next": None}
    other = {"Authorization": f"Bearer {gateway.other_key}"}
    assert httpx.get(f"{gateway.url}/videos", headers=other).json() == {"videos": [], "next": None}
    assert httpx.get(f"{gateway.url}/videos").status_code == 401

    lines = [json.loads(line) for line in look(gateway, job, "/detections.jsonl").text.splitlines()]
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert lines[1]["seconds"] == 0.1
    assert any(isinstance(found["track"], int) for line in lines for found in line["detections"])
    assert sum(len(line["detections"]) for line in lines) == done["detections"] > FRAMES

    result = look(gateway, job, "/result.mp4")
    assert result.headers["Content-Type"] == "video/mp4"
    (tmp_path / "result.mp4").write_bytes(result.content)
    with av.open(str(tmp_path / "result.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.width, video.height, video.average_rate) == ("h264", 320, 240, 10)
        assert sound.codec_context.name == "aac"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
    assert len(frames) == FRAMES
    x1, y1, _, y2 = lines[0]["detections"][0]["box"]
    assert np.abs(frames[0].astype(int) - first_frame(clip).astype(int))[round(y1) : round(y2), round(x1)].mean() > 20

    part = httpx.get(
        f"{gateway.url}/videos/{job}/result.mp4", headers=gateway.headers | {"Range": "bytes=4-7"}, timeout=30
    )
    assert (part.status_code, part.content) == (206, b"ftyp")

    assert files(gateway) == {"lock", f"{job}/job.json", f"{job}/result.mp4", f"{job}/detections.jsonl"}
    assert delete(gateway, job).status_code == 204
    assert look(gateway, job).status_code == 404
    assert files(gateway) == {"lock"}


def first_frame(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_stride_threshold_and_classes_hold(gateway: GatewayProcess, clip: Path) -> None:
    job = submit(gateway, clip, stride=10, score_threshold=0.5, classes="ring").json()["id"]
    assert await_state(gateway, job, "done", "failed")["frames"] == FRAMES // 10
    lines = [json.loads(line) for line in look(gateway, job, "/detections.jsonl").text.splitlines()]
    assert [line["frame"] for line in lines] == [0, 10, 20, 30]
    found = [detection for line in lines for detection in line["detections"]]
    assert {detection["label"] for detection in found} == {"ring"}
    assert min(detection["score"] for detection in found) > 0.5
    delete(gateway, job)


@pytest.mark.parametrize(
    ("wishes", "body", "status", "told"),
    [
        ({}, b"", 400, "InvalidVideo"),
        ({}, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 400, "InvalidVideo"),
        ({}, b"\0" * 6_000_000, 413, "BodyTooLarge"),
        ({"model": "nothing"}, b"x", 404, "UnknownModel"),
        ({"version": "9"}, b"x", 404, "UnknownModel"),
        ({"score_threshold": "2"}, b"x", 422, "InvalidParameter"),
        ({"stride": "0"}, b"x", 422, "InvalidParameter"),
        ({"speed": "1"}, b"x", 422, "InvalidParameter"),
        ({"classes": "ring, unicorn"}, b"x", 400, "InvalidOption"),
    ],
)
def test_what_cannot_be_done_is_refused(
    gateway: GatewayProcess, wishes: dict, body: bytes, status: int, told: str
) -> None:
    answer = submit(gateway, body, **wishes)
    assert (answer.status_code, answer.json()["type"]) == (status, told)
    assert str(gateway.folder) not in answer.text
    if "speed" in wishes:
        assert "unknown query parameter 'speed'; known: model, version, score_threshold" in answer.json()["message"]
    assert files(gateway) == {"lock"}


def test_form_and_missing_key_are_refused(gateway: GatewayProcess, clip: Path) -> None:
    form = httpx.post(f"{gateway.url}/videos", files={"file": clip.read_bytes()}, headers=gateway.headers)
    assert (form.status_code, form.json()["type"]) == (415, "UnsupportedMedia")
    assert httpx.post(f"{gateway.url}/videos", content=clip.read_bytes()).status_code == 401
    assert files(gateway) == {"lock"}


def test_video_that_ends_in_the_middle_is_told(gateway: GatewayProcess, clip: Path, tmp_path: Path) -> None:
    with av.open(str(clip)) as source, av.open(str(tmp_path / "cut.mkv"), "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    body = (tmp_path / "cut.mkv").read_bytes()
    job = submit(gateway, body[: len(body) // 2], stride=4).json()["id"]
    done = await_state(gateway, job, "done", "failed")
    assert done["state"] == "done"
    assert 0 < done["frames"] < FRAMES // 4
    assert done["damaged"].startswith("source is damaged")
    delete(gateway, job)


def test_cancel_queue_and_owner(gateway: GatewayProcess, long_clip: Path) -> None:
    running, waiting = (submit(gateway, long_clip).json()["id"] for _ in range(2))
    full = submit(gateway, long_clip)
    assert (full.status_code, full.json()["type"]) == (503, "QueueFull")
    assert int(full.headers["Retry-After"]) > 0

    other = {"Authorization": f"Bearer {gateway.other_key}"}
    for method, path in (("GET", ""), ("GET", "/result.mp4"), ("GET", "/detections.jsonl"), ("DELETE", "")):
        answer = httpx.request(method, f"{gateway.url}/videos/{running}{path}", headers=other)
        assert (answer.status_code, answer.json()["type"]) == (404, "UnknownJob")

    assert look(gateway, running, "/result.mp4").status_code == 409
    await_frames(gateway, running, 1)
    assert look(gateway, waiting).json()["state"] == "queued"
    assert delete(gateway, waiting).status_code == 204
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(delete, gateway, running) for _ in range(2)]
        assert {answer.result().status_code for answer in answers} <= {204, 404}
    assert files(gateway) == {"lock"}
    job = submit(gateway, long_clip).json()["id"]
    await_state(gateway, job, "running")
    delete(gateway, job)


def freeze(gateway: GatewayProcess, clip: Path, long_clip: Path) -> str:
    """A job that runs and cannot go on, since the server is cut off."""
    before = submit(gateway, long_clip).json()["id"]
    job = submit(gateway, clip, stride=4).json()["id"]
    gateway.relay.cut()
    delete(gateway, before)
    await_state(gateway, job, "running")
    until(lambda: any(name.startswith(f"{job}/.") for name in files(gateway)), "a result is begun")
    return job


def test_job_waits_for_a_dead_server(gateway: GatewayProcess, clip: Path, long_clip: Path) -> None:
    job = freeze(gateway, clip, long_clip)
    try:
        refused = submit(gateway, clip)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        assert look(gateway, job).json()["frames_done"] == 0
    finally:
        gateway.relay.mend()
    assert await_state(gateway, job, "done", "failed")["state"] == "done"
    assert len(look(gateway, job, "/detections.jsonl").text.splitlines()) == FRAMES // 4
    delete(gateway, job)


def test_restart_keeps_what_is_done_and_goes_on_with_the_rest(
    gateway: GatewayProcess, clip: Path, long_clip: Path
) -> None:
    """Killed at work: the job begins anew. Stopped: it is put back. Killed at it three times, or by a wish that the
    model does not take any more: it has failed."""
    first = submit(gateway, clip, stride=20).json()["id"]
    await_state(gateway, first, "done")
    job = freeze(gateway, clip, long_clip)
    gateway.end(kill=True)
    assert json.loads((gateway.jobs / job / "job.json").read_text())["state"] == "running"
    (gateway.jobs / "0123").mkdir()
    (gateway.jobs / "0123" / "source").write_bytes(b"of an upload that was cut off")

    gateway.start()
    assert look(gateway, first, "/result.mp4").status_code == 200
    await_state(gateway, job, "running")
    gateway.end()
    record = json.loads((gateway.jobs / job / "job.json").read_text())
    assert (record["state"], record["attempts"]) == ("queued", 1)
    assert {name for name in files(gateway) if name.startswith(job)} == {f"{job}/job.json", f"{job}/source"}

    gateway.relay.mend()
    failing = {"4567": {"state": "running", "attempts": 3}, "5678": {"headers": {"Marina-Classes": "unicorn"}}}
    for name, changes in failing.items():
        (gateway.jobs / name).mkdir()
        (gateway.jobs / name / "source").write_bytes(clip.read_bytes())
        (gateway.jobs / name / "job.json").write_text(json.dumps(record | {"id": name} | changes))
    gateway.start()
    assert "killed 3 times" in look(gateway, "4567").json()["error"]
    assert "unknown class 'unicorn'" in await_state(gateway, "5678", "done", "failed")["error"]
    answer = look(gateway, "5678", "/result.mp4")
    assert (answer.status_code, answer.json()["type"]) == (409, "NotDone")
    assert await_state(gateway, job, "done", "failed")["state"] == "done"
    assert len(look(gateway, job, "/detections.jsonl").text.splitlines()) == FRAMES // 4
    kept = {f"{done}/{name}" for done in (first, job) for name in ("job.json", "result.mp4", "detections.jsonl")}
    assert files(gateway) == {"lock", "4567/job.json", "5678/job.json", *kept}


def test_folder_is_one_gateways_and_jobs_expire(
    gateway: GatewayProcess, shapes_server: TorchServe, repository: Path, clip: Path, tmp_path: Path
) -> None:
    second = GatewayProcess(tmp_path / "second", repository, shapes_server, ttl_s=1)
    second.start()
    job = submit(second, clip, stride=20).json()["id"]
    until(lambda: look(second, job).status_code == 404, "the job has expired")
    until(lambda: files(second) == {"lock"}, "its files are gone")
    third = GatewayProcess(tmp_path / "third", repository, shapes_server)
    third.folder.joinpath("jobs").symlink_to(second.jobs)
    with pytest.raises(AssertionError, match=r"is used by another gateway.* --video-folder"):
        third.start()
    assert third.url == "" and "Traceback" not in third.log and "Application" not in third.log
    second.end()
    third.end()
