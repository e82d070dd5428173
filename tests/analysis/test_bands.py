"""analysis/bands.py: the interval that the figures draw is the tables'."""

import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from scipy import stats

from analysis.bands import shade
from analysis.page import over_seeds
from eval.metrics import interval


@pytest.mark.parametrize("seeds", [2, 3, 9])
def test_the_interval_is_that_of_the_tables(seeds: int):
    values = np.random.default_rng(seeds).normal(size=seeds).tolist()
    expected = stats.t.interval(0.95, seeds - 1, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx(expected)
    assert over_seeds(values)["interval"] == list(interval(values))


def test_points_with_other_numbers_of_seeds():
    """Each has its own interval; one seed, or none, leaves a gap."""
    axes = Figure().subplots()
    rows = [[0.0, 1.0], [2.0], [], [1.0, 2.0, 4.0]]
    shade(axes, [0, 1, 2, 3], rows, "black")
    (band,) = axes.collections
    assert isinstance(band, PolyCollection)
    drawn = np.concatenate([path.vertices for path in band.get_paths()])
    assert set(drawn[:, 0]) == {0.0, 3.0}
    assert drawn[drawn[:, 0] == 3, 1].max() == pytest.approx(interval(rows[3])[1])
    assert all(math.isnan(end) for end in interval([2.0]))


def test_one_seed_has_none():
    axes = Figure().subplots()
    shade(axes, [1, 2], [[0.0], [1.0]], "black")
    assert not axes.collections
