"""The CPU path's elementwise ops against the reference: values, gradients, views, halves."""

import pytest
import torch
from torch import Tensor

from kernels import elementwise, reference

ROWS = (0, 1, 7, 300)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(rows: int, half: int) -> tuple[Tensor, Tensor]:
    turn = 6 * drawn(rows, half, seed=3)
    return turn.cos(), turn.sin()


CASES = {
    "rms_norm": lambda m, x: m.rms_norm(x, drawn(16, seed=1).to(x.dtype), 1e-5),
    "rms_norm of heads": lambda m, x: m.rms_norm(
        x.unflatten(1, (2, 8)), drawn(8, seed=1).to(x.dtype), 1e-5
    ).flatten(1),
    "rope": lambda m, x: m.rope(
        x.unflatten(1, (2, 8)), *(t.to(x.dtype) for t in angles(len(x), 4))
    ).flatten(1),
    "swiglu": lambda m, x: m.swiglu(*x.chunk(2, 1)),
}
each = pytest.mark.parametrize("case", CASES)


@each
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
def test_values_and_gradients(case: str, rows: int, view: bool) -> None:
    """In float64, also of columns of a wider tensor, with a gradient whose rows lie apart."""
    wide = 10 * drawn(rows, 24)
    outputs = []
    for module in (elementwise, reference):
        x = (wide[:, 4:20] if view else wide[:, :16].contiguous()).detach().requires_grad_()
        y = CASES[case](module, x)
        dy = drawn(rows, 2 * y.shape[1], seed=2)[:, ::2]
        outputs.append((y, torch.autograd.grad(y, x, dy)[0]))
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each
def test_gradients_by_differences(case: str) -> None:
    x = drawn(3, 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: CASES[case](elementwise, x), x)


def test_a_row_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(2, 16, dtype=torch.float64, requires_grad=True)
    elementwise.rms_norm(x, torch.ones(16, dtype=torch.float64), 1e-5).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 16), 1e-5**-0.5, dtype=torch.float64))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_halves_are_rounded_as_the_reference_rounds_them(case: str, dtype: torch.dtype) -> None:
    """No further from float64 than the reference is, values and gradients."""
    x = drawn(300, 16).to(dtype)
    errors = []
    for module, kind in ((elementwise, dtype), (reference, dtype), (reference, torch.float64)):
        leaf = x.to(kind).detach().requires_grad_()
        y = CASES[case](module, leaf)
        [dx] = torch.autograd.grad(y, leaf, drawn(*y.shape, seed=2).to(dtype).to(kind))
        assert y.dtype == dx.dtype == kind
        errors.append((y.double(), dx.double()))
    for found, same, truth in zip(*errors, strict=True):
        limit = 1.2 * (same - truth).norm() + 1e-6 * truth.norm()
        assert (found - truth).norm() <= limit


@each
@torch.no_grad()
def test_inputs_stay_as_they_are(case: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = drawn(5, 16).to(dtype)
        kept = x.clone()
        CASES[case](elementwise, x)
        assert torch.equal(x, kept)
