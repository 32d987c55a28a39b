"""Decoded and scaled pictures, kept so that an epoch decodes nothing; and what passes them from worker processes.

Memory is an anonymous shared mapping: workers forked after it was filled read the very same pages.
"""

import hashlib
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from handlers.errors import RequestError
from handlers.geometry import Letterbox, letterbox, plan_letterbox
from handlers.image import decode
from handlers.settings import MOST_PIXELS, Limits, Preprocess
from tools.checkpoint.safetensors_format import replacing
from tools.data.dataset import Picture
from tools.errors import ToolError
from tools.progress import Progress

Mode = Literal["none", "ram", "disk"]
RAM_BYTES = 4 << 30
LIMITS = Limits(max_bytes=1_000_000_000, max_pixels=MOST_PIXELS)  # pictures of one's own, not a stranger's
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # where Linux keeps what processes share
PREFETCH = 2  # batches made ahead by each worker, DataLoader's default


class Wanted(NamedTuple):
    """A picture, scaled to `height x width` pixels."""

    picture: Picture
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.height * self.width * 3


def scaled(picture: Picture, size: int) -> Wanted:
    """The picture with a longer side of `size`, as `plan_letterbox` scales it."""
    plan = plan_letterbox(picture.height, picture.width, Preprocess(size, "square"), stride=1)
    return Wanted(picture, plan.content_height, plan.content_width)


class Cache:
    """mode: `none` decodes every time, `ram` keeps up to `limit_bytes`, `disk` writes `.npy` files to `folder`."""

    def __init__(self, mode: Mode, limit_bytes: int = RAM_BYTES, folder: Path | None = None):
        self.mode = mode
        self.limit_bytes = limit_bytes
        self.folder = folder
        self._kept: dict[tuple[Path, int, int], np.ndarray | Path] = {}

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Decode and scale what is not kept yet; call it before workers start. Says so when not everything fits.

        Raises ToolError for a picture that cannot be decoded or has another size than its labels say, and for
        a folder that cannot be written.
        """
        new = list({_key(item): item for item in wanted if _key(item) not in self._kept}.values())
        if self.mode == "ram":
            self._fill_memory(new)
        elif self.mode == "disk":
            self._fill_folder(new)

    def read(self, wanted: Wanted) -> np.ndarray:
        """uint8 `[height, width, 3]` RGB, not to be written to. Raises ToolError as `fill` does."""
        kept = self._kept.get(_key(wanted))
        if kept is None:
            return load(wanted)
        return np.load(kept, mmap_mode="r", allow_pickle=False) if isinstance(kept, Path) else kept

    def _fill_memory(self, new: list[Wanted]) -> None:
        ends = np.cumsum([item.nbytes for item in new])
        fitting = new[: int(np.searchsorted(ends, self.limit_bytes, side="right"))]
        if len(fitting) < len(new):
            print(
                f"cache: {len(fitting)} of {len(new)} pictures fit into {self.limit_bytes / 1e6:.0f} MB of memory, of"
                f" {ends[-1] / 1e6:.0f} MB wanted; the others are decoded every time (a cache on disk takes all)",
                file=sys.stderr,
            )
        if not fitting:
            return
        ends = ends[: len(fitting)]
        self.limit_bytes -= int(ends[-1])
        memory = np.frombuffer(mmap.mmap(-1, int(ends[-1])), dtype=np.uint8)
        for item, end, pixels in zip(fitting, ends, _load_all(fitting), strict=True):
            place = memory[end - item.nbytes : end].reshape(item.height, item.width, 3)
            place[:] = pixels
            place.flags.writeable = False
            self._kept[_key(item)] = place

    def _fill_folder(self, new: list[Wanted]) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = []
            for item in new:
                path = self.folder / _file_name(item)
                self._kept[_key(item)] = path
                if not _holds(path, item):
                    missing.append((item, path))
            loaded = _load_all([item for item, _ in missing])
            for (_, path), pixels in zip(missing, loaded, strict=True):
                with replacing(path) as file:
                    np.save(file, pixels, allow_pickle=False)
        except OSError as error:
            raise ToolError(
                f"cache folder {self.folder} cannot be written ({error.strerror}); name another or keep none"
            ) from error


def load(wanted: Wanted) -> np.ndarray:
    """The picture decoded as the server decodes it and scaled as `letterbox` does, uint8 `[height, width, 3]`.

    Raises ToolError for one that cannot be decoded or has another size than its labels say.
    """
    picture, height, width = wanted
    try:
        pixels = decode(picture.file.read_bytes(), LIMITS)
    except (OSError, RequestError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ToolError(f"{picture.file} cannot be read ({reason}); run `marina data prepare` again") from error
    if pixels.shape[:2] != (picture.height, picture.width):
        raise ToolError(
            f"{picture.file} has {pixels.shape[1]}x{pixels.shape[0]} pixels, but its labels are for"
            f" {picture.width}x{picture.height}; run `marina data prepare` again"
        )
    plan = Letterbox(picture.height, picture.width, height, width, 0, 0, height, width)
    scaled = letterbox(torch.from_numpy(pixels).permute(2, 0, 1), plan).permute(1, 2, 0)
    # What is decoded may only be read, and is not scaled where it has its size already.
    return scaled.clone(memory_format=torch.contiguous_format).numpy()


def _key(wanted: Wanted) -> tuple[Path, int, int]:
    return wanted.picture.file, wanted.height, wanted.width


def _load_all(wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
    """Every picture in order, decoded by as many threads as there are cores."""
    if not wanted:
        return
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool, Progress("caching", len(wanted), unit="pictures") as progress:
        # In groups, so that decoded pictures do not pile up in memory.
        for start in range(0, len(wanted), 4 * cores):
            for pixels in pool.map(load, wanted[start : start + 4 * cores]):
                progress.advance()
                yield pixels


def _file_name(wanted: Wanted) -> str:
    """A name that changes with the picture's file, so that a stale entry is never found."""
    try:
        stat = wanted.picture.file.stat()
    except OSError as error:
        raise ToolError(
            f"{wanted.picture.file} cannot be read ({error.strerror}); run `marina data prepare` again"
        ) from error
    content = (str(wanted.picture.file.resolve()), stat.st_size, stat.st_mtime_ns, wanted.height, wanted.width)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32] + ".npy"


