"""Packed attention against the definition, one sequence at a time."""

from itertools import groupby

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention

# runs of equal lengths, the same length again later, and nothing sorted
LENGTHS = (5, 5, 1, 9, 3, 5, 9, 9)


def qkv(lengths: tuple[int, ...], heads: int, kv_heads: int, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(lengths), h, size, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    ]


def runs(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(len(list(run)), length) for length, run in groupby(lengths)]


def by_definition(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """The reference, sequence by sequence of LENGTHS."""
    parts = zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True)
    return torch.cat([reference.attention(*part, causal, window) for part in parts])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_equals_the_definition(causal: bool, window: int | None, heads: int, kv_heads: int) -> None:
    q, k, v = tensors = [t.requires_grad_() for t in qkv(LENGTHS, heads, kv_heads)]
    found = attention(q, k, v, runs(LENGTHS), causal=causal, window=window)
    expected = by_definition(q, k, v, causal, window)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = [torch.autograd.grad((y * weight).sum(), tensors) for y in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Its own dtype out; the error is that of rounding the inputs and the result."""
    q, k, v = (t.to(dtype) for t in qkv(LENGTHS, 4, 2))
    found = attention(q, k, v, runs(LENGTHS), causal=True)
    expected = by_definition(q.double(), k.double(), v.double(), True, None)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=2 * eps)


def test_definition_by_hand() -> None:
    """Two tokens, one head of size 1: scores q k, softmax by hand, in and out of the window."""
    q = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    k = torch.tensor([0.5, -0.5]).view(2, 1, 1)
    v = torch.tensor([10.0, 20.0]).view(2, 1, 1)
    sigmoid = torch.sigmoid(torch.tensor([1.0, 2.0]))  # weight of the first token: q (k_0 - k_1)
    both = 20 - 10 * sigmoid
    for causal, window, expected in (
        (False, None, both),
        (True, None, torch.stack((v[0, 0, 0], both[1]))),
        (True, 1, torch.tensor([10.0, 20.0])),
        (False, 2, both),
    ):
        found = reference.attention(q, k, v, causal, window).flatten()
        torch.testing.assert_close(found, expected)


def test_other_sequences_change_nothing() -> None:
    """NaN in one text stays there."""
    q, k, v = qkv((4, 4, 2), 2, 1)
    clean = attention(q, k, v, runs((4, 4, 2)), causal=False)
    for t in (q, k, v):
        t[4:8] = float("nan")
    dirty = attention(q, k, v, runs((4, 4, 2)), causal=False)
    assert dirty[4:8].isnan().all()
    torch.testing.assert_close(dirty[:4], clean[:4])
    torch.testing.assert_close(dirty[8:], clean[8:])
