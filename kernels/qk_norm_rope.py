"""RMSNorm of each query and key head (Qwen3 has it, Mistral and Llama have not), then RoPE.

For one head x of size K, the position's angles a and, where there is a norm, its weight w:

    h = w x / sqrt(mean(x^2) + eps)                                    (arXiv 1910.07467)
    y = [h1 cos a - h2 sin a | h2 cos a + h1 sin a],  h = [h1 | h2]    (arXiv 2104.09864)

One pass over the output of the q,k,v GEMM; the gradients of q, k and v meet in one buffer that has
room for the rank columns of the backward GEMM (`kernels.bordered`).
"""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # heads a program handles, counted over tokens and heads


@triton.jit
def _forward(
    qkv, y, cos, sin, q_weight, k_weight, rows, stride, eps,
    H: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, HALF)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    inside = (row < rows)[:, None] & (col < K // 2)[None, :]
    at = qkv + (token * stride + head * K)[:, None] + col[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + K // 2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        r = tl.rsqrt(square / K + eps)[:, None]
        q = (head < H)[:, None]
        first *= r * _weight(q_weight, k_weight, q, col[None, :], inside)
        second *= r * _weight(q_weight, k_weight, q, col[None, :] + K // 2, inside)
    angle = (token * (K // 2))[:, None] + col[None, :]
    c, s = (
        tl.load(cos + angle, mask=inside, other=0.0),
        tl.load(sin + angle, mask=inside, other=0.0),
    )
    out = y + (token * (HEADS * K) + head * K)[:, None] + col[None, :]
    tl.store(out, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(out + K // 2, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weight(q_weight, k_weight, q, col, inside):
    """The norm's weight of a query head where q, else of a key head."""
    of_q = tl.load(q_weight + col, mask=inside & q, other=0.0).to(tl.float32)
    return of_q + tl.load(k_weight + col, mask=inside & (q == 0), other=0.0).to(tl.float32)


@triton.jit
def _backward(
    qkv, dq, dk, dv, d_qkv, cos, sin, q_weight, k_weight,
    rows, stride, stride_q, stride_k, stride_v, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H + 2 * G
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, HALF)[None, :]
    token, head = (row // HEADS).to(tl.int64)[:, None], (row % HEADS)[:, None]
    inside = (row < rows)[:, None] & (col < K // 2)
    is_q, is_v = inside & (head < H), inside & (head >= H + G)
    is_k = inside & (head >= H) & (head < H + G)
    from_q = dq + token * stride_q + head * K + col
    from_k = dk + token * stride_k + (head - H) * K + col
    from_v = dv + token * stride_v + (head - H - G) * K + col
    g1 = tl.load(from_q, mask=is_q, other=0.0).to(tl.float32)
    g2 = tl.load(from_q + K // 2, mask=is_q, other=0.0).to(tl.float32)
    g1 += tl.load(from_k, mask=is_k, other=0.0).to(tl.float32)
    g2 += tl.load(from_k + K // 2, mask=is_k, other=0.0).to(tl.float32)
    turned = is_q | is_k
    angle = token * (K // 2) + col
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    d1, d2 = g1 * c + g2 * s, g2 * c - g1 * s  # the rotation, backwards
    at = token * stride + head * K + col
    if NORM:
        x1 = tl.load(qkv + at, mask=turned, other=0.0).to(tl.float32)
        x2 = tl.load(qkv + at + K // 2, mask=turned, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / K + eps)[:, None]
        x1, x2 = x1 * r, x2 * r
        d1 *= _weight(q_weight, k_weight, head < H, col, turned)
        d2 *= _weight(q_weight, k_weight, head < H, col + K // 2, turned)
        along = ((tl.sum(d1 * x1, 1) + tl.sum(d2 * x2, 1)) / K)[:, None]
        d1, d2 = r * (d1 - along * x1), r * (d2 - along * x2)
    d1 += tl.load(from_v, mask=is_v, other=0.0).to(tl.float32)
    d2 += tl.load(from_v + K // 2, mask=is_v, other=0.0).to(tl.float32)
    tl.store(d_qkv + at, d1.to(d_qkv.dtype.element_ty), mask=inside)
    tl.store(d_qkv + at + K // 2, d2.to(d_qkv.dtype.element_ty), mask=inside)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, cos, sin, q_weight, k_weight, eps: float, h: int, g: int, k: int):
        qkv, n = qkv.contiguous(), len(qkv)
        half, norm = triton.next_power_of_2(k // 2), q_weight is not None
        y = qkv.new_empty(n, h + g, k)
        if n:
            rows = n * (h + g)
            _forward[(triton.cdiv(rows, ROWS),)](
                qkv, y, cos, sin, q_weight, k_weight, rows, qkv.stride(0), eps,
                H=h, HEADS=h + g, K=k, HALF=half, NORM=norm, ROWS=ROWS,
            )  # fmt: skip
        # Without a norm the op is linear, and its gradient does not look at the input.
        ctx.save_for_backward(qkv if norm else None, cos, sin, q_weight, k_weight)
        ctx.shape, ctx.stride, ctx.eps, ctx.dtype = (n, h, g, k), qkv.stride(0), eps, qkv.dtype
        v = qkv[:, (h + g) * k : (h + 2 * g) * k].unflatten(1, (g, k))
        return y[:, :h], y[:, h:], v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        n, h, g, k = ctx.shape
        d_qkv = torch.empty(n, ctx.stride, dtype=ctx.dtype, device=cos.device)
        if n:
            dq, dk, dv = (_rows(t) for t in (dq, dk, dv))
            rows = n * (h + 2 * g)
            _backward[(triton.cdiv(rows, ROWS),)](
                qkv, dq, dk, dv, d_qkv, cos, sin, q_weight, k_weight,
                rows, ctx.stride, dq.stride(0), dk.stride(0), dv.stride(0), ctx.eps,
                H=h, G=g, K=k, HALF=triton.next_power_of_2(k // 2),
                NORM=qkv is not None, ROWS=ROWS,
            )  # fmt: skip
        return d_qkv, None, None, None, None, None, None, None, None


def _rows(t: Tensor) -> Tensor:
    """(N, heads, K) whose heads lie side by side; rows may be apart."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


def qk_norm_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    heads: int,
    key_heads: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of the q,k,v GEMM; normalise and rotate queries and keys.

    Args:
        qkv: (N, (H + 2 G) K + anything): queries, keys, values, then columns that are not read.
        cos, sin: (N, K / 2) fp32, of each token's position times the inverse frequencies.
        q_weight, k_weight: (K,) of the norms, or None for both.
    Returns:
        q (N, H, K), k (N, G, K), v (N, G, K); v is a view of `qkv`.
    """
    return _QKNormRope.apply(qkv, cos, sin, q_weight, k_weight, eps, heads, key_heads, size)
