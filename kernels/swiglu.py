"""SwiGLU from one wide buffer into the next: y = silu(gate) * up (arXiv 2002.05202).

The gate and up projections lie side by side in the output of their GEMM, and the result goes
straight beside the spare columns of the down projection's input, so nothing is copied between the
two GEMMs. The gradient goes into a buffer with room for the rank columns of the backward GEMM.
See `kernels.bordered` for the buffers.
"""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(gate_up, y, stride_in, stride_out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_up + row * stride_in + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_in + width + cols, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(y + row * stride_out + cols, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate_up, grad, d_gate_up, stride_in, stride_grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_up + row * stride_in + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_in + width + cols, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * stride_grad + cols, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = g * gate * sigmoid
    at = d_gate_up + row * stride_in + cols
    tl.store(at, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(at + width, d_up.to(d_gate_up.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, width: int, spare: int) -> Tensor:
        gate_up = gate_up.contiguous()
        n = len(gate_up)
        y = gate_up.new_empty(n, width + spare)
        if n:
            grid = (n, triton.cdiv(width, BLOCK))
            _forward[grid](gate_up, y, gate_up.stride(0), y.stride(0), width, BLOCK=BLOCK)
        ctx.save_for_backward(gate_up)
        ctx.width = width
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        n = len(gate_up)
        d_gate_up = torch.empty_like(gate_up)
        if n:
            grad = grad.contiguous()
            grid = (n, triton.cdiv(ctx.width, BLOCK))
            _backward[grid](
                gate_up, grad, d_gate_up, gate_up.stride(0), grad.stride(0), ctx.width, BLOCK=BLOCK
            )
        return d_gate_up, None, None


def swiglu(gate_up: Tensor, width: int, spare: int) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: (N, 2 F + anything): gate, up, then columns that are not read.
        width: F. spare: columns to leave free behind the result.
    Returns:
        (N, F + spare), the last `spare` columns uninitialised.
    """
    return _SwiGLU.apply(gate_up, width, spare)
