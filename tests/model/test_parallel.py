"""What processes tell one another; real ones are in tests/train/test_parallel.py."""

import pytest
import torch

from model import parallel


@pytest.mark.parametrize("shape", [(10, 3), (10,), (0, 3), (1, 50)])
def test_rows_are_summed_a_chunk_at_a_time(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process is played: its rows are the same as ours."""
    sent = []

    def add(tensors: list[torch.Tensor]) -> None:
        sent.append(tensors[0].nbytes)
        tensors[0].mul_(2)

    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "add", add)
    monkeypatch.setattr(parallel, "CHUNK", 40)
    rows = torch.randn(*shape)
    expected = 2 * rows
    assert torch.equal(parallel.together(rows, torch.device("cpu")), expected)
    row = rows[0].nbytes if len(rows) else 0
    assert sum(sent) == rows.nbytes and all(size <= max(40, row) for size in sent)
