"""STIR: how much of one task's subspace another task uses, between chance and itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 0.05  # of Within - Null: below it a task does not share its subspace with itself
BATCH = 4096  # rows that are added up at once


def factor(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """(D, D) in float64 whose Gram matrix is the covariance of some rows of features, centred.

    They are read in batches, so the memory does not depend on their number.

    Args:
        parts: one tensor (n, D), or two whose difference is meant. rows: which rows, (m,).
    """
    d = parts[0].shape[1]
    mean, c = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    n = 0
    for at in rows.split(BATCH):
        x = parts[0][at].double()
        if len(parts) > 1:
            x -= parts[1][at].double()
        # By the means of what is there and what comes (Chan et al. 1979): no cancellation.
        step = x.mean(0) - mean
        c += (x - x.mean(0)).t() @ (x - x.mean(0)) + torch.outer(step, step) * (
            n * len(x) / (n + len(x))
        )
        n += len(x)
        mean += step * (len(x) / n)
    values, vectors = torch.linalg.eigh(c / max(n - 1, 1))
    return (values.clamp(min=0).sqrt() * vectors).t()


def leading(x: Tensor, k: int) -> Tensor:
    """The k right singular vectors (D, k) of the largest singular values of x (n, D)."""
    return torch.linalg.svd(x, full_matrices=False).Vh[:k].t()


def rank_for(x: Tensor, energy: float = 0.9, most: int | None = None) -> int:
    """How many leading directions hold that share of the squared norm, at most `most`."""
    values = torch.linalg.svdvals(x).square()
    share = values.cumsum(0) / values.sum()
    k = int((share < energy).sum()) + 1
    return max(1, min(k, most or k))


def captured(x: Tensor, reference: Tensor, own: Tensor) -> float:
    """O(e | r) = tr(U_r' C U_r) / tr(U_e' C U_e), C = x'x: of what k directions can hold, the
    share that the reference's hold."""
    most = (x @ own).square().sum().clamp(min=1e-300)
    return ((x @ reference).square().sum() / most).item()


def between(
    e: tuple[Tensor, Tensor], r: tuple[Tensor, Tensor], k: int | None = None, most: int = 0
) -> dict[str, Any]:
    """(Cross - Null) / (Within - Null) of two tasks, each in halves a and b, (n, D) matrices.

    The rows of a half are what its second moments x'x are of. U_t: the k leading directions of
    half a. Measured on half b: Cross, the mean of O(e | U_r) and O(r | U_e); Within, the same with
    the task's own U of half a, mean over the tasks; Null, what random k-dimensional spaces hold in
    the mean, (k / D) tr C. O is held against the k leading directions of half b itself. No
    published definition of the ratio exists; with equal energies in k of d dimensions it is 1 for
    identical spaces, (1/2 - k/d) / (1 - k/d) when half is shared, -(k/d) / (1 - k/d) when they are
    orthogonal. None where Within - Null is under `LEAST`.

    k None: what 90 % of the energy of each task's half a needs, the larger of the two, at most
    `most`.
    """
    halves = {"e": [x.double() for x in e], "r": [x.double() for x in r]}
    d = halves["e"][0].shape[1]
    if k is None:
        k = max(rank_for(a, most=most or None) for a, _ in halves.values())
    u = {name: leading(a, k) for name, (a, _) in halves.items()}
    b = {name: x for name, (_, x) in halves.items()}
    own = {name: leading(x, k) for name, x in b.items()}
    cross = (captured(b["e"], u["r"], own["e"]) + captured(b["r"], u["e"], own["r"])) / 2
    within = (captured(b["e"], u["e"], own["e"]) + captured(b["r"], u["r"], own["r"])) / 2
    held = [x.square().sum() / (x @ own[t]).square().sum().clamp(min=1e-300) for t, x in b.items()]
    null = k / d * (sum(held).item() / 2)  # type: ignore[union-attr]
    return {"stir": ratio(cross, within, null), "cross": cross, "within": within, "null": null,
            "k": k}  # fmt: skip


def ratio(cross: float, within: float, null: float) -> float | None:
    """STIR, or None where a task shares too little with itself to ask for more."""
    return (cross - null) / (within - null) if within - null >= LEAST else None


def stir(
    e: Sequence[Tensor], r: Sequence[Tensor], k: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """`between` of the features of two tasks, split at random into halves of their inputs.

    Args:
        e, r: features (n, D) of a task, or two such whose difference is meant; n of each may
            differ. k None: as `between`, at most a tenth of a half's inputs.
    """
    sizes = len(e[0]), len(r[0])
    if min(sizes) < 8:
        raise ValueError(f"STIR needs 8 inputs of each task or more, got {sizes[0]} and {sizes[1]}")
    halves = {}
    for name, parts in (("e", e), ("r", r)):
        n = len(parts[0])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        first, second = order[: n // 2].sort().values, order[n // 2 :].sort().values
        halves[name] = factor(parts, first), factor(parts, second)
    return between(halves["e"], halves["r"], k, max(1, min(sizes) // 20))
