"""How often frozen-prefix states are computed."""

import pytest

from model import prefix


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that states are computed and not read."""
    calls: list[int] = []
    original = prefix._compute

    def count(*args, **kwargs) -> None:
        calls.append(1)
        original(*args, **kwargs)

    monkeypatch.setattr(prefix, "_compute", count)
    return calls
