"""The tiny collection, written once."""

from pathlib import Path

import pytest

from tests.train.tiny import write_collection


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder that nobody writes into."""
    return write_collection(tmp_path_factory.mktemp("data") / "tiny")
