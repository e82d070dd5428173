"""The MoE-LoRA linear as one bordered weight: its layout, and the path without kernels.

For linears that share an input x, frozen W, experts A_i, B_i, gates w_i, s_i = alpha_i / r_i:

    y = W x + sum_i w_i s_i B_i A_i x

Concatenate the experts along the rank and write S = A x, g = the products w_i s_i repeated over
their ranks. One buffer M = [[W, B], [A, 0]] then gives

    forward    y  = [x | g S] [W | B]'
    backward   dX = [dY | dS] [[W], [A]]   with  dS = g (dY B)
               dB = dY' (g S),   dA = dS' x,   dg = (dY B) S summed over the group's linears

so base and delta share one GEMM and one accumulator (`kernels.bordered`). A group of linears (q, k,
v; gate, up) is one buffer whose linears look at overlapping windows of [S_first | x | S_rest]: two
of them touch x from both sides, and k and v share a window with one zero block.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 16  # columns: what 16-bit GEMMs want aligned; ranks of 16 x 3 fill 48 without any padding


@dataclass(frozen=True)
class Window:
    """One GEMM: some linears of a group, and the columns of [S_first | x | S_rest] they read."""

    rows: slice
    cols: slice


@dataclass(frozen=True)
class Linear:
    """Where one linear lies in M (rows of W, rows of A) and in [S_first | x | S_rest]."""

    rows: slice
    rank_rows: slice
    spare: slice


@dataclass(frozen=True)
class Layout:
    """How a group of linears lies in its bordered weight M (O + P, L + D + Q).

    O output rows of all linears, then P rank rows of those that have experts. L spare columns to
    the left of x (the first linear's), Q to the right (the others'). rank: R of each linear with
    experts, padded: what its blocks are padded to.
    """

    in_features: int
    linears: tuple[Linear, ...]
    windows: tuple[Window, ...]
    shape: tuple[int, int]
    x: slice
    rank: int
    padded: int

    @cached_property
    def out_features(self) -> int:
        return self.linears[-1].rows.stop

    @cached_property
    def adapted(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.spare.start != linear.spare.stop]


def make_layout(
    in_features: int, outs: list[int], adapted: list[bool], rank: int, pad: int = PAD
) -> Layout:
    """Lay out a group: `outs` output sizes, which of them have experts, their total rank.

    Each spare block is padded to a multiple of `pad` columns, so that GEMMs stay aligned. The first
    of several linears has its spare columns to the left of x, the others theirs to the right.
    """
    padded, several = -(-rank // pad) * pad, len(outs) > 1
    widths = [padded if has else 0 for has in adapted]
    left = widths[0] if several else 0
    linears, row, rank_row, spare = [], 0, sum(outs), left + in_features
    for i, (out, width) in enumerate(zip(outs, widths, strict=True)):
        to_the_left = several and i == 0
        start = 0 if to_the_left else spare
        linears.append(
            Linear(
                slice(row, row + out),
                slice(rank_row, rank_row + width),
                slice(start, start + width),
            )
        )
        spare += 0 if to_the_left else width
        row, rank_row = row + out, rank_row + width
    if several:
        windows = (
            Window(slice(0, outs[0]), slice(0, left + in_features)),
            Window(slice(outs[0], sum(outs)), slice(left, spare)),
        )
    else:
        windows = (Window(slice(0, outs[0]), slice(0, spare)),)
    x = slice(left, left + in_features)
    return Layout(in_features, tuple(linears), windows, (rank_row, spare), x, rank, padded)


@dataclass(frozen=True)
class Pieces:
    """What a forward pass reads of M: its windows, and A (P, D); views of M, or copies without the
    blocks of zeros between them, where no backward pass needs M whole."""

    windows: tuple[Tensor, ...]
    a: Tensor

    @classmethod
    def of(cls, layout: Layout, bordered: Tensor) -> "Pieces":
        windows = tuple(bordered[window.rows, window.cols] for window in layout.windows)
        return cls(windows, bordered[layout.out_features :, layout.x])

    def linears(self, layout: Layout) -> list[tuple[Tensor, Tensor]]:
        """W (O, D) and B (O, R padded) of each linear; B has no column where it has no experts."""
        made = []
        for window, m in zip(layout.windows, self.windows, strict=True):
            first, left = window.rows.start, window.cols.start
            for linear in layout.linears:
                if window.rows.start <= linear.rows.start < window.rows.stop:
                    rows = m[linear.rows.start - first : linear.rows.stop - first]
                    x, spare = layout.x, linear.spare
                    made.append((rows[:, x.start - left : x.stop - left],
                                 rows[:, spare.start - left : spare.stop - left]))  # fmt: skip
        return made


def forward(
    layout: Layout, pieces: Pieces, x_lora: Tensor, x: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """S and g S (N, J, R padded) of the J linears that have experts, and y of every linear.

    Without a kernel that writes g S beside x, [x | g S] would be a copy of x, which costs more than
    it saves. So the second GEMM adds to what the first has written, in place; backward likewise.
    """
    linears = len(layout.adapted)
    s = (x_lora @ pieces.a.t()).unflatten(1, (linears, layout.padded))
    gated = (_padded(gates, layout) * s).to(x.dtype)
    outputs, i = [], 0
    for w, b in pieces.linears(layout):
        if b.shape[1]:
            outputs.append((x @ w.t()).addmm_(gated[:, i], b.t()))
            i += 1
        else:
            outputs.append(x @ w.t())
    return s, gated, tuple(outputs)


def _padded(gates: Tensor, layout: Layout) -> Tensor:
    """(N or 1, R) -> (N or 1, 1, R padded), zeros in the padding."""
    spare = layout.padded - layout.rank
    return (F.pad(gates, (0, spare)) if spare else gates)[:, None]


class _BorderedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layout: Layout, bordered: Tensor, keep: Tensor | None, x, gates, *masters):
        x_lora = x if keep is None else x * keep
        s, gated, outputs = forward(layout, Pieces.of(layout, bordered), x_lora, x, gates)
        ctx.save_for_backward(bordered, keep, x, gates, s, gated)
        ctx.layout, ctx.needs_gates = layout, gates.requires_grad
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        bordered, keep, x, gates, s, gated = ctx.saved_tensors
        layout: Layout = ctx.layout
        linears = list(zip(layout.linears, grads, strict=True))
        t, d_bs = torch.empty_like(gated), []  # t = dY B
        for linear, dy in linears:
            if linear.spare.start < linear.spare.stop:
                i = len(d_bs)
                torch.mm(dy, bordered[linear.rows, linear.spare], out=t[:, i])
                d_bs.append(dy.t() @ gated[:, i, : layout.rank])
        ds = (_padded(gates, layout) * t).to(x.dtype).flatten(1)
        d_gates = None
        if ctx.needs_gates:
            product = (t.to(gates.dtype) * s).sum(1)[:, : layout.rank]
            d_gates = product.sum_to_size(gates.shape)
        dx = None
        if ctx.needs_input_grad[3]:
            (first, dy), *others = linears
            dx = dy @ bordered[first.rows, layout.x]
            for linear, dy in others:
                dx.addmm_(dy, bordered[linear.rows, layout.x])
            a = bordered[layout.out_features :, layout.x]
            dx = dx.addmm_(ds, a) if keep is None else dx.addcmul_(keep, ds @ a)
        d_a = ds.t() @ (x if keep is None else x * keep)
        d_masters = []
        for i, d_b in enumerate(d_bs):
            d_masters += [d_a[i * layout.padded :][: layout.rank], d_b]
        # The masters are wider than the GEMMs (fp32 beside bf16): hand back their dtype.
        return None, None, None, dx, d_gates, *(d.to(gates.dtype) for d in d_masters)


def bordered_linear(
    layout: Layout,
    bordered: Tensor,
    x: Tensor,
    gates: Tensor,
    masters: list[Tensor],
    keep: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All linears of a group with their experts, in plain PyTorch.

    Args:
        layout: how the group lies in `bordered`.
        bordered: M, in the compute dtype; no gradient flows to it.
        x: (N, D), the compute dtype.
        gates: g = w_i s_i repeated over the ranks, (N, R) or (1, R), the masters' dtype.
        masters: A (R, D) and B (O_j, R) of each adapted linear in turn, the tensors that M's
            borders were copied from; they receive the gradients.
        keep: (N, D), what x is multiplied by on its way to A: `kernels.dropout`'s mask.
    Returns:
        one (N, O_j) tensor per linear.
    """
    return _BorderedLinear.apply(layout, bordered, keep, x, gates, *masters)
