"""The bordered MoE-LoRA linear on a GPU: `kernels.moe_lora` has the formula and the layout.

Buffers are wide, so that nothing is copied between two GEMMs. What a linear reads is [spare | x |
spare], (N, L + D + Q), written by the op before it; what it writes is [y | spare], (N, O + P). The
spare columns of y are never written. They are there for the gradient, which has y's shape: the op
behind fills [dY | -], this one adds dS, and one GEMM on [dY | dS] is the whole of dX.

What is no GEMM is a kernel: `kernels.shrink`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import route
from kernels.segments import Segments
from kernels.shrink import TOKEN, Group, gate_backward, shrink_gate


@dataclass(frozen=True)
class Routing:
    """A router for each token, run by the kernel that shrinks: the MLP (U, b, V, d), Sparsegen's c
    and what is added to the logits, as in `kernels.route`."""

    mlp: tuple[Tensor, Tensor, Tensor, Tensor]
    c: Tensor
    offset: Tensor | None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, group: Group, segments: Segments, mode: int, keep, x, weights, up, up_bias, down,
        down_bias, c, offset, *masters,
    ):  # fmt: skip
        layout, n = group.layout, len(x)
        out, p = layout.out_features, layout.shape[0] - layout.out_features
        x = x if x.stride(1) == 1 else x.contiguous()
        weights = None if weights is None else weights.contiguous()
        narrow = x.shape[1] != layout.shape[1]
        wide = x.new_empty(n, layout.shape[1]) if narrow else x
        own = x if narrow else wide[:, layout.x]
        s, z = x.new_empty(n, p), None
        mlp = None if up is None else (up, up_bias, down, down_bias)
        # The kernel reads one x; dropout of the experts' input must not reach the router. In fp32
        # it has no matrix units to gain by and spills: there the GEMM is cuBLAS's.
        one_pass = group.matrix_units and keep is None and x.dtype != torch.float32
        if mlp is not None:
            weights = mlp[0].new_empty(n, len(mlp[2]))
            if one_pass:
                z = mlp[0].new_empty(n, len(mlp[0]))
            else:
                z, weights = route.forward(own, mlp, c, offset, group.matrix_units)
        copy = narrow and one_pass and p > 0  # by the kernel
        if narrow and not copy:
            wide[:, layout.x] = x
        if n and p:
            source = own if keep is None else own * keep
            in_kernel = mlp if one_pass else None
            shrink_gate(
                group, source, wide, s, weights, mode, segments, offset, in_kernel, c, z, copy
            )
        y = x.new_empty(n, out + p)
        for window, m in zip(layout.windows, group.pieces.windows, strict=True):
            torch.mm(wide[:, window.cols], m.t(), out=y[:, window.rows])
        # M is saved like the rest, so that autograd notices when it was renewed in between.
        ctx.save_for_backward(group.bordered, wide, s, weights, keep, z, *(mlp or ()), c)
        ctx.group, ctx.segments, ctx.mode = group, segments, mode
        ctx.narrow, ctx.offset = narrow, offset is not None
        ctx.routed, ctx.master = mlp is not None, masters[0].dtype if masters else None
        ctx.set_materialize_grads(False)
        return (y, weights) if ctx.routed else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor | None, d_routed: Tensor | None = None):
        group, layout = ctx.group, ctx.group.layout
        bordered, wide, s, weights, keep, z, *rest = ctx.saved_tensors
        out, rank = layout.out_features, layout.rank
        assert bordered is not None, "the pieces alone have no gradient"
        n, p, own = len(wide), s.shape[1], wide[:, layout.x]
        # A loss that reads the routing alone, on its way back by itself, gives none.
        dy = wide.new_zeros(n, out + p) if dy is None else dy.contiguous()
        d_weights = None
        if n and p:
            t = s.new_empty(n, p)
            for linear in layout.adapted:
                at = slice(linear.rank_rows.start - out, linear.rank_rows.stop - out)
                torch.mm(dy[:, linear.rows], bordered[linear.rows, linear.spare], out=t[:, at])
            wanted = ctx.routed or ctx.needs_input_grad[5]
            d_weights = gate_backward(group, t, s, weights, dy, ctx.segments, ctx.mode, wanted)
        d_input = wide.new_empty(n, layout.in_features if ctx.narrow else layout.shape[1])
        dx = d_input if ctx.narrow else d_input[:, layout.x]
        if ctx.needs_input_grad[4]:
            if keep is None:
                torch.mm(dy, bordered[:, layout.x], out=dx)
            else:
                torch.mm(dy[:, :out], bordered[:out, layout.x], out=dx)
                dx += keep * (dy[:, out:] @ bordered[out:, layout.x])
        d_masters = []
        if p:
            d_a = dy[:, out:].t() @ (own if keep is None else own * keep)
            for linear in layout.adapted:
                at = linear.rank_rows.start - out
                d_b = dy[:, linear.rows].t() @ wide[:, linear.spare]
                d_masters += [d_a[at : at + rank], d_b[:, :rank]]
        d_route: tuple = (None,) * 6
        if ctx.routed:
            *mlp, c = rest
            parts = [part for part in (d_weights, d_routed) if part is not None]
            total = sum(parts, torch.zeros_like(weights))
            d_own, d_mlp, dc, du = route.backward(own, z, weights, total, tuple(mlp), c)
            dx += d_own.to(dx.dtype)
            d_route, d_weights = (*d_mlp, dc, du if ctx.offset else None), None
        masters = (d.to(ctx.master) for d in d_masters)
        return None, None, None, None, d_input, d_weights, *d_route, *masters


def fused_linear(
    group: Group,
    x: Tensor,
    weights: Tensor | None,
    segments: Segments,
    masters: list[Tensor],
    mode: int,
    keep: Tensor | None = None,
) -> Tensor:
    """All linears of a group with their experts.

    Args:
        x: (N, L + D + Q), whose spare columns are written here, or (N, D), which is copied first.
        weights: (B, E) fp32 of the texts, (N, E) of the tokens, or None: every expert counts 1.
        mode: TEXT, TOKEN or ALL, what a row of `weights` belongs to.
        masters: A (R, D) and B (O_j, R) of each adapted linear in turn; they get the gradients.
        keep: (N, D), what x is multiplied by on its way to A: `kernels.dropout`'s mask.
    Returns:
        (N, O + P): the outputs of all linears, then columns for the backward pass.
    """
    none = (None,) * 6
    return _FusedLinear.apply(group, segments, mode, keep, x, weights, *none, *masters)


def routed_linear(
    group: Group,
    x: Tensor,
    routing: Routing,
    segments: Segments,
    masters: list[Tensor],
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with a router that weighs each token, in one pass over x.

    Returns:
        (N, O + P) as above, and the weights (N, E) for the other groups of the layer.
    """
    more = (*routing.mlp, routing.c, routing.offset)
    return _FusedLinear.apply(group, segments, TOKEN, keep, x, None, *more, *masters)
