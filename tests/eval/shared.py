"""Real collections, BEIR folders by name: beside the checkout, or where UNIMOER_TEST_DATA says."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
SHARED = Path(os.environ.get("UNIMOER_TEST_DATA") or BESIDE)


def real(name: str) -> Path:
    """The folder of a collection; the test is skipped where it is not."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there: set UNIMOER_TEST_DATA to a folder that has it")
    return SHARED / name
