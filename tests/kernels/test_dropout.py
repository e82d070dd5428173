"""kernels/dropout.py: the mask of a token is its own, and as good as independent draws."""

import pytest
import torch
from torch import Tensor

from kernels import dropout
from kernels.dropout import dropout_mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
N, D = 600, 700


def mask(places: Tensor, p: float, seed: int = 0, features: int = D) -> Tensor:
    torch.manual_seed(seed)
    return dropout_mask(places, features, p, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_has_its_mask_wherever_it_runs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mask(torch.arange(N), 0.3)
    some = torch.tensor([0, 599, 17, 18, 300], device=device)
    assert torch.equal(mask(some, 0.3).cpu(), whole[some.cpu()])
    monkeypatch.setattr(dropout, "AT_ONCE", 10 * D)
    assert torch.equal(mask(torch.arange(N, device=device), 0.3).cpu(), whole)
    monkeypatch.setattr(dropout, "AT_ONCE", 1)  # never less than a row
    assert torch.equal(mask(some, 0.3).cpu(), whole[some.cpu()])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_it_drops_as_often_as_it_says(p: float) -> None:
    """In all, in each row and in each column, within five standard errors; what is kept is
    1 / (1 - p)."""
    found = mask(torch.arange(N), p)
    torch.testing.assert_close(found[found > 0], torch.full_like(found[found > 0], 1 / (1 - p)))
    dropped = (found == 0).double()
    for share, count in ((dropped.mean(), N * D), (dropped.mean(0), N), (dropped.mean(1), D)):
        assert ((share - p).abs() <= 5 * (p * (1 - p) / count) ** 0.5).all()


def test_rows_columns_and_calls_are_independent() -> None:
    """Products of what is centred and scaled, over neighbours, far rows and calls, have mean 0 and
    a largest correlation like that of as many independent pairs (6 standard errors of 360,000)."""
    signs = [(mask(torch.arange(N), 0.5, seed) - 1).double() for seed in (0, 1)]
    one, other = signs
    pairs = {
        "calls": one * other,
        "rows": one[1:] * one[:-1],
        "columns": one[:, 1:] * one[:, :-1],
        "far": one[: N // 2] * one[N // 2 :],
        "squares": one[1:, 1:] * one[:-1, :-1] * one[1:, :-1] * one[:-1, 1:],
    }
    for name, product in pairs.items():
        assert abs(product.mean()) < 5 / product.numel() ** 0.5, name
    for rows in (one, one.t()):
        correlation = rows @ rows.t() / rows.shape[1]
        assert correlation.fill_diagonal_(0).abs().max() < 6 / rows.shape[1] ** 0.5


def test_a_call_takes_one_number_of_the_generator_whatever_the_batch() -> None:
    after = []
    for places in (torch.arange(3), torch.arange(500)):
        mask(places, 0.5)
        after.append(torch.rand(2))
    assert torch.equal(after[0], after[1])


def test_no_product_of_the_hash_reaches_the_sign() -> None:
    largest = torch.tensor([dropout.MASK])
    assert int(largest) * 0x45D9F3B < 2**63
    mixed = dropout._mixed(torch.arange(1 << 16))
    assert mixed.min() >= 0 and mixed.max() <= dropout.MASK and len(mixed.unique()) == 1 << 16
