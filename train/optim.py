"""AdamW, warmup and decay."""

import torch
from torch import nn


def adamw(
    parameters: dict[str, nn.Parameter],
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Every parameter in exactly one group: the head, which starts from nothing, has its own rate.

    Vectors and scalars (biases, Sparsegen's v) are not decayed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((name.startswith("head."), parameter.ndim > 1), []).append(parameter)
    rows = []
    for (head, decayed), members in groups.items():
        rate = head_learning_rate if head else learning_rate
        decay = weight_decay if decayed else 0.0
        rows.append({"params": members, "lr": rate, "peak": rate, "weight_decay": decay})
    return torch.optim.AdamW(rows, betas=(0.9, 0.999), eps=1e-8)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: linear from 1/w over w warmup steps, then linear to 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return (steps - step) / max(1, steps - ramp)
