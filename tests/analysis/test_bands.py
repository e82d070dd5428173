"""analysis/bands.py: the interval that the figures draw is the tables'."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis.bands import interval, shade
from analysis.page import over_seeds


@pytest.mark.parametrize("seeds", [2, 3, 9])
def test_the_interval_is_that_of_the_tables(seeds: int):
    rows = np.random.default_rng(seeds).normal(size=(seeds, 4))
    low, high = interval(rows)
    for i in range(4):
        assert [low[i], high[i]] == pytest.approx(over_seeds(rows[:, i].tolist())["interval"])


def test_it_covers_the_mean_in_95_of_100():
    rows = np.random.default_rng(0).normal(loc=2.0, size=(3, 20_000))
    low, high = interval(rows)
    assert ((low < 2) & (high > 2)).mean() == pytest.approx(0.95, abs=0.005)


def test_one_seed_has_none():
    axes = Figure().subplots()
    shade(axes, [1, 2], [[0.0, 1.0]], "black")
    assert not axes.collections
    shade(axes, [1, 2], [[0.0, 1.0], [1.0, 3.0]], "black")
    assert len(axes.collections) == 1
