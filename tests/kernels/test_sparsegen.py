"""Sparsegen: values against its definition, gradients against autograd and finite differences."""

from itertools import combinations

import entmax
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.sparsegen import sparsegen

WIDTHS = [1, 2, 3, 4, 5, 6]


def logits(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of every kind: spread out (sparse), close together (dense), and in between."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return u * torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None]


def away_from_kinks(u: Tensor, c: Tensor) -> Tensor:
    """The rows where no expert is within 1e-3 of entering or leaving the support."""
    p = reference.sparsegen(u, c)
    tau = ((u * (p > 0)).sum(-1, keepdim=True) - c) / (p > 0).sum(-1, keepdim=True)
    return ((u - tau).abs() > 1e-3).all(-1)


def brute_force(u: Tensor, c: float) -> Tensor:
    """argmin ||p - u||^2 - (1 - c) ||p||^2 over the simplex, by trying every support.

    On a fixed support the stationary point with sum 1 is linear: c p_i = u_i - tau. Among the
    supports whose point is feasible the one with the lowest objective is the answer.
    """
    best, lowest = torch.zeros_like(u), float("inf")
    for size in range(1, len(u) + 1):
        for support in combinations(range(len(u)), size):
            chosen = u[list(support)]
            p = torch.zeros_like(u)
            p[list(support)] = (chosen - (chosen.sum() - c) / size) / c
            objective = float(((p - u) ** 2).sum() - (1 - c) * (p**2).sum())
            if bool((p >= 0).all()) and objective < lowest:
                best, lowest = p, objective
    return best


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("c", [0.1, 0.7, 1.0, 2.0])
def test_is_the_projection_of_its_definition(width: int, c: float) -> None:
    u = logits(20, width)
    expected = torch.stack([brute_force(row, c) for row in u])
    torch.testing.assert_close(sparsegen(u, torch.tensor(c).double()), expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_the_reference_with_its_gradients(width: int, per_row: bool) -> None:
    u = logits(40, width, seed=width)
    c = torch.linspace(0.1, 3, 40).double()[:, None] if per_row else torch.tensor(0.8).double()
    keep = away_from_kinks(u, c)
    assert keep.sum() > 30
    u, c = u[keep], c[keep] if per_row else c
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (sparsegen, reference.sparsegen):
        inputs = u.clone().requires_grad_(), c.clone().requires_grad_()
        p = function(*inputs)
        results.append((p, *torch.autograd.grad((p * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(width: int, per_row: bool) -> None:
    u = logits(12, width, seed=3)
    c = torch.linspace(0.3, 3, 12).double()[:, None] if per_row else torch.tensor(1.3).double()
    keep = away_from_kinks(u, c)
    u, c = u[keep], c[keep] if per_row else c
    p = sparsegen(u, c)
    assert (p == 0).any() and (p > 0).all(-1).any(), "both sparse and dense rows are wanted"
    assert torch.autograd.gradcheck(sparsegen, (u.requires_grad_(), c.requires_grad_()))


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_c_of_one_is_sparsemax(width: int) -> None:
    u = logits(50, width)
    torch.testing.assert_close(sparsegen(u, torch.ones(()).double()), entmax.sparsemax(u, dim=-1))


@pytest.mark.parametrize("c", [0.1, 0.5, 4.0])
def test_c_is_a_temperature_of_sparsemax(c: float) -> None:
    u = logits(50, 3)
    expected = entmax.sparsemax(u / c, dim=-1)
    torch.testing.assert_close(sparsegen(u, torch.tensor(c).double()), expected)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_limits(width: int) -> None:
    u = logits(30, width)
    one_hot = torch.nn.functional.one_hot(u.argmax(-1), width).double()
    torch.testing.assert_close(sparsegen(u, torch.tensor(1e-9).double()), one_hot)
    uniform = torch.full_like(u, 1 / width)
    dense = sparsegen(u, torch.tensor(1e9).double())
    torch.testing.assert_close(dense, uniform, rtol=0, atol=1e-6)


def test_a_shift_of_the_logits_changes_nothing() -> None:
    u, c = logits(30, 3), torch.tensor(0.9).double()
    torch.testing.assert_close(sparsegen(u + 7, c), sparsegen(u, c))


def test_ties_share() -> None:
    p = sparsegen(torch.tensor([[2.0, 2.0, -5.0], [1.0, 1.0, 1.0]]), torch.tensor(1.0))
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_rows_lie_on_the_simplex(width: int, scale: float) -> None:
    u = logits(200, width).float() * scale + 1e3 * scale
    p = sparsegen(u, torch.tensor(2.0))
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(200), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        sparsegen(torch.zeros(2, 3, dtype=dtype), torch.ones(()))
