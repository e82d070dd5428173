"""model/packed.py: what a batch of packed texts holds."""

import pytest
import torch

from model.packed import pack, segment_mean


def test_packed_fields() -> None:
    batch = pack([[7, 8], [5, 6], [4], [1, 2, 3]])
    assert batch.input_ids.tolist() == [7, 8, 5, 6, 4, 1, 2, 3]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 0, 1, 2]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert batch.last.tolist() == [1, 3, 4, 7]
    assert batch.segments.starts.tolist() == [0, 2, 4, 5, 8]
    assert batch.groups == [(2, 2), (1, 1), (1, 3)]
    x = torch.arange(8.0)[:, None]
    assert segment_mean(x, batch).flatten().tolist() == [0.5, 2.5, 4.0, 6.0]


def test_segment_mean_of_half_precision_is_taken_in_fp32() -> None:
    x = torch.full((5000, 1), 0.1, dtype=torch.bfloat16)
    mean = segment_mean(x, pack([[0] * 5000]))
    torch.testing.assert_close(mean, x[:1].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ids", [[], [[1, 2], []]])
def test_pack_refuses_nothing(ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        pack(ids)
