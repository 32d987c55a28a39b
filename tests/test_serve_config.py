"""tools.serve.config: what TorchServe is told."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.serve.config import LOG4J, TOKEN_MINUTES, properties_text, server_properties, size_limit
from tools.serve.store import Served


def served(max_bytes: int | None = None) -> Served:
    return Served(Path("/s/a.mar"), "a", "1.0", b"", "a.jpg", True, max_bytes, 0.005, 60, 60)


def properties(**changes: object) -> dict[str, str]:
    arguments = {
        "host": "127.0.0.1",
        "port": 8080,
        "management_address": "unix:/p/management.sock",
        "metrics_address": "unix:/p/metrics.sock",
        "metrics_config": "/p/metrics.yaml",
        "grpc_port": None,
        "auth": True,
        "store": "/p/store",
        "archives": {"0.mar": served(20_000_000), "1.mar": served()},
        "worker_port": 9000,
    }
    return server_properties(**(arguments | changes))


def test_only_predictions_are_offered() -> None:
    told = properties()
    assert told["inference_address"] == "http://127.0.0.1:8080"
    assert told["management_address"].startswith("unix:")
    assert told["metrics_address"].startswith("unix:")
    assert told["metrics_config"] == "/p/metrics.yaml"
    assert told["enable_model_api"] == "false"
    assert told["enable_envvars_config"] == "false"
    assert told["install_py_dep_per_model"] == "false"
    assert told["load_models"] == "0.mar,1.mar"


def test_grpc_is_on_loopback_unless_asked_for() -> None:
    quiet = properties(host="0.0.0.0")
    assert (quiet["grpc_inference_address"], quiet["grpc_inference_port"]) == ("127.0.0.1", "0")
    asked = properties(host="0.0.0.0", grpc_port=7070)
    assert (asked["grpc_inference_address"], asked["grpc_inference_port"]) == ("0.0.0.0", "7070")
    for told in (quiet, asked):
        assert (told["grpc_management_address"], told["grpc_management_port"]) == ("127.0.0.1", "0")


def test_token_is_on_and_does_not_run_out() -> None:
    assert properties()["disable_token_authorization"] == "false"
    assert properties(auth=False)["disable_token_authorization"] == "true"
    assert TOKEN_MINUTES > 365 * 24 * 60


def test_request_limit_takes_the_largest_picture_as_base64() -> None:
    assert size_limit([20_000_000, 100, None]) == 26_666_667 + (1 << 20)
    assert size_limit([None]) == size_limit([]) == size_limit([1000]) == 6_553_500
    assert size_limit([1_999_999_999]) == 2**31 - 1
    told = properties()
    assert told["max_request_size"] == told["max_response_size"] == str(26_666_667 + (1 << 20))


def test_properties_text_escapes_as_java_reads_it() -> None:
    assert properties_text({"store": "C:\\a b/é😀", "b": "x=1"}) == "store=C:\\\\a b/\\u00e9\\ud83d\\ude00\nb=x=1\n"
    for value in ("a\nb=c", "$$HOME$$"):
        with pytest.raises(ValueError, match=r"config\.properties"):
            properties_text({"a": value})


def test_log_settings_are_silent_for_each_request_and_keep_the_workers_words() -> None:
    loggers = {logger.get("name"): logger for logger in ElementTree.fromstring(LOG4J).iter("Logger")}
    assert loggers["ACCESS_LOG"].get("level") == loggers["TS_METRICS"].get("level") == "off"
    assert loggers["MODEL_LOG"].get("level") == "all"
