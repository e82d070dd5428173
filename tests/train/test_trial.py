"""What the trials of a process share."""

from pathlib import Path

import pytest

from tests.train.tiny import tiny_config, write_collection
from train import trial
from train.trial import Workbench


def test_no_states_are_kept_beyond_the_limit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the lower layers are run again each time, and the disk stays as it was."""
    data = write_collection(tmp_path / "tiny")
    config = tiny_config(tiny_base, data, prefix=True)
    bench = Workbench(str(data), "cpu", tmp_path / "cache", True)
    model, ids = bench.model(config), [[1, 2, 3], [4]]
    assert bench.states(model, config)(ids, "texts").states is not None
    size = 2 * 4 * model.decoder.config.hidden_size
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.states")) == size
    monkeypatch.setattr(trial, "LIMIT", size - 1)
    found = bench.states(model, config)(ids, "texts")
    assert found.states is None and found.ids == ids
