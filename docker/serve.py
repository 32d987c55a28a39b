"""Process 1 of the container: checks what is to be served, runs TorchServe, and ends it between two requests.

    signatures, archives and device checked -> TorchServe's JVM, on loopback -> the relay, on the public port
    SIGTERM: no new connection -> answers under way go out, for MARINA_GRACE seconds -> JVM ended -> exit code 0

Exit code 1, and one line, when nothing can be served; that of the JVM, and never 0, when it ends by itself.
TorchServe's launcher is not used: it stays between, dies alone on SIGTERM and always exits 0.
"""

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path

from checksums import Refused, check_store
from relay import Relay
from signatures import check_signatures, read_keys

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "config.properties"
JAVA = Path("/opt/java/bin/java")
PORT = 8080
# Public keys, where they are mounted: then nothing is served that none of them has signed.
KEYS = Path("/etc/marina/keys")
# The working directory of the server: its key file, sockets and unpacked archives.
RUNTIME = Path("/tmp/torchserve")  # noqa: S108  # made below, for this user alone
# What the handlers read, as bytes, and what TorchServe's limit counts beside the answers of a batch.
ANSWER_VARIABLE = "MARINA_MAX_ANSWER_BYTES"
ANSWER_ENVELOPE = 1 << 16
GRACE_VARIABLE = "MARINA_GRACE"
GRACE_S = 25.0
CPU_VARIABLE = "MARINA_ALLOW_CPU"
# In torch/version.py, which is quicker read than imported.
CUDA_BUILD = re.compile(r"^cuda\b.*= '", re.MULTILINE)
# How long TorchServe may take to end its workers once nothing is under way; it takes 2 to 3.
END_S = 4.0
# How a JVM ends that gets SIGTERM, early or late in its life.
TOLD_TO_END = (0, 128 + signal.SIGTERM, -signal.SIGTERM)


def tell(line: str) -> None:
    print(f"serve: {line}", file=sys.stderr, flush=True)


def answer_limit(properties: str) -> dict[str, str]:
    """For the environment: how large an answer may be, where the properties set a limit of their own."""
    found = re.findall(r"^max_response_size=(\d+)\s*$", properties, re.MULTILINE)
    return {ANSWER_VARIABLE: str(int(found[-1]) - ANSWER_ENVELOPE)} if found else {}


def backend_of(properties: str) -> tuple[str, int]:
    """Where TorchServe takes requests from the relay. Raises Refused for an address that others reach too."""
    found = re.findall(r"^inference_address=(\S+)\s*$", properties, re.MULTILINE)
    address = re.fullmatch(r"http://(127\.0\.0\.1):(\d+)", found[-1] if found else "")
    if not address or int(address[2]) == PORT:
        raise Refused(
            f"{CONFIG} says inference_address={found[-1] if found else ''}; it must be http://127.0.0.1 and a port "
            f"other than {PORT}, at which clients are served from"
        )
    return address[1], int(address[2])


def grace_of(text: str | None) -> float:
    """Seconds. Raises Refused for what is no number of them."""
    if text is None:
        return GRACE_S
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise Refused(f"{GRACE_VARIABLE} is {text!r}; give seconds, such as 25")
    return float(text)


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise Refused(f"the package {name} is missing from the image")
    return Path(spec.origin).parent


def check_device(torch_version: str, visible: str | None, allow_cpu: bool) -> None:
    """TorchServe takes the CPU without a word where it finds no GPU. torch_version: the text of torch/version.py.

    Raises Refused where torch was built for GPUs and none is there, unless `allow_cpu`.
    """
    if not CUDA_BUILD.search(torch_version):
        return
    for entry in (visible or "").split(","):
        if entry.strip() and not entry.strip().lstrip("-").isdigit():
            raise Refused(f"CUDA_VISIBLE_DEVICES is {visible!r}, and TorchServe takes numbers alone: 0, or 0,1")
    if visible not in ("", "-1") and gpus():
        return
    if not allow_cpu:
        raise Refused(
            f"this is the GPU image, and there is no GPU: run with --gpus all, or with -e {CPU_VARIABLE}=1 on the CPU"
        )
    tell(f"no GPU here, serving on the CPU, as {CPU_VARIABLE}=1 allows")


