"""What processes tell one another; real ones are in tests/train/test_parallel.py."""

from pathlib import Path

import pytest
import torch

from model import parallel
from tests.processes import ranks


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


TEXTS = ["", "a", "text of some length", "\N{SNOWMAN}", "b"]


def spread(count: int) -> int:
    """What a rank has tokenized itself, and whether it ended with all token ids."""
    parallel.join("cpu")
    asked = []

    def tokenize(texts):
        asked.extend(texts)
        return [[ord(c) for c in text] for text in texts]

    found = parallel.spread(tokenize, TEXTS[:count], torch.device("cpu"))
    assert found == [[ord(c) for c in text] for text in TEXTS[:count]]
    print(len(asked))
    parallel.leave()
    return 0


@pytest.mark.parametrize(("count", "parts"), [(5, [3, 2]), (1, [1, 0]), (0, [0, 0])])
def test_each_process_tokenizes_its_part(count: int, parts: list[int], tmp_path: Path) -> None:
    job = ranks(2, tmp_path, spread, count)
    assert [child.wait() for child in job] == [0, 0], [child.text for child in job]
    assert [int(child.text.split()[-1]) for child in job] == parts
