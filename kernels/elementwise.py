"""The elementwise ops of the PyTorch path with few passes over memory.

`kernels.reference` says what they compute. The norm and the rotation have gradients by hand:
autograd's pieces make more passes and keep what lies between them (`make bench` holds both beside
each other).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        half = x.dtype in (torch.float16, torch.bfloat16)
        wide = x.float() if half else x
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = r.add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        # The half is rounded before the weight comes, as Hugging Face does.
        return wide.mul_(r).to(x.dtype).mul_(weight) if half else (wide * r).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        x, r, weight = ctx.saved_tensors
        wide = x.to(r.dtype)
        g = dy.to(r.dtype) * weight
        # dx = r (g - hat mean(g hat)) with hat = r x
        mean = (g * wide).sum(-1, keepdim=True).mul_(r).div_(x.shape[-1])
        return g.addcmul_(wide, mean.mul_(r), value=-1).mul_(r).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`; weight (D,) is frozen, and of x's dtype."""
    assert not weight.requires_grad and weight.dtype == x.dtype
    return _RMSNorm.apply(x, weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: float) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = y.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-way)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=way)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1.0), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope`; its gradient turns back by the same angle."""
    return _Rope.apply(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    y = F.silu(gate)
    return y * up if torch.is_grad_enabled() else y.mul_(up)
