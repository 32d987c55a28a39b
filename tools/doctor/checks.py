"""The checks. Each looks at one thing and says what it saw, and the mend where something is wrong."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from handlers.errors import MarinaError
from tools.archive.reader import open_archive
from tools.errors import ToolError
from tools.serve import process
from tools.serve.java import find_java
from tools.serve.store import find_archives

Level = Literal["ok", "warning", "broken"]

TORCHSERVE = "0.12.0"
# TorchServe 0.12 was seen to work on these.
PYTHONS = ((3, 11), (3, 13))
# `marina serve` takes the first; a TorchServe of its own settings takes them all.
PORTS = (8080, 8081, 8082, 7070, 7071)
# What docker gives a container that asks for nothing; torch's data loaders soon fill it.
SMALL_SHM = 64 << 20
MINIMUM_TEMPORARY = 1 << 30

# Runs apart: a broken build of torch may end the process. Prints one JSON object.
IMPORTS = """
import importlib, json
seen = {}
def attempt(name, look):
    try:
        seen[name] = look()
    except BaseException as error:
        seen[name] = {"error": f"{type(error).__name__}: {error}"}
def look_torch():
    import torch
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for gpu in gpus:
        torch.ones(1, device=f"cuda:{gpu}").add_(1).item()
    return {"cuda": torch.version.cuda, "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus]}
def look_torchvision():
    import torch
    from torchvision.ops import nms
    return nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.5]), 0.5).tolist()
def look(name):
    return lambda: importlib.import_module(name) and {}
