"""The router of one layer on what it routes (texts, or tokens): MLP and Sparsegen in one kernel.

    z = U x / rms(x) + b,   u = V silu(z) + d + offset,   w = sparsegen(u; c)

See `kernels.sparsegen` for the projection. The kernel keeps z and w; the backward kernel turns dw
into dz and du, and the gradients of the MLP are then four small products, added up by the GEMM
in one order.
"""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.choice import has_matrix_units
from kernels.sparsegen import sparsegen_backward_rows, sparsegen_rows

ROWS = 16


@triton.jit
def expert_logits(
    z, down, down_bias, offset, row, inside,
    HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """z (ROWS, BLOCK_HIDDEN) -> u (ROWS, BLOCK_E) = V silu(z) + d + offset."""
    hidden, expert = tl.arange(0, BLOCK_HIDDEN), tl.arange(0, BLOCK_E)
    act = z * tl.sigmoid(z)
    u = tl.zeros((z.shape[0], BLOCK_E), tl.float32)
    for e in tl.static_range(E):
        v = tl.load(down + e * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
        logit = tl.sum(act * v[None, :], 1) + tl.load(down_bias + e)
        u = tl.where(expert[None, :] == e, logit[:, None], u)
    if OFFSET:
        at = (row * E)[:, None] + expert[None, :]
        u += tl.load(offset + at, mask=inside[:, None] & (expert < E)[None, :], other=0.0)
    return u


@triton.jit
def _forward(
    x, up, up_bias, down, down_bias, c, offset, z_out, w_out, rows, stride,
    D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, OFFSET: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    hidden, expert = tl.arange(0, BLOCK_HIDDEN), tl.arange(0, BLOCK_E)
    z = tl.zeros((ROWS, BLOCK_HIDDEN), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        at = row.to(tl.int64)[:, None] * stride + k[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & (k < D)[None, :], other=0.0).to(tl.float32)
        u_tile = tl.load(
            up + hidden[None, :] * D + k[:, None],
            mask=(hidden < HIDDEN)[None, :] & (k < D)[:, None],
            other=0.0,
        )
        z += tl.dot(tile, u_tile, input_precision=PRECISION)
        square += tl.sum(tile * tile, 1)
    z *= tl.rsqrt(square / D + EPS)[:, None]
    z += tl.load(up_bias + hidden, mask=hidden < HIDDEN, other=0.0)[None, :]
    u = expert_logits(
        z, down, down_bias, offset, row, inside, HIDDEN, BLOCK_HIDDEN, E, BLOCK_E, OFFSET
    )
    w = sparsegen_rows(u, tl.load(c) + tl.zeros((ROWS,), tl.float32), E, BLOCK_E)
    at = (row * HIDDEN)[:, None] + hidden[None, :]
    tl.store(z_out + at, z, mask=inside[:, None] & (hidden < HIDDEN)[None, :])
    at = (row * E)[:, None] + expert[None, :]
    tl.store(w_out + at, w, mask=inside[:, None] & (expert < E)[None, :])


@triton.jit
def _backward(
    z_in, w_in, dw_in, down, c, dz, du, dc, rows,
    HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    hidden, expert = tl.arange(0, BLOCK_HIDDEN), tl.arange(0, BLOCK_E)
    at = (row * E)[:, None] + expert[None, :]
    real = inside[:, None] & (expert < E)[None, :]
    w = tl.load(w_in + at, mask=real, other=0.0)
    g = tl.load(dw_in + at, mask=real, other=0.0)
    d_logits, d_c = sparsegen_backward_rows(w, g, tl.load(c) + tl.zeros((ROWS,), tl.float32))
    tl.store(du + at, d_logits, mask=real)
    tl.store(dc + row, d_c, mask=inside)
    at = (row * HIDDEN)[:, None] + hidden[None, :]
    real = inside[:, None] & (hidden < HIDDEN)[None, :]
    z = tl.load(z_in + at, mask=real, other=0.0)
    d_act = tl.zeros((ROWS, BLOCK_HIDDEN), tl.float32)
    for e in tl.static_range(E):
        v = tl.load(down + e * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0)
        column = tl.sum(tl.where(expert[None, :] == e, d_logits, 0.0), 1)
        d_act += column[:, None] * v[None, :]
    sigmoid = tl.sigmoid(z)
    tl.store(dz + at, d_act * sigmoid * (1 + z * (1 - sigmoid)), mask=real)


EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds where it is given no eps


def backward(
    x: Tensor, z: Tensor, weights: Tensor, grad: Tensor, mlp: tuple[Tensor, ...], c: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """From dw (rows, E) to dx (rows, D) fp32, (dU, db, dV, dd), dc () and du (rows, E).

    Args:
        x: (rows, D) what was routed. z: (rows, hidden), weights: (rows, E) from the forward kernel.
        mlp: U (hidden, D), b, V (E, hidden), d. c: ().
    """
    up, _, down, _ = mlp
    rows, (experts, hidden) = len(x), down.shape
    dz, du, dc = torch.empty_like(z), torch.empty_like(weights), z.new_empty(rows)
    if rows:
        _backward[(triton.cdiv(rows, ROWS),)](
            z, weights, grad.contiguous(), down, c, dz, du, dc, rows,
            HIDDEN=hidden, BLOCK_HIDDEN=triton.next_power_of_2(hidden),
            E=experts, BLOCK_E=triton.next_power_of_2(experts), ROWS=ROWS,
        )  # fmt: skip
    wide = x.float()
    r = torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)
    hat = wide * r
    g = dz @ up
    dx = r * (g - hat * (g * hat).mean(1, keepdim=True))
    act = torch.nn.functional.silu(z)
    return dx, (dz.t() @ hat, dz.sum(0), du.t() @ act, du.sum(0)), dc.sum(), du


def forward(
    x: Tensor, mlp: tuple[Tensor, ...], c: Tensor, offset: Tensor | None, matrix_units: bool
) -> tuple[Tensor, Tensor]:
    """z (rows, hidden) and the weights (rows, E), without a graph.

    matrix_units: see `kernels.choice`. They multiply in tf32, three times to be as good as fp32.
    """
    up, up_bias, down, down_bias = mlp
    (rows, d), (experts, hidden) = x.shape, down.shape
    z, weights = up.new_empty(rows, hidden), up.new_empty(rows, experts)
    if rows:
        _forward[(triton.cdiv(rows, ROWS),)](
            x, up, up_bias, down, down_bias, c, offset, z, weights, rows, x.stride(0),
            D=d, HIDDEN=hidden, BLOCK_HIDDEN=triton.next_power_of_2(hidden),
            E=experts, BLOCK_E=triton.next_power_of_2(experts),
            OFFSET=offset is not None, EPS=EPS, PRECISION="tf32x3" if matrix_units else "ieee",
            ROWS=ROWS, BLOCK_D=32,
        )  # fmt: skip
    return z, weights


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, up, up_bias, down, down_bias, c, offset, matrix_units: bool):
        x, mlp = x.contiguous(), (up, up_bias, down, down_bias)
        z, weights = forward(x, mlp, c, offset, matrix_units)
        ctx.save_for_backward(x, z, weights, *mlp, c)
        ctx.offset = offset is not None
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, z, weights, *mlp, c = ctx.saved_tensors
        dx, d_mlp, dc, du = backward(x, z, weights, grad, tuple(mlp), c)
        return dx.to(x.dtype), *d_mlp, dc, du if ctx.offset else None, None


def route(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    c: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """Expert weights of each row.

    Args:
        x: (rows, D) pooled texts, or tokens; any of the supported dtypes.
        up (hidden, D), up_bias (hidden,), down (E, hidden), down_bias (E,): the MLP, fp32.
        c: () fp32, Sparsegen's 1 - lambda.
        offset: (rows, E) fp32, added to the logits (noise, a prior), or None.
    Returns:
        (rows, E) fp32, each row on the simplex.
    """
    units = has_matrix_units(x.device)
    return _Route.apply(x, up, up_bias, down, down_bias, c, offset, units)
