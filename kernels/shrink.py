"""Shrink and gate: what stands between x and the bordered GEMM, and its backward pass.

    S = A x,   g S into the spare columns beside x,   back: dS = g t beside dY, dw,   t = dY B

One pass over x; where each token has its own weights, the same pass computes the router's hidden
layer, its logits and Sparsegen (`kernels.route`). `kernels.bordered` puts them together.

The weight of an expert may be exactly 0. Skipping it would save matrix operations, but these
kernels are bound by reading x and dY, which other experts need: `python -m bench.model` has the
numbers. So nothing is skipped, and zeros are exact by arithmetic.
"""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import route
from kernels.moe_lora import Layout, Pieces
from kernels.route import expert_logits
from kernels.segments import CHUNK, Segments, sum_chunks
from kernels.sparsegen import sparsegen_rows

# What a row of weights belongs to
ALL, TEXT, TOKEN = 0, 1, 2


@dataclass(frozen=True)
class Columns:
    """The experts along the P rank columns of a group: expert (P,) int32, -1 where there is only
    padding; scale (P,) fp32, alpha_i / r_i, 0 in the padding."""

    expert: Tensor
    scale: Tensor


@triton.jit
def _gates(weights, index, expert, scale, row, inside, E: tl.constexpr, MODE: tl.constexpr):
    """(ROWS, BLOCK_P) gates w_i s_i of some rows, 0 in the padding."""
    if MODE == 0:
        gates = tl.zeros((row.shape[0], 1), tl.float32) + scale[None, :]
    else:
        at = row
        if MODE == 1:
            at = tl.load(index + row, mask=inside, other=0)
        real = inside[:, None] & (expert >= 0)[None, :]
        gates = tl.load(weights + at[:, None] * E + expert[None, :], mask=real, other=0.0)
        gates *= scale[None, :]
    return gates


