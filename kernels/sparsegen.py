"""Sparsegen-lin: a projection onto the simplex with a learned temperature, exact gradients."""

import torch
from torch import Tensor


def _threshold(u: Tensor, c: Tensor) -> Tensor:
    """tau (..., 1) with sum_i max(u_i - tau, 0) = c, for u with maximum 0."""
    if u.shape[-1] == 3:
        # Three experts: the largest of the thresholds of the best 1, 2 and 3 logits, so no sort.
        a, b, d = u.unbind(-1)
        pair = torch.maximum(torch.maximum(a + b, a + d), b + d).unsqueeze(-1)
        total = u.sum(-1, keepdim=True)
        top = u.amax(-1, keepdim=True)
        return torch.maximum(torch.maximum(top - c, (pair - c) / 2), (total - c) / 3)
    sums = u.sort(-1, descending=True).values.cumsum(-1)
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
