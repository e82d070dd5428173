"""entmax-1.5: a projection onto the simplex between softmax and sparsemax, exact gradients."""

import torch
from torch import Tensor

from kernels.reference import running_sum


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        x = (u - u.amax(-1, keepdim=True)) / 2
        ordered = x.sort(-1, descending=True).values
        count = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
        mean = running_sum(ordered) / count
        squares = running_sum(ordered.square()) - count * mean.square()
        tau = mean - ((1 - squares) / count).clamp(min=0).sqrt()
        size = (tau <= ordered).sum(-1, keepdim=True).clamp(min=1)  # NaN stays NaN, not an index
        p = (x - tau.gather(-1, size - 1)).clamp(min=0).square()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (p,) = ctx.saved_tensors
        s = p.sqrt()
        return s * (grad - (grad * s).sum(-1, keepdim=True) / s.sum(-1, keepdim=True))


def entmax15(u: Tensor) -> Tensor:
    """p_i = max(u_i / 2 - tau, 0)^2, with tau such that p sums to 1 (arXiv 1905.05702).

    With x = u / 2 sorted, mean_k and ss_k the mean and the sum of squared deviations of its k
    largest: tau_k = mean_k - sqrt((1 - ss_k) / k), and the support is the largest k with
    tau_k <= x_k. Backward, s = sqrt(p): du = s (g - <s, g> / sum s).

    Args:
        u: logits (..., E), float32 or float64.
    Returns:
        weights (..., E): rows that sum to 1, exactly 0 off the support.
    """
    return _Entmax15.apply(u)