def _holds(path: Path, wanted: Wanted) -> bool:
    """Whether `path` is a whole entry for `wanted`; a damaged one is written anew."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return pixels.shape == (wanted.height, wanted.width, 3) and pixels.dtype == np.uint8


class LoaderSettings(NamedTuple):
    """How `make_loader` makes batches.

    workers: processes, 0 for none. multiprocessing_context: how they start, None without. by_pipe: batches
    come through pipes, because shared memory is too small for them. note: a line for the user, or None.
    """

    workers: int
    multiprocessing_context: str | None
    by_pipe: bool
    note: str | None


def loader_settings(workers: int, batch_bytes: int) -> LoaderSettings:
    """What works on this machine for `workers` processes that make batches of `batch_bytes` bytes."""
    if workers == 0:
        return LoaderSettings(0, None, False, None)
    if sys.platform != "linux":
        return LoaderSettings(
            0, None, False, "workers: this system cannot share the cache with processes; pictures are prepared in one"
        )
    note = shared_memory_note(workers, batch_bytes)
    return LoaderSettings(workers, "fork", note is not None, note)


def shared_memory_note(workers: int, batch_bytes: int) -> str | None:
    """A line on shared memory too small for the batches under way, or None where it holds them.

    A worker that fills it up is killed by SIGBUS. Each has PREFETCH batches waiting and one in the making; one
    more is in training.
    """
    needed = batch_bytes * (workers * (PREFETCH + 1) + 1)
    try:
        stat = os.statvfs(SHARED_MEMORY)
        free = stat.f_bavail * stat.f_frsize
    except OSError:
        free = 0
    if free >= needed:
        return None
    return (
        f"workers: {SHARED_MEMORY} has {free / 1e6:.0f} MB free, but batches under way may take {needed / 1e6:.0f} MB;"
        f" they come through pipes, which is slower (a container gets more by --shm-size)"
    )