attempt("torch", look_torch)
attempt("torchvision", look_torchvision)
for name in ("yaml", "psutil", "captum", "ts.model_service_worker", "ts.torch_handler.vision_handler"):
    attempt(name, look(name))
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. mend: what to do; empty when there is nothing to."""

    level: Level
    subject: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<12} {self.text}" + (f"; {self.mend}" if self.mend else "")


def examine(store: Path, target: Path | None) -> Iterator[Finding]:
    """Every finding, the quick ones first. target: an archive or a recipe to look at too."""
    yield check_python(sys.version_info[:2])
    yield check_java()
    yield check_pairing(_version("torch"), _version("torchvision"))
    yield check_torchserve(_version("torchserve"))
    yield from (check_port(port) for port in PORTS)
    yield check_shared_memory(Path("/dev/shm"))  # noqa: S108  # looked at alone
    yield check_temporary()
    yield check_store(store)
    seen = look_at_imports()
    yield from check_imports(seen)
    yield from check_gpus(seen.get("torch", {}), _nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if target is not None:
        yield check_target(target)


def check_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    oldest, newest = (".".join(map(str, bound)) for bound in PYTHONS)
    if version < PYTHONS[0]:
        return Finding("broken", "Python", text, f"use Python {oldest} to {newest}")
    if version > PYTHONS[1]:
        return Finding("warning", "Python", f"{text}, not tried with TorchServe", f"prefer {oldest} to {newest}")
    return Finding("ok", "Python", f"{text} ({sys.executable})")


def check_java() -> Finding:
    try:
        return Finding("ok", "Java", f"{find_java()} is what `marina serve` takes")
    except ToolError as error:
        return Finding("broken", "Java", str(error))


def check_pairing(torch: str | None, torchvision: str | None) -> Finding:
    """torch 2.N and torchvision 0.(N+15) are built for each other, and no others."""
    if torch is None or torchvision is None:
        missing = " and ".join(name for name, found in (("torch", torch), ("torchvision", torchvision)) if not found)
        return Finding("broken", "torch", f"{missing} not installed", "`pip install torch torchvision`")
    wanted = _paired_torchvision(torch)
    if wanted is None:
        return Finding("warning", "torch", f"torch {torch}, torchvision {torchvision}: pairing unknown", "use torch 2")
    if not torchvision.startswith(f"{wanted}."):
        text = f"torch {torch} and torchvision {torchvision} do not match"
        return Finding("broken", "torch", text, f"`pip install 'torchvision=={wanted}.*'`")
    return Finding("ok", "torch", f"torch {torch}, torchvision {torchvision}")


def _paired_torchvision(torch: str) -> str | None:
    found = re.match(r"2\.(\d+)", torch)
    return f"0.{int(found[1]) + 15}" if found else None


def check_torchserve(version: str | None) -> Finding:
    if version is None:
        return Finding("broken", "TorchServe", "not installed", f"`pip install torchserve=={TORCHSERVE}`")
    if version != TORCHSERVE:
        mend = f"`pip install torchserve=={TORCHSERVE}`, which Marina was tested with"
        return Finding("warning", "TorchServe", version, mend)
    return Finding("ok", "TorchServe", version)


def check_imports(seen: dict[str, Any]) -> Iterator[Finding]:
    """From what IMPORTS printed: modules that are installed and do not load."""
    if "crash" in seen:
        yield Finding("broken", "imports", f"Python crashed: {seen['crash']}", "install torch and torchvision anew")
        return
    mends = {
        "torch": "`pip install --force-reinstall torch`",
        "torchvision": "install torch and torchvision from one place, both for CPU or both for one CUDA",
        "yaml": "`pip install pyyaml`, which TorchServe needs and does not install",
        "captum": "`pip install captum`, which TorchServe's vision handler needs and does not install",
    }
    broken = {name: result["error"] for name, result in seen.items() if isinstance(result, dict) and "error" in result}
    for name, error in broken.items():
        first = " ".join(error.split())[:300]
        yield Finding(
            "broken", "imports", f"{name}: {first}", mends.get(name, f"`pip install torchserve=={TORCHSERVE}`")
        )
    if not broken:
        yield Finding("ok", "imports", f"{', '.join(seen)} load, torchvision's operators run")


@dataclass(frozen=True)
class NvidiaSmi:
    """What nvidia-smi says. gpus: name, driver and memory of each. problem: why it says nothing, where it is there."""

    gpus: tuple[str, ...] = ()
    problem: str = ""


def check_gpus(torch: dict[str, Any], smi: NvidiaSmi | None, visible: str | None) -> Iterator[Finding]:
    """torch: what IMPORTS saw. smi: None without nvidia-smi. visible: the value of CUDA_VISIBLE_DEVICES."""
    try:
        process.check_cuda_devices(visible)
    except ToolError as error:
        yield Finding("broken", "GPU", str(error))
    used = torch.get("gpus", [])
    if smi is None and not used:
        yield Finding("ok", "GPU", "no nvidia-smi: models run on the CPU")
    elif smi is None:
        mend = "put nvidia-smi on PATH: TorchServe counts GPUs with it, and takes the CPU without"
        yield Finding("warning", "GPU", f"torch sees {', '.join(used)}, but there is no nvidia-smi", mend)
    elif smi.problem:
        yield Finding(
            "warning", "GPU", f"nvidia-smi fails: {smi.problem}", "mend the driver, or ignore it to use the CPU"
        )
    elif used or not smi.gpus:
        cuda = f"; torch uses {len(used)} with CUDA {torch.get('cuda')}" if used else ""
        yield Finding("ok", "GPU", ("; ".join(smi.gpus) or "nvidia-smi lists none") + cuda)
    elif visible is not None and visible.strip() in ("", "-1"):
        yield Finding("ok", "GPU", f"{'; '.join(smi.gpus)}, hidden by CUDA_VISIBLE_DEVICES={visible}")
    else:
        built = f"is built for CUDA {torch['cuda']}" if torch.get("cuda") else "is built for CPU only"
        mend = "update the driver" if torch.get("cuda") else "install torch and torchvision with CUDA"
        yield Finding("broken", "GPU", f"{'; '.join(smi.gpus)}, but torch cannot use it: it {built}", mend)


def check_port(port: int) -> Finding:
    try:
        process.bindable_port("127.0.0.1", port)
    except ToolError as error:
        return Finding("warning", f"port {port}", str(error))
    return Finding("ok", f"port {port}", "free")


def check_shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("ok", "shm", f"no {folder} on this system")
    size = shutil.disk_usage(folder).total
    if size <= SMALL_SHM:
        mend = "start the container with --shm-size=1g, or train with no loader processes"
        return Finding("warning", "shm", f"{folder} has {_megabytes(size)}", mend)
    return Finding("ok", "shm", f"{folder} has {_megabytes(size)}")


def check_temporary() -> Finding:
    """Where `marina serve` unpacks archives and keeps its sockets."""
    try:
        folder = process.private_folder()
    except ToolError as error:
        return Finding("broken", "temporary", str(error))
    try:
        free = shutil.disk_usage(folder).free
        unix = process.has_unix_sockets(folder)
    finally:
        folder.rmdir()
    text = f"{folder.parent} has {_megabytes(free)} free"
    if free < MINIMUM_TEMPORARY:
        return Finding("warning", "temporary", text, "archives are unpacked there: make room, or set TMPDIR elsewhere")
    if sys.platform == "linux" and not unix:
        return Finding("warning", "temporary", f"{text}; TorchServe uses TCP for its inner sockets", "allow exec there")
    return Finding("ok", "temporary", text)


def check_store(store: Path) -> Finding:
    if not store.exists():
        return Finding("ok", "store", f"no folder {store} yet; `marina archive build` makes archives for one")
    try:
        archives = find_archives(store)
    except MarinaError as error:
        return Finding("broken", "store", str(error))
    return Finding("ok", "store", f"{store} holds {', '.join(map(str, archives))}")


def check_target(target: Path) -> Finding:
    """An archive is opened and, if ours, loaded in a clean process; a recipe is parsed, its weights sought."""
    is_archive = target.suffix == ".mar" or zipfile.is_zipfile(target)
    try:
        return _check_archive(target) if is_archive else _check_recipe(target)
    except MarinaError as error:
        return Finding("broken", "archive" if is_archive else "recipe", str(error))


def _check_archive(target: Path) -> Finding:
    from tools.archive.dryload import dry_load

    with open_archive(target) as archive:
        title = f"{target}: {archive.name} {archive.version}"
        if archive.settings is None:
            mend = "`marina archive verify` says what else can be known"
            return Finding("warning", "archive", f"{title}, not built by Marina, so it cannot be loaded apart", mend)
    answers = dry_load(target).answers
    return Finding(
        "ok", "archive", f"{title} loads in a clean process and answers its golden pictures ({len(answers)})"
    )


def _check_recipe(target: Path) -> Finding:
    from tools.archive.build import check_recipe
    from tools.archive.recipe import is_remote, load_recipe
    from tools.archive.sources import find_weights

    recipe = load_recipe(target)
    check_recipe(recipe)
    if not is_remote(recipe.weights.file):
        find_weights(recipe, None)
    return Finding("ok", "recipe", f"{target}: {recipe.name} {recipe.version}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_at_imports() -> dict[str, Any]:
    """What IMPORTS prints, run in a process of its own; `crash` alone when that ended early."""
    # From a folder without modules of its own, so that what is installed is what is imported.
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=folder, check=False)
    try:
        seen: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = ran.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        return {"crash": f"exit code {ran.returncode}, {last[0]}"}
    return seen


def _nvidia_smi() -> NvidiaSmi | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        return NvidiaSmi(problem=str(error))
    lines = tuple(line.strip() for line in ran.stdout.splitlines() if line.strip())
    if ran.returncode:
        return NvidiaSmi(problem=" ".join(lines) or f"exit code {ran.returncode}")
    return NvidiaSmi(gpus=lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
