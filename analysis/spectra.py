"""Singular values of the experts' changes, and how their spaces lie to each other."""

from typing import Any

import torch
from torch import Tensor


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Of B A (O, D), largest first, (R,) in float64, from the QR of B and of A'.

    a: (R, D). b: (O, R). B A itself is never formed.
    """
    left = torch.linalg.qr(b.double(), mode="r")[1]
    right = torch.linalg.qr(a.double().t(), mode="r")[1]
    return torch.linalg.svdvals(left @ right.t())


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for all 0."""
    total = values.sum()
    if total <= 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def stable_rank(values: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2; 0 for all 0."""
    return (values.square().sum() / values.max().square()).item() if values.max() > 0 else 0.0


def basis(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of `matrix` (n, k), to a relative 1e-10."""
    u, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, s > 1e-10 * s.max().clamp(min=1e-300)]


def principal_cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of the principal angles between the spaces of orthonormal columns (n, k), (n, k')."""
    return torch.linalg.svdvals(x.t() @ y).clamp(max=1.0)


def overlap(x: Tensor, y: Tensor) -> dict[str, float]:
    """Mean squared cosine of the principal angles, and what random spaces of these ranks have.

    For k <= k' in n dimensions the latter is k' / n.
    """
    x, y = basis(x), basis(y)
    cosines = principal_cosines(x, y)
    return {
        "overlap": cosines.square().mean().item() if len(cosines) else 0.0,
        "by_chance": max(x.shape[1], y.shape[1]) / len(x),
    }


def experts(parts: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, Any]:
    """What one linear's experts look like, and each pair of them.

    parts: name -> (A (R, D), B (O, R), s = alpha / r). Of a pair: `inputs` compares the rows of
    A, what an expert reads; `outputs` the columns of B, where it writes; `cosine` is that of the
    two changes s B A as vectors.
    """
    alone, pairs, names = {}, [], list(parts)
    for name, (a, b, scale) in parts.items():
        values = scale * singular_values(a, b)
        alone[name] = {
            "norm": values.square().sum().sqrt().item(),
            "effective_rank": effective_rank(values),
            "stable_rank": stable_rank(values),
            "values": [float(f"{v:.5g}") for v in values.tolist()],
        }
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            (a, b, _), (c, d, _) = parts[first], parts[second]
            dot = ((b.double().t() @ d.double()) * (a.double() @ c.double().t())).sum().item()
            norm = (
                alone[first]["norm"] * alone[second]["norm"] / (parts[first][2] * parts[second][2])
            )
            pairs.append({
                "experts": [first, second],
                "inputs": overlap(a.t(), c.t()),
                "outputs": overlap(b, d),
                "cosine": dot / norm if norm > 0 else None,
            })  # fmt: skip
    return {"alone": alone, "pairs": pairs}
