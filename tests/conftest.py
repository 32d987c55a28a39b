"""Fixtures that every test may use."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs, weights and reference results that lies beside a checkout."""
    if not (SHARED / "real").is_dir():
        pytest.skip(f"REAL DATA MISSING: {SHARED / 'real'} is not there, so nothing is checked against real weights")
    return SHARED
