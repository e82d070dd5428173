"""STIR: how much of one task's subspace another task uses, between chance and itself."""

import torch
from torch import Tensor


def covariance(x: Tensor) -> Tensor:
    """(D, D) of features (n, D), centred."""
    x = x.double() - x.double().mean(0)
    return x.t() @ x / max(len(x) - 1, 1)


def leading(c: Tensor, k: int) -> Tensor:
    """The k eigenvectors (D, k) of the largest eigenvalues of a symmetric matrix."""
    return torch.linalg.eigh(c)[1][:, -k:]


def rank_for(c: Tensor, energy: float = 0.9, most: int | None = None) -> int:
    """How many leading eigenvectors hold that share of the trace, at most `most`."""
    values = torch.linalg.eigvalsh(c).flip(0).clamp(min=0)
    share = values.cumsum(0) / values.sum()
    k = int((share < energy).sum()) + 1
    return max(1, min(k, most or k))


def captured(c: Tensor, reference: Tensor, own: Tensor) -> float:
    """O(e | r) = tr(U_r' C U_r) / tr(U_e' C U_e): of what k directions can hold, the share."""
    return (
        (reference.t() @ c @ reference).trace() / (own.t() @ c @ own).trace().clamp(min=1e-300)
    ).item()


def stir(e: Tensor, r: Tensor, k: int | None = None, draws: int = 20, seed: int = 0) -> dict:
    """(Cross - Null) / (Within - Null) of the features of two tasks, (n, D) each.

    Each task is split into halves a, b. U_t: the k leading eigenvectors of half a. Measured on
    half b: Cross, the mean of O(e | U_r) and O(r | U_e); Within, the same with the task's own U
    of half a, mean over the tasks; Null, random k-dimensional spaces, mean over `draws` and tasks.
    O is held against the k leading eigenvectors of half b itself. No published definition of the
    ratio exists; with equal energies in k of d dimensions it is 1 for identical spaces,
    (1/2 - k/d) / (1 - k/d) when half is shared, -(k/d) / (1 - k/d) when they are orthogonal.

    k None: what 90 % of the energy of each task's half a needs, the larger of the two, at most a
    tenth of a half's inputs.
    """
    if min(len(e), len(r)) < 8:
        raise ValueError(f"STIR needs 8 inputs of each task or more, got {len(e)} and {len(r)}")
    halves = {}
    for name, x in (("e", e), ("r", r)):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        x = x.double()[order]
        middle = len(x) // 2
        halves[name] = covariance(x[:middle]), covariance(x[middle:])
    d = e.shape[1]
    if k is None:
        most = max(1, min(len(e), len(r)) // 20)
        k = max(rank_for(a, most=most) for a, _ in halves.values())
    u = {name: leading(a, k) for name, (a, _) in halves.items()}
    own = {name: leading(b, k) for name, (_, b) in halves.items()}
    b = {name: b for name, (_, b) in halves.items()}
    cross = (captured(b["e"], u["r"], own["e"]) + captured(b["r"], u["e"], own["r"])) / 2
    within = (captured(b["e"], u["e"], own["e"]) + captured(b["r"], u["r"], own["r"])) / 2
    generator = torch.Generator().manual_seed(seed)
    null = 0.0
    for _ in range(draws):
        space = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
        null += sum(captured(b[t], space, own[t]) for t in ("e", "r")) / (2 * draws)
    span = within - null
    return {"stir": (cross - null) / span if abs(span) > 1e-12 else None, "cross": cross,
            "within": within, "null": null, "k": k}  # fmt: skip
