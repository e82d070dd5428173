"""Sparsegen-lin: a projection onto the simplex with a learned temperature, exact gradients."""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import running_sum


def _threshold(u: Tensor, c: Tensor) -> Tensor:
    """tau (..., 1) with sum_i max(u_i - tau, 0) = c, for u with maximum 0."""
    if u.shape[-1] == 3:
        # Three experts: the largest of the thresholds of the best 1, 2 and 3 logits, so no sort.
        a, b, d = u.unbind(-1)
        pair = torch.maximum(torch.maximum(a + b, a + d), b + d).unsqueeze(-1)
        total = u.sum(-1, keepdim=True)
        top = u.amax(-1, keepdim=True)
        return torch.maximum(torch.maximum(top - c, (pair - c) / 2), (total - c) / 3)
    sums = running_sum(u.sort(-1, descending=True).values)
    count = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    return ((sums - c) / count).amax(-1, keepdim=True)


class _Sparsegen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, c: Tensor) -> Tensor:
        u = u - u.amax(-1, keepdim=True)
        p = (u - _threshold(u, c)).clamp(min=0) / c
        ctx.save_for_backward(p, c)
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        p, c = ctx.saved_tensors
        support = (p > 0).to(p.dtype)
        grad = grad * support
        mean = grad.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        du = support * (grad - mean) / c
        # d/dc = -d/dlambda, since c = 1 - lambda.
        dc = (mean - (grad * p).sum(-1, keepdim=True)) / c
        return du, dc.sum_to_size(c.shape)


def sparsegen(u: Tensor, c: Tensor) -> Tensor:
    """p = argmin over the simplex of ||p - u||^2 - lambda ||p||^2, c = 1 - lambda.

    p_i = max(u_i - tau, 0) / c, where tau = max_k (sum of the k largest u - c) / k.
    On the support S = {p > 0}, with gbar the mean of the incoming gradient g over S:
    du = 1_S (g - gbar) / c and dlambda = (sum_S g p - gbar) / c.
    c -> 0 is one-hot, c = 1 is sparsemax, c -> inf is uniform; sparsegen(u; c) = sparsemax(u / c).

    Args:
        u: logits (..., E), float32 or float64.
        c: strictly positive, broadcastable to (..., 1), same dtype.
    Returns:
        weights (..., E): rows that sum to 1.
    Raises:
        ValueError: for half-precision logits (their weights would not sum to 1).

    Source: Laha et al. 2018, "On Controllable Sparse Alternatives to Softmax", section 3;
    LD-MoLE, arXiv 2509.25684.
    """
    if u.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sparsegen needs float32 or float64 logits, got {u.dtype}: cast first")
    return _Sparsegen.apply(u, c)


ROWS = 64  # of a program


# The same inside kernels, on tiles of rows (ROWS, BLOCK_E) whose first E columns are experts.


@triton.jit
def sparsegen_rows(u, c, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Weights of a tile of logits, 0 in the columns from E up; c (ROWS,).

    No sort, for any E: take the sum of the logits that are at least u_i, less c, over their number;
    the largest of these over i is tau, because ties are all in the support or all outside.
    """
    real = tl.arange(0, BLOCK_E) < E
    u = tl.where(real[None, :], u, float("-inf"))
    u -= tl.max(u, 1)[:, None]
    among = (u[:, None, :] >= u[:, :, None]) & real[None, None, :]
    count = tl.sum(tl.where(among, 1.0, 0.0), 2)
    total = tl.sum(tl.where(among, u[:, None, :], 0.0), 2)
    tau = tl.where(real[None, :], (total - c[:, None]) / count, float("-inf"))
    p = tl.maximum(u - tl.max(tau, 1)[:, None], 0.0) / c[:, None]
    return tl.where(real[None, :], p, 0.0)


@triton.jit
def sparsegen_backward_rows(p, grad, c):
    """du (ROWS, BLOCK_E) and dc (ROWS,) of a tile; p is 0 in columns that are no experts."""
    support = tl.where(p > 0, 1.0, 0.0)
    grad *= support
    # Rows beyond the last have no support: 0 / 1.
    mean = tl.sum(grad, 1) / tl.maximum(tl.sum(support, 1), 1.0)
    du = support * (grad - mean[:, None]) / c[:, None]
    return du, (mean - tl.sum(grad * p, 1)) / c


@triton.jit
def _forward(u, c, p, rows, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    row, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    at = (row * E)[:, None] + expert[None, :]
    inside = (row < rows)[:, None] & (expert < E)[None, :]
    own = tl.load(c + row, mask=row < rows, other=1.0)
    weights = sparsegen_rows(tl.load(u + at, mask=inside, other=0.0), own, E, BLOCK_E)
    tl.store(p + at, weights, mask=inside)


@triton.jit
def _backward(p, grad, c, du, dc, rows, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    row, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    at = (row * E)[:, None] + expert[None, :]
    inside = (row < rows)[:, None] & (expert < E)[None, :]
    own = tl.load(c + row, mask=row < rows, other=1.0)
    weights = tl.load(p + at, mask=inside, other=0.0)
    incoming = tl.load(grad + at, mask=inside, other=0.0)
    d_logits, d_own = sparsegen_backward_rows(weights, incoming, own)
    tl.store(du + at, d_logits, mask=inside)
    tl.store(dc + row, d_own, mask=row < rows)


class _FusedSparsegen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, c: Tensor) -> Tensor:
        u, experts = u.contiguous(), u.shape[-1]
        rows = u.numel() // experts
        own = c.expand(*u.shape[:-1], 1).contiguous()
        p = torch.empty_like(u)
        if rows:
            _forward[(triton.cdiv(rows, ROWS),)](u, own, p, rows, **_meta(experts))
        ctx.save_for_backward(p, own)
        ctx.shape = c.shape
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        p, own = ctx.saved_tensors
        rows = own.numel()
        du, dc = torch.empty_like(p), torch.empty_like(own)
        if rows:
            grid = (triton.cdiv(rows, ROWS),)
            _backward[grid](p, grad.contiguous(), own, du, dc, rows, **_meta(p.shape[-1]))
        return du, dc.sum_to_size(ctx.shape)


def _meta(experts: int) -> dict:
    return {"E": experts, "BLOCK_E": triton.next_power_of_2(experts), "ROWS": ROWS}


def fused_sparsegen(u: Tensor, c: Tensor) -> Tensor:
    """`sparsegen` in one kernel, for float32; the gradients too.

    The op by itself, for tests and bench: a model projects the same rows within `route` and
    `shrink`, on their way.
    """
    if u.dtype != torch.float32:
        raise ValueError(f"fused_sparsegen needs float32 logits, got {u.dtype}: cast first")
    return _FusedSparsegen.apply(u, c)
