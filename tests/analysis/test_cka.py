"""analysis/cka.py at values that are known."""

import pytest
import torch

from analysis.cka import CKA, cka, hsic
from tests.analysis.drawn import normal, rotation


def test_cka_of_rotated_features_is_one() -> None:
    x = normal(200, 12)
    assert cka(x, 3 * x @ rotation(12) + 5, batch=64) == pytest.approx(1)


def test_cka_of_unrelated_features_is_zero_even_where_they_are_wide() -> None:
    """The biased estimate is far from 0 here: 50 inputs of 400 features."""
    values = [cka(normal(50, 400, seed=i), normal(50, 400, seed=100 + i)) for i in range(20)]
    assert sum(values) / 20 == pytest.approx(0, abs=0.02)  # type: ignore[arg-type]
    k, l = (t @ t.t() for t in (normal(50, 400), normal(50, 400, seed=1)))  # noqa: E741
    centre = torch.eye(50, dtype=torch.float64) - 1 / 50
    k, l = centre @ k @ centre, centre @ l @ centre  # noqa: E741
    assert (k * l).sum() / (k.norm() * l.norm()) > 0.8


def test_hsic_is_unbiased() -> None:
    """Its mean over samples of 5 is the population's squared covariance, here 1 for y = x."""
    found = [
        hsic(*(t @ t.t() for t in (x, x))) for x in (normal(5, 1, seed=s) for s in range(4000))
    ]
    assert torch.stack(found).mean().item() == pytest.approx(1, abs=0.15)


def test_minibatches_are_averaged_before_the_ratio() -> None:
    x, y = normal(128, 6), normal(128, 6) + normal(128, 6, seed=1)
    made = CKA()
    for a, b in zip(x.split(32), y.split(32), strict=True):
        made.add(a, b)
    parts = [[hsic(p @ p.t(), q @ q.t()) for p, q in zip(u.split(32), v.split(32), strict=True)]
             for u, v in ((x, y), (x, x), (y, y))]  # fmt: skip
    cross, first, second = (torch.stack(p).sum() for p in parts)
    assert made.value == pytest.approx((cross / (first * second).sqrt()).item())
    assert cka(x, y, batch=32) == made.value


def test_no_batch_is_a_small_rest() -> None:
    """260 inputs at 256 a batch are two of 130: four more are no batch that weighs as much."""
    x, y = normal(260, 6), normal(260, 6) + normal(260, 6, seed=1)
    made = CKA()
    made.add(x[:130], y[:130])
    made.add(x[130:], y[130:])
    assert cka(x, y, batch=256) == pytest.approx(made.value)


def test_cka_of_what_does_not_vary() -> None:
    assert cka(torch.ones(10, 3), normal(10, 3)) is None
    with pytest.raises(ValueError, match="at least 4"):
        CKA().add(normal(3, 2), normal(3, 2))
    with pytest.raises(ValueError, match="must be the same"):
        CKA().add(normal(5, 2), normal(6, 2))
