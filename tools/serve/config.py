"""The files that TorchServe reads at start: config.properties, its metrics and its log settings. Pure text."""

import math
from collections.abc import Iterable, Mapping

import yaml

from handlers.metrics import COUNTERS
from tools.serve.store import Served

# TorchServe's default for both directions.
SMALLEST_LIMIT = 6_553_500
# The rest of a request around the base64 of one picture: JSON or multipart, options, headers.
ENVELOPE = 1 << 20
LARGEST_LIMIT = 2**31 - 1
# TorchServe never renews a token, so an expired one locks every user out until the next start. The
# token dies with the server anyway: ten years means never.
TOKEN_MINUTES = 10 * 365 * 24 * 60

METRICS_HEADER = (
    "# TorchServe's own metrics, and those of Marina's handlers: marina_*, as handlers/metrics.py declares them.\n"
)

LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders>
    <Console name="STDOUT" target="SYSTEM_OUT">
      <PatternLayout pattern="%d{ISO8601} [%p] [%t] %c - %m%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <!-- A line or more for every request: 20 to 60 % of the throughput. -->
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <!-- What the workers print, but for the line that TorchServe adds to every batch. -->
    <Logger name="MODEL_LOG" level="all">
      <RegexFilter regex="Backend received inference at: \\d+" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <!-- Warns of socket options that unix sockets do not have. -->
    <Logger name="io.netty" level="error"/>
    <Root level="warn">
      <AppenderRef ref="STDOUT"/>
    </Root>
  </Loggers>
</Configuration>
"""


def size_limit(max_bytes: Iterable[int | None]) -> int:
    """The largest request, bytes: the largest picture that an archive takes, as base64, in its envelope.

    Archives that set no limit (None) get TorchServe's default.
    """
    largest = max((math.ceil(size * 4 / 3) + ENVELOPE for size in max_bytes if size), default=0)
    return min(max(largest, SMALLEST_LIMIT), LARGEST_LIMIT)


def server_properties(
    *,
    host: str,
    port: int,
    management_address: str,
    metrics_address: str,
    metrics_config: str,
    grpc_port: int | None,
    auth: bool,
    store: str,
    archives: Mapping[str, Served],
    worker_port: int,
    takes_models: bool = False,
) -> dict[str, str]:
    """TorchServe's settings. `archives` maps the file name in `store` to what it holds, in the order of loading;
    `metrics_config` is the file that holds `metrics_yaml`.

    TorchServe cannot leave gRPC off: without `grpc_port` it listens on loopback, on ports that nobody
    is told; so does gRPC management always. Both want the token. takes_models: whether archives may be
    registered and removed while it runs, by way of its management API.
    """
    limit = str(size_limit(served.max_bytes for served in archives.values()))
    return {
        "inference_address": f"http://{host}:{port}",
        "management_address": management_address,
        "metrics_address": metrics_address,
        "grpc_inference_address": "127.0.0.1" if grpc_port is None else host,
        "grpc_inference_port": str(grpc_port or 0),
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": "0",
        "initial_worker_port": str(worker_port),
        "disable_token_authorization": str(not auth).lower(),
        "token_expiration_min": str(TOKEN_MINUTES),
        "enable_model_api": str(takes_models).lower(),
        # Archives come from the store alone: this matches no URL.
        "allowed_urls": "(?!)",
        "enable_envvars_config": "false",
        "install_py_dep_per_model": "false",
        "model_store": store,
        "load_models": ",".join(archives),
        # For archives that do not say; TorchServe would take one worker a core, each with a thread a core.
        "default_workers_per_model": "1",
        "job_queue_size": "100",
        "max_request_size": limit,
        "max_response_size": limit,
        "metrics_mode": "prometheus",
        "metrics_config": metrics_config,
        # Its collector needs nvgpu on a GPU machine and starts a Python process every minute.
        "disable_system_metrics": "true",
    }


def metrics_yaml(torchserves: str) -> str:
    """The metrics of `torchserves`, TorchServe's own metrics.yaml, and those of our handlers."""
    metrics = yaml.safe_load(torchserves)
    counters = metrics["model_metrics"].setdefault("counter", [])
    for name, (unit, dimensions) in COUNTERS.items():
        counters.append({"name": name, "unit": unit, "dimensions": list(dimensions)})
    return METRICS_HEADER + yaml.safe_dump(metrics, sort_keys=False, default_flow_style=None, width=120)


def properties_text(properties: Mapping[str, str]) -> str:
    """A java.util.Properties file: ASCII, with backslashes and everything beyond ASCII escaped."""
    lines = []
    for key, value in properties.items():
        if "\n" in value or "$$" in value:
            raise ValueError(f"{key}={value!r} cannot stand in config.properties")
        escaped = value.replace("\\", "\\\\")
        utf16 = "".join(
            char if char.isascii() else "".join(f"\\u{unit:04x}" for unit in _utf16_units(char)) for char in escaped
        )
        lines.append(f"{key}={utf16}\n")
    return "".join(lines)


def _utf16_units(char: str) -> list[int]:
    raw = char.encode("utf-16-be")
    return [int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2)]