@triton.jit
def _shrink(
    x, a, weights, index, expert, scale, s, wide,
    up, up_bias, down, down_bias, c, offset, z_out,
    rows, stride_x, stride_a, stride_wide,
    D: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr,
    E: tl.constexpr, MODE: tl.constexpr, ROUTE: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_E: tl.constexpr,
    OFFSET: tl.constexpr, EPS: tl.constexpr, COPY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    col = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    hidden, lane = tl.arange(0, BLOCK_HIDDEN), tl.arange(0, BLOCK_E)
    long = row.to(tl.int64)
    total = tl.zeros((ROWS, BLOCK_P), tl.float32)
    z = tl.zeros((ROWS, BLOCK_HIDDEN), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        at = x + long[:, None] * stride_x + k[None, :]
        tile = tl.load(at, mask=inside[:, None] & (k < D)[None, :], other=0.0)
        if COPY:
            # Every block of columns writes the same.
            into = wide + long[:, None] * stride_wide + LEFT + k[None, :]
            tl.store(into, tile, mask=inside[:, None] & (k < D)[None, :])
        real = (col < P)[None, :] & (k < D)[:, None]
        a_tile = tl.load(a + col[None, :] * stride_a + k[:, None], mask=real, other=0.0)
        total += tl.dot(tile, a_tile, input_precision="ieee")
        if ROUTE:
            value = tile.to(tl.float32)
            real = (hidden < HIDDEN)[None, :] & (k < D)[:, None]
            u_tile = tl.load(up + hidden[None, :] * D + k[:, None], mask=real, other=0.0)
            # Three times in tf32, as `route` does: once would cut the router's weights off, and a
            # token near the edge of an expert's support would land on its other side.
            z += tl.dot(value, u_tile, input_precision="tf32x3")
            square += tl.sum(value * value, 1)
    own = tl.load(expert + col, mask=col < P, other=-1)
    factor = tl.load(scale + col, mask=col < P, other=0.0)
    if ROUTE:
        z *= tl.rsqrt(square / D + EPS)[:, None]
        z += tl.load(up_bias + hidden, mask=hidden < HIDDEN, other=0.0)[None, :]
        u = expert_logits(
            z, down, down_bias, offset, row, inside, HIDDEN, BLOCK_HIDDEN, E, BLOCK_E, OFFSET
        )
        w = sparsegen_rows(u, tl.load(c) + tl.zeros((ROWS,), tl.float32), E, BLOCK_E)
        real = inside[:, None] & (hidden < HIDDEN)[None, :]
        tl.store(z_out + (row * HIDDEN)[:, None] + hidden[None, :], z, mask=real)
        real = inside[:, None] & (lane < E)[None, :]
        tl.store(weights + (row * E)[:, None] + lane[None, :], w, mask=real)
        gates = tl.zeros((ROWS, BLOCK_P), tl.float32)
        for e in tl.static_range(E):
            one = tl.sum(tl.where(lane[None, :] == e, w, 0.0), 1)
            gates = tl.where((own == e)[None, :], one[:, None] * factor[None, :], gates)
    else:
        gates = _gates(weights, index, own, factor, row, inside, E, MODE)
    real = inside[:, None] & (col < P)[None, :]
    kept = total.to(s.dtype.element_ty)
    tl.store(s + long[:, None] * P + col[None, :], kept, mask=real)
    # The first linear's block lies left of x, the others' right of it.
    place = tl.where(col < LEFT, col, D + col)
    gated = gates * kept.to(tl.float32)
    at = wide + long[:, None] * stride_wide + place[None, :]
    tl.store(at, gated.to(wide.dtype.element_ty), mask=real)


@triton.jit
def _gate(
    s, weights, index, expert, scale, wide, rows, stride_wide,
    D: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr,
    E: tl.constexpr, MODE: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside, long = row < rows, row.to(tl.int64)
    real = inside[:, None] & (col < P)[None, :]
    own = tl.load(expert + col, mask=col < P, other=-1)
    factor = tl.load(scale + col, mask=col < P, other=0.0)
    gates = _gates(weights, index, own, factor, row, inside, E, MODE)
    value = tl.load(s + long[:, None] * P + col[None, :], mask=real, other=0.0).to(tl.float32)
    place = tl.where(col < LEFT, col, D + col)
    at = wide + long[:, None] * stride_wide + place[None, :]
    tl.store(at, (gates * value).to(wide.dtype.element_ty), mask=real)


@triton.jit
def _gate_backward(
    t, s, weights, expert, scale, dy, dw, chunks, stride_dy,
    OUT: tl.constexpr, P: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start, end = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    text = tl.load(chunks + 3 * chunk + 2)
    row = start + tl.arange(0, CHUNK)
    inside, long = row < end, row.to(tl.int64)
    lane = tl.arange(0, BLOCK_E)
    total = tl.zeros((CHUNK, BLOCK_E), tl.float32)
    source = row
    if MODE == 1:
        source = tl.zeros((CHUNK,), tl.int32) + text
    for first in range(0, P, BLOCK_P):
        col = first + tl.arange(0, BLOCK_P)
        real = inside[:, None] & (col < P)[None, :]
        own = tl.load(expert + col, mask=col < P, other=-1)
        factor = tl.load(scale + col, mask=col < P, other=0.0)
        gates = _gates(weights, source, own, factor, source, inside, E, 2 if MODE == 1 else MODE)
        at = long[:, None] * P + col[None, :]
        back = tl.load(t + at, mask=real, other=0.0).to(tl.float32)
        ds = (gates * back).to(dy.dtype.element_ty)
        tl.store(dy + long[:, None] * stride_dy + OUT + col[None, :], ds, mask=real)
        if WEIGHTS:
            value = tl.load(s + at, mask=real, other=0.0).to(tl.float32)
            product = back * value * factor[None, :]
            for e in tl.static_range(E):
                share = tl.sum(tl.where((own == e)[None, :], product, 0.0), 1)
                total += tl.where(lane[None, :] == e, share[:, None], 0.0)
    if WEIGHTS:
        if MODE == 2:
            real = inside[:, None] & (lane < E)[None, :]
            tl.store(dw + (row * E)[:, None] + lane[None, :], total, mask=real)
        else:
            tl.store(dw + chunk * E + lane, tl.sum(total, 0), mask=lane < E)


@dataclass(frozen=True)
class Group:
    """A group of linears as this op needs it.

    bordered: M; None where only its pieces are kept, and no gradient can be had. columns: the rank
    columns. matrix_units: whether the card has some that Triton uses, else GEMMs go to cuBLAS.
    """

    layout: Layout
    bordered: Tensor | None
    pieces: Pieces
    columns: Columns
    matrix_units: bool


def shrink_gate(
    group: Group, x, wide, s, weights, mode: int, segments, offset, mlp, c, z, copy: bool
):  # fmt: skip
    """S (N, P) into `s`, and g S into the spare columns of `wide`.

    Args:
        x: (N, D). weights: (B, E), (N, E) or None, as `mode` says; written here where `mlp` (with
            c, offset and z as in `kernels.route`) routes each token.
        copy: lay x into `wide` on the way; of 16-bit values, with matrix units alone.
    """
    layout = group.layout
    (rows, d), p, left = x.shape, s.shape[1], layout.x.start
    a = group.pieces.a
    experts = 1 if weights is None else weights.shape[1]
    shared = {"D": d, "P": p, "LEFT": left, "E": experts, "MODE": mode}
    columns = (group.columns.expert, group.columns.scale)
    if group.matrix_units and x.dtype != torch.float32:
        hidden = mlp[2].shape[1] if mlp else 16
        # One block of columns reads x once. Several read it again, from the cache; they all find
        # the same weights where they route.
        block = _block(p)
        tall = block <= 256 and mlp is None  # registers for the tile of 64 rows
        _shrink[(triton.cdiv(rows, 64 if tall else 32), triton.cdiv(p, block))](
            x, a, weights, segments.index, *columns, s, wide, *(mlp or (None,) * 4), c, offset, z,
            rows, x.stride(0), a.stride(0), wide.stride(0), **shared,
            ROUTE=mlp is not None, HIDDEN=hidden, BLOCK_HIDDEN=triton.next_power_of_2(hidden),
            BLOCK_E=triton.next_power_of_2(experts), OFFSET=offset is not None, EPS=route.EPS,
            COPY=copy, ROWS=64 if tall else 32, BLOCK_P=block, BLOCK_D=64 if tall else 32,
            num_warps=4 if block <= 128 else 8, num_stages=3,
        )  # fmt: skip
        return
    torch.mm(x, a.t(), out=s)
    block = min(64, triton.next_power_of_2(p))
    _gate[(triton.cdiv(rows, CHUNK), triton.cdiv(p, block))](
        s, weights, segments.index, *columns, wide, rows, wide.stride(0), **shared,
        ROWS=CHUNK, BLOCK_P=block,
    )  # fmt: skip


def _block(columns: int) -> int:
    """Columns of a tile: all of them up to 256, else 256 or 128, whichever wastes less."""
    if columns <= 256:
        return max(16, int(triton.next_power_of_2(columns)))
    return min((256, 128), key=lambda block: triton.cdiv(columns, block) * block)


def gate_backward(
    group: Group, t: Tensor, s: Tensor, weights: Tensor | None, dy: Tensor, segments: Segments,
    mode: int, wanted: bool,
) -> Tensor | None:  # fmt: skip
    """g t into the spare columns of dy, (N, O + P); where `wanted`, the gradient of the weights.

    Args:
        t, s: (N, P), dY B and A x.
    """
    experts = 1 if weights is None else weights.shape[1]
    chunks = len(segments.chunks)
    d_weights = None
    if wanted:
        assert weights is not None
        d_weights = weights.new_empty(len(s) if mode == TOKEN else chunks, experts)
    _gate_backward[(chunks,)](
        t, s, weights, group.columns.expert, group.columns.scale, dy, d_weights, segments.chunks,
        dy.stride(0), OUT=group.layout.out_features, P=s.shape[1], E=experts,
        BLOCK_E=triton.next_power_of_2(experts), MODE=mode, WEIGHTS=wanted, CHUNK=CHUNK,
        BLOCK_P=min(64, triton.next_power_of_2(s.shape[1])),
    )  # fmt: skip
    if d_weights is not None and mode == TEXT:
        d_weights = sum_chunks(d_weights, segments, mean=False)
    return d_weights
