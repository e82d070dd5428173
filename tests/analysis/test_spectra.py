"""analysis/spectra.py: singular values, ranks and angles that are known."""

import math

import pytest
import torch

from analysis import spectra
from tests.analysis.drawn import normal, rotation


def test_singular_values_are_those_of_the_product() -> None:
    a, b = normal(4, 30), normal(20, 4, seed=1)
    expected = torch.linalg.svdvals(b @ a)[:4]
    torch.testing.assert_close(spectra.singular_values(a, b), expected)
    assert spectra.singular_values(a, torch.zeros(20, 4)).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [([1, 1, 1, 1], 4, 4), ([1, 0, 0, 0], 1, 1), ([2, 1, 1, 0], 2 * math.sqrt(2), 1.5),
     ([0, 0, 0, 0], 0, 0)],
)  # fmt: skip
def test_ranks(values: list[float], effective: float, stable: float) -> None:
    made = torch.tensor(values, dtype=torch.float64)
    assert spectra.effective_rank(made) == pytest.approx(effective)
    assert spectra.stable_rank(made) == pytest.approx(stable)


def test_principal_angles_are_those_that_were_planted() -> None:
    """Three directions: shared, turned by 60 degrees, orthogonal."""
    q = rotation(10)
    x = q[:, :3]
    turned = q[:, 1] * math.cos(math.pi / 3) + q[:, 4] * math.sin(math.pi / 3)
    y = torch.stack((q[:, 0], turned, q[:, 5]), 1) @ normal(3, 3)
    cosines = spectra.principal_cosines(spectra.basis(x), spectra.basis(y))
    assert cosines.tolist() == pytest.approx([1, 0.5, 0], abs=1e-9)
    found = spectra.overlap(x, y)
    assert found["overlap"] == pytest.approx(1.25 / 3) and found["by_chance"] == 0.3


def test_random_spaces_overlap_by_chance() -> None:
    found = [spectra.overlap(normal(40, 4, seed=i), normal(40, 6, seed=99 + i)) for i in range(200)]
    assert sum(row["overlap"] for row in found) / 200 == pytest.approx(6 / 40, abs=0.01)
    assert found[0]["by_chance"] == 6 / 40


def test_experts_are_compared_in_pairs() -> None:
    a, b = normal(3, 12), normal(8, 3, seed=1)
    found = spectra.experts({"one": (a, b, 2.0), "twin": (a, 3 * b, 2.0), "other":
                             (normal(3, 12, seed=2), torch.zeros(8, 3), 2.0)})  # fmt: skip
    twin = found["pairs"][0]
    assert twin["experts"] == ["one", "twin"] and twin["cosine"] == pytest.approx(1)
    assert twin["inputs"]["overlap"] == pytest.approx(1) == twin["outputs"]["overlap"]
    assert found["alone"]["twin"]["norm"] == pytest.approx(3 * found["alone"]["one"]["norm"])
    assert found["alone"]["one"]["norm"] == pytest.approx((2 * b @ a).norm().item())
    assert found["pairs"][1]["cosine"] is None and found["alone"]["other"]["norm"] == 0
