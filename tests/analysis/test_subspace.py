"""STIR and the subspaces of changes, at values that are known."""

import pytest
import torch

from analysis import subspaces
from analysis.subspace import between, factor, rank_for, stir
from tests.analysis.drawn import normal, rotation


@pytest.mark.parametrize("shared", [0, 3, 6])
def test_stir_has_its_closed_values(shared: int) -> None:
    """k = 6 of d = 30 directions with equal energy, of which the tasks share some."""
    k, d, n = 6, 30, 20_000
    q = rotation(d)
    e = normal(n, k, seed=1) @ q[:, :k].t()
    r = normal(n, k, seed=2) @ q[:, k - shared : 2 * k - shared].t()
    found = stir((e,), (r,), k=k)
    expected = (shared / k - k / d) / (1 - k / d)
    assert found["stir"] == pytest.approx(expected, abs=0.03)
    assert found["within"] == pytest.approx(1, abs=0.01)
    assert found["null"] == pytest.approx(k / d, abs=0.02)


def test_stir_takes_the_rank_that_holds_the_energy() -> None:
    values = torch.tensor([5.0, 4.1, 0.5, 0.4], dtype=torch.float64)
    c = torch.diag(values.sqrt()) @ rotation(4).t()
    assert (rank_for(c), rank_for(c, 0.95), rank_for(c, most=1)) == (2, 3, 1)
    x = normal(400, 4) @ torch.diag(values.sqrt())
    found = stir((x,), (x,))
    assert found["k"] in (2, 3) and found["stir"] == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="8 inputs"):
        stir((normal(4, 3),), (normal(40, 3),))


def test_a_factor_s_gram_matrix_is_the_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, far from the origin, of a difference and of chosen rows."""
    monkeypatch.setattr("analysis.subspace.BATCH", 7)
    x, y, rows = normal(50, 4) + 1e4, normal(50, 4, seed=1), torch.arange(0, 50, 2)
    made = factor((x, y), rows)
    torch.testing.assert_close(made.t() @ made, torch.cov((x - y)[rows].t()), rtol=1e-9, atol=1e-9)


def test_null_is_what_random_spaces_hold() -> None:
    x, d, k = normal(40, 12) * torch.arange(1, 13), 12, 3
    null = between((x, x), (x, x), k)["null"]
    spaces = [torch.linalg.qr(normal(d, k, seed=s))[0] for s in range(3000)]
    own = torch.linalg.svd(x).Vh[:k].t()
    held = [(x @ u).square().sum() / (x @ own).square().sum() for u in spaces]
    assert null == pytest.approx(torch.stack(held).mean().item(), rel=0.02)


def test_a_task_that_shares_nothing_with_itself_has_no_stir() -> None:
    halves = [normal(3, 60, seed=s) for s in range(4)]
    found = between((halves[0], halves[1]), (halves[2], halves[3]), 3)
    assert found["stir"] is None and abs(found["within"] - found["null"]) < 0.05


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_stir_of_planted_changes(shared: int) -> None:
    """Two experts of rank 4 that write to `shared` common directions of 24; they read noise."""
    k, d = 4, 24
    q = rotation(d)
    e, r = q[:, :k], q[:, k - shared : 2 * k - shared]
    mix = [rotation(k, seed=s) for s in range(4)]  # equal energies, another basis in each half
    reads = [normal(k, 200, seed=10 + s) for s in range(4)]
    made = [subspaces.sides((torch.linalg.qr(a.t())[0].t(), b @ m, 2.0))
            for a, b, m in zip(reads, (e, e, r, r), mix, strict=True)]  # fmt: skip
    first, second, third, fourth = (one["outputs"] for one in made)
    found = between((first, second), (third, fourth), k)
    assert found["stir"] == pytest.approx((shared / k - k / d) / (1 - k / d))
    first, second, third, fourth = (one["inputs"] for one in made)
    assert between((first, second), (third, fourth), k)["stir"] is None


def test_sides_have_the_moments_of_the_change() -> None:
    a, b = normal(3, 12), normal(8, 3, seed=1)
    w = 2.0 * b @ a
    found = subspaces.sides((a, b, 2.0))
    torch.testing.assert_close(found["inputs"].t() @ found["inputs"], w.t() @ w)
    torch.testing.assert_close(found["outputs"].t() @ found["outputs"], w @ w.t())
