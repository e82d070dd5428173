"""Residual add, RMSNorm into the next buffer, and the pooled sums that the router reads: one pass.

    h = x + delta,   n = w h / sqrt(mean(h^2) + eps)   (arXiv 1910.07467),   pooled = mean_t n

As in the plain path, h and n are rounded to the compute dtype, everything else is fp32. A program
takes one chunk of a text (`kernels.segments`), so it can keep the sum over its tokens in registers.
"""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segments import Segments, sum_chunks


@triton.jit
def _forward(
    x, delta, weight, h, normed, partial, rstd, chunks, stride_x, stride_delta, stride_normed, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    count = tl.load(chunks + 3 * chunk + 1) - first
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    dtype = normed.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(count):
        token = first.to(tl.int64) + i
        value = tl.load(x + token * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(delta + token * stride_delta + cols, mask=inside, other=0.0).to(
                tl.float32
            )
            value = value.to(dtype).to(tl.float32)
            tl.store(h + token * D + cols, value.to(dtype), mask=inside)
        r = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        n = ((value * r).to(dtype).to(tl.float32) * w).to(dtype)
        tl.store(normed + token * stride_normed + cols, n, mask=inside)
        tl.store(rstd + token, r)
        total += n.to(tl.float32)
    if POOL:
        tl.store(partial + chunk.to(tl.int64) * D + cols, total, mask=inside)


@triton.jit
def _backward(
    h, weight, rstd, dh, dn, d_pooled, dx, chunks, lengths, stride_h, stride_dh, stride_dn,
    stride_dx, D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    count = tl.load(chunks + 3 * chunk + 1) - first
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    shared = tl.zeros((BLOCK,), tl.float32)
    if POOL:
        text = tl.load(chunks + 3 * chunk + 2)
        length = tl.load(lengths + text).to(tl.float32)
        shared += tl.load(d_pooled + text.to(tl.int64) * D + cols, mask=inside, other=0.0) / length
    for i in range(count):
        token = first.to(tl.int64) + i
        r = tl.load(rstd + token)
        hat = tl.load(h + token * stride_h + cols, mask=inside, other=0.0).to(tl.float32) * r
        g = tl.load(dn + token * stride_dn + cols, mask=inside, other=0.0).to(tl.float32)
        g = (g + shared) * w
        d = r * (g - hat * (tl.sum(g * hat, 0) / D))
        if RESIDUAL:
            d += tl.load(dh + token * stride_dh + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + token * stride_dx + cols, d.to(dx.dtype.element_ty), mask=inside)


class _AddRMSNormPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, delta, weight, eps: float, segments: Segments, left: int, right: int, pooled: bool
    ):
        n, d = x.shape
        x, delta = _rows(x), None if delta is None else _rows(delta)
        h = x if delta is None else x.new_empty(n, d)
        normed = x.new_empty(n, left + d + right)
        rstd = x.new_empty(n, dtype=torch.float32)
        partial = x.new_empty(len(segments.chunks) if pooled else 0, d, dtype=torch.float32)
        if n:
            block = triton.next_power_of_2(d)
            _forward[(len(segments.chunks),)](
                x, delta, weight, h, normed[:, left:], partial, rstd, segments.chunks,
                x.stride(0), 0 if delta is None else delta.stride(0), normed.stride(0), eps,
                D=d, BLOCK=block, ADD=delta is not None, POOL=pooled, num_warps=_warps(block),
            )  # fmt: skip
        ctx.save_for_backward(h, weight, rstd)
        ctx.segments, ctx.left = segments, left
        ctx.set_materialize_grads(False)
        ctx.delta_width = None if delta is None else delta.shape[1]
        means = sum_chunks(partial, segments, mean=True) if pooled else None
        if delta is None:  # an input that is also an output would be copied by autograd
            return None, normed, means
        return h, normed, means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh: Tensor | None, dn: Tensor | None, d_pooled: Tensor | None):
        h, weight, rstd = ctx.saved_tensors
        n, d = h.shape
        if dn is None:  # of a loss that reads the routing alone, on its way back by itself
            dn = torch.zeros(n, ctx.left + d, dtype=h.dtype, device=h.device)
        # As wide as delta was: what made delta needs the columns behind it for its own backward.
        width = d if ctx.delta_width is None else ctx.delta_width
        dx = h.new_empty(n, width)
        if n:
            dn = _rows(dn[:, ctx.left : ctx.left + d])
            dh = None if dh is None else _rows(dh)
            block = triton.next_power_of_2(d)
            _backward[(len(ctx.segments.chunks),)](
                h, weight, rstd, dh, dn, None if d_pooled is None else d_pooled.contiguous(), dx,
                ctx.segments.chunks, ctx.segments.lengths,
                h.stride(0), 0 if dh is None else dh.stride(0), dn.stride(0), dx.stride(0),
                D=d, BLOCK=block, RESIDUAL=dh is not None, POOL=d_pooled is not None,
                num_warps=_warps(block),
            )  # fmt: skip
        wide = None if ctx.delta_width is None else dx
        return dx[:, :d], wide, None, None, None, None, None, None


def _rows(t: Tensor) -> Tensor:
    """As the kernels read it: any stride between rows, none within. (A sum's gradient has 0.)"""
    return t if t.stride(1) == 1 else t.contiguous()


def _warps(block: int) -> int:
    """8 values a thread, 4 warps at least; with 16 values the kernel spills on sm_80."""
    return min(32, max(4, block // 256))


def add_rmsnorm_pool(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    segments: Segments,
    left: int = 0,
    right: int = 0,
    pooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual stream after a block, and what the next block reads.

    Args:
        x: (N, D). delta: (N, D + anything), what the block adds, or None for nothing.
        weight: (D,), frozen: it gets no gradient.
        segments: where the texts lie. left, right: columns to leave free beside the result.
        pooled: also return the mean of the normalised rows of each text.
    Returns:
        h (N, D); normed (N, left + D + right), only its D columns written; pooled (B, D) fp32 or
        None.
    """
    h, normed, means = _AddRMSNormPool.apply(x, delta, weight, eps, segments, left, right, pooled)
    return (x if delta is None else h), normed, means
