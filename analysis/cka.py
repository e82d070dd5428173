"""Unbiased linear CKA, over minibatches: how alike two views of the same inputs are."""

import torch
from torch import Tensor

BATCH = 256  # inputs whose Gram matrices are formed at once


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """HSIC_1 of two Gram matrices (n, n), unbiased (Song et al. 2012), n > 3.

    [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3)), zero diagonals.
    """
    n = len(k)
    if n < 4:
        raise ValueError(f"HSIC_1 needs at least 4 inputs in a batch, got {n}")
    k, l = (m - torch.diag(torch.diagonal(m)) for m in (k, l))  # noqa: E741
    a, b = k.sum(0), l.sum(0)
    value = (k * l).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)
    return value / (n * (n - 3))


class CKA:
    """Adds up HSIC_1 over minibatches; `value` is the ratio of their means (arXiv 2010.15327).

    The memory is that of one batch. 1 for features that are rotations and scalings of each other,
    about 0 for unrelated ones, whatever their widths; it may fall below 0 by chance.
    """

    def __init__(self) -> None:
        self.cross = self.first = self.second = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (n, D), y (n, D'): features of the same n inputs, in the same order."""
        if len(x) != len(y):
            raise ValueError(f"features of {len(x)} inputs against {len(y)}: they must be the same")
        k, l = (t.double() @ t.double().t() for t in (x, y))  # noqa: E741
        self.cross += hsic(k, l).item()
        self.first += hsic(k, k).item()
        self.second += hsic(l, l).item()

    @property
    def value(self) -> float | None:
        """None where a view does not vary."""
        size = self.first * self.second
        return self.cross / size**0.5 if self.first > 0 and self.second > 0 else None


def cka(x: Tensor, y: Tensor, batch: int = BATCH) -> float | None:
    """CKA of features (n, D), (n, D') that are at hand, in batches of like size, at most `batch`.

    (A small rest would be noise with a batch's weight.) Raises ValueError for fewer than 4 inputs.
    """
    found = CKA()
    for a, b in zip(*(t.tensor_split(-(-len(x) // batch)) for t in (x, y)), strict=True):
        found.add(a, b)
    return found.value