def gpus() -> list[str]:
    """A line for each GPU, from the program that TorchServe asks too."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    answer = subprocess.run([program, "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU .*", answer.stdout, re.MULTILINE)


def listen(backend: tuple[str, int]) -> Relay:
    try:
        return Relay(PORT, backend)
    except OSError as error:
        raise Refused(f"port {PORT} cannot be listened on: {error}") from error


def make_runtime() -> Path:
    """The folder for temporary files, new, in RUNTIME, which becomes the working directory."""
    temporary = RUNTIME / "tmp"
    try:
        shutil.rmtree(RUNTIME, ignore_errors=True)
        temporary.mkdir(mode=0o700, parents=True)
        RUNTIME.chmod(0o700)
    except OSError as error:
        raise Refused(f"no writable /tmp ({error}): run with --tmpfs /tmp:rw,exec,size=2g") from error
    os.chdir(RUNTIME)
    return temporary


def command_line(store: Path, temporary: str) -> list[str]:
    packages = package("ts").parent
    return [
        str(JAVA),
        f"-Dmodel_server_home={packages}",
        f"-Djava.io.tmpdir={temporary}",
        f"-Dlog4j.configurationFile=file://{HERE / 'log4j2.xml'}",
        "-XX:+ExitOnOutOfMemoryError",
        # It moves bytes, and its heap is small: the second compiler and a concurrent collector would for minutes
        # take the cores from the workers, in bursts that the slowest hundredth of the answers wait for.
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        "-cp",
        f"{packages}/ts/frontend/*",
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(CONFIG),
        "-s",
        str(store),
        "-ncs",
    ]


class Server:
    """TorchServe's JVM, and the relay before it."""

    def __init__(self, relay: Relay, grace: float):
        self._relay = relay
        self._grace = grace
        self._stop, self._stop_now = asyncio.Event(), asyncio.Event()
        self._pid = 0
        self._ended: asyncio.Future[int]

    async def run(self, command: list[str]) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._pid = os.posix_spawn(command[0], command, os.environ, setpgroup=0)
        starting = asyncio.create_task(self._relay.start())
        await first(self._ended, self._stop.wait())
        starting.cancel()
        return self._exit_code() if self._ended.done() else await self._end()

    def _ask_to_stop(self) -> None:
        (self._stop_now if self._stop.is_set() else self._stop).set()

    def _reap(self) -> None:
        """Process 1 inherits the orphans of all others."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._pid:
                    self._ended.set_result(os.waitstatus_to_exitcode(ended[1]))

    def _exit_code(self) -> int:
        """Of a JVM that nobody has told to end."""
        status = self._ended.result()
        tell(f"TorchServe ended by itself, {f'with exit code {status}' if status >= 0 else f'by signal {-status}'}")
        return 128 - status if status < 0 else status or 1

    async def _end(self) -> int:
        tell(f"stopping: answers under way have {self._grace:g} s; the same signal once more stops at once")
        draining = asyncio.create_task(self._relay.drain(self._grace))
        await first(self._ended, self._stop_now.wait(), draining)
        if not draining.done() or draining.result():
            tell("stopped before every answer under way was given")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        await asyncio.wait([self._ended], timeout=END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        by_itself = self._ended.done() and self._ended.result() not in TOLD_TO_END
        return self._exit_code() if by_itself else 0


async def first(*awaitables: Awaitable[object]) -> None:
    """Return when one of them is done."""
    await asyncio.wait([asyncio.ensure_future(each) for each in awaitables], return_when=asyncio.FIRST_COMPLETED)


def main() -> int:
    # Process 1 has no default for it. Nothing is under way yet.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    store = Path(os.environ["MODEL_STORE"])
    try:
        properties = CONFIG.read_text(encoding="utf-8")
        address, grace = backend_of(properties), grace_of(os.environ.get(GRACE_VARIABLE))
        keys = read_keys(KEYS)
        # Signatures first: they need nothing of an archive to be opened.
        for line in check_signatures(store, keys, datetime.now(UTC)) if keys else []:
            tell(line)
        for line in check_store(store):
            tell(line)
        version = (package("torch") / "version.py").read_text(encoding="utf-8")
        check_device(version, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get(CPU_VARIABLE) == "1")
        temporary = str(make_runtime())
        os.environ.update(TEMP=temporary, TMPDIR=temporary, LOG_LOCATION=temporary, METRICS_LOCATION=temporary)
        os.environ.update(answer_limit(properties))
        return asyncio.run(Server(listen(address), grace).run(command_line(store, temporary)))
    except Refused as error:
        tell(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
