"""Fixtures that every test may use."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from handlers.pipeline import Pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

# A slow machine is no fault of the code.
settings.register_profile("marina", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("marina")


def pytest_configure() -> None:
    """A shell that starts something in the background has it ignore SIGINT, which the tests of interrupts send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, weights and reference results that lies beside a checkout."""
    if not (SHARED / "real").is_dir():
        pytest.skip(f"REAL DATA MISSING: {SHARED / 'real'} is not there, so nothing is checked against real weights")
    return SHARED


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and parsed model-config.yaml of an untrained YOLOv5n; many detections, none of them sensible."""
    from model_folder import write_model

    folder = tmp_path_factory.mktemp("small")
    return folder, write_model(folder)


@pytest.fixture(scope="session")
def small_pipeline(small_model: tuple[Path, dict[str, Any]]) -> "Pipeline":
    from handlers.pipeline import Pipeline

    return Pipeline.load(*small_model)
