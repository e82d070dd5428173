"""PCGrad: gradients of two tasks without what conflicts in them (arXiv 2001.06782)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def project(mine: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """g - (g . h / |h|^2) h where g . h < 0, else g; over all tensors as one vector."""
    dot = sum((g * h).sum() for g, h in zip(mine, other, strict=True))
    size = sum(h.square().sum() for h in other)
    factor = torch.as_tensor(dot / size if size else 0.0).clamp(max=0)
    return [g - factor * h for g, h in zip(mine, other, strict=True)]


def backward(
    losses: Mapping[str, Tensor],
    rest: Tensor,
    parameters: Sequence[nn.Parameter],
    gradients: Callable[[Tensor], None],
) -> None:
    """Set .grad to the sum of the tasks' gradients, each projected against the unmodified others.

    With two tasks there is no order of the projections, which the paper draws at random.

    Args:
        losses: task -> its weighted loss. rest: losses of no task, added as they are.
        parameters: those that any loss reaches.
        gradients: puts a loss's gradients into .grad and keeps its graph.
    """

    def of(loss: Tensor) -> list[Tensor]:
        for p in parameters:
            p.grad = None
        if loss.requires_grad:
            gradients(loss)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    found = {task: of(loss) for task, loss in losses.items()}
    total = of(rest)
    for task, grads in found.items():
        for other, against in found.items():
            grads = grads if other == task else project(grads, against)
        total = [t + g for t, g in zip(total, grads, strict=True)]
    for p, g in zip(parameters, total, strict=True):
        p.grad = g
