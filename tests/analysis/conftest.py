"""Reports are written many times here, and their figures looked at in a few tests only."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures become empty files, which takes a tenth of the time. `draws`: they are rendered, as
    tests/test_run_study.py does with those of every experiment."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b""))
