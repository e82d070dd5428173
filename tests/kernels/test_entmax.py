"""entmax-1.5 against the entmax package, its limits, and its gradient."""

import pytest
import torch
from entmax import entmax15 as published

from kernels.entmax import entmax15

SHAPES = [(7, 3), (5, 2, 8), (4, 1), (0, 3)]


def logits(shape: tuple[int, ...], scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_equals_the_package(shape: tuple[int, ...]) -> None:
    u = logits(shape)
    torch.testing.assert_close(entmax15(u), published(u, dim=-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_lie_on_the_simplex(shape: tuple[int, ...]) -> None:
    p = entmax15(logits(shape))
    assert p.shape == shape and (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(shape[:-1], dtype=p.dtype))


def test_limits() -> None:
    """Equal logits are uniform; 2 apart is one-hot, since x = u / 2 then differs by 1."""
    torch.testing.assert_close(entmax15(torch.zeros(1, 3)), torch.full((1, 3), 1 / 3))
    assert entmax15(torch.tensor([[2.0, 0.0, 0.0]]))[0].tolist() == pytest.approx([1, 0, 0])
    assert (entmax15(torch.tensor([[1.9, 0.0, 0.0]])) > 0).all()


def test_gradcheck_away_from_kinks() -> None:
    u = logits((6, 3)).requires_grad_()
    assert torch.autograd.gradcheck(entmax15, (u,))


def test_off_the_support_there_is_no_gradient() -> None:
    u = torch.tensor([[3.0, 2.5, -4.0]], requires_grad=True)
    (entmax15(u) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert u.grad is not None and u.grad[0, 2] == 0 and u.grad[0, 0] < 0
    torch.testing.assert_close(u.grad[0, 0], -u.grad[0, 1])
