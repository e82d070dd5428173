"""PCGrad: gradients of two tasks without what conflicts in them (arXiv 2001.06782)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def project(mine: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """g - (g . h / |h|^2) h where g . h < 0, else g; over all tensors as one vector."""
    dot = sum((g * h).sum() for g, h in zip(mine, other, strict=True))
    size = sum(h.square().sum() for h in other)
    factor = torch.as_tensor(dot / size if size else 0.0).clamp(max=0)
    return [g - factor * h for g, h in zip(mine, other, strict=True)]


def backward(
    losses: Mapping[str, Tensor], rest: Tensor, parameters: Sequence[nn.Parameter]
) -> None:
    """Set .grad to the sum of the tasks' gradients, each projected against the unmodified others.

    With two tasks there is no order of the projections, which the paper draws at random.

    Args:
        losses: task -> its weighted loss. rest: losses of no task, added as they are.
        parameters: those that any loss reaches.
    """
    found = {}
    for task, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        found[task] = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]
    total = [torch.zeros_like(p) for p in parameters]
    if rest.requires_grad:
        grads = torch.autograd.grad(rest, parameters, allow_unused=True, retain_graph=True)
        total = [t if g is None else g for t, g in zip(total, grads, strict=True)]
    for task, grads in found.items():
        for other, against in found.items():
            grads = grads if other == task else project(grads, against)
        total = [t + g for t, g in zip(total, grads, strict=True)]
    for p, g in zip(parameters, total, strict=True):
        p.grad = g
