"""eval/inference.py: tests, power and what is detectable, against tables and published cases."""

import numpy as np
import pytest

from eval import inference


def test_holm_example():
    # R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.7, 0.6]) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"\[0, 1\]; found \[0.5, 1.5\]"):
        inference.holm([0.5, 1.5])


def test_tost_from_t_tables():
    # t_{0.95, 10} = 1.812: (2 - 0.188) / 1 on the near side, 2.188 on the far one.
    assert inference.tost(0.188, 1.0, 10, 2.0) == pytest.approx(0.05, abs=1e-4)
    assert inference.tost(-0.188, 1.0, 10, 2.0) == pytest.approx(0.05, abs=1e-4)
    assert inference.tost(2.0, 1.0, 10, 2.0) == 0.5
    assert (inference.tost(1.9, 0.0, 10, 2.0), inference.tost(2.0, 0.0, 10, 2.0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="margin > 0"):
        inference.tost(0.0, 1.0, 10, 0.0)


def test_power_published():
    # Cohen 1988, table 2.3.5: d = 0.5, 64 a group, two-sided 5 %: 0.80 (G*Power: 0.8015).
    assert inference.power(0.5, (2 / 64) ** 0.5, 126) == pytest.approx(0.8015, abs=1e-4)
    # Paired, d = 0.5, n = 34: 0.8078 (G*Power).
    assert inference.power(0.5, 34**-0.5, 33) == pytest.approx(0.8078, abs=1e-4)
    assert inference.power(0.0, 1.0, 7, 0.03) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="se > 0"):
        inference.power(1.0, 0.0, 7)


def test_smallest_detectable_effect():
    # With many degrees of freedom it is the normal one: 1.95996 + 0.84162.
    assert inference.smallest_detectable_effect(0.5, 1e6, 0.05) == pytest.approx(
        0.5 * 2.80158, abs=1e-4
    )
    for df in (1, 1.5, 4, 9.3, 100):  # where scipy's far tail turns into NaN
        for alpha in (1e-4, 0.0113, 0.05):
            effect = inference.smallest_detectable_effect(2.0, df, alpha)
            assert inference.power(effect, 2.0, df, alpha) == pytest.approx(0.8, abs=1e-6)
    assert inference.smallest_detectable_effect(0.0, 5, 0.05) == 0


@pytest.mark.parametrize("df", [2, 4.5, 30])
def test_the_interval_of_what_is_detectable_covers_it(df):
    """Of 20,000 standard errors that are estimated, 95 % give an interval with the true effect."""
    rng = np.random.default_rng(0)
    true = inference.smallest_detectable_effect(1.0, df, 0.025)
    s = np.sqrt(rng.chisquare(df, 20_000) / df)
    assert inference.detectable_interval(3 * true, df) == pytest.approx(
        3 * np.array(inference.detectable_interval(true, df))
    )
    low, high = np.outer(inference.detectable_interval(true, df), s)
    assert np.mean((low <= true) & (true <= high)) == pytest.approx(0.95, abs=0.005)
    assert np.mean(low > true) == pytest.approx(0.025, abs=0.004)


def ratio(n: float, d: float, se_n: float, se_d: float, df: float):
    """N - w D of two independent means."""
    return lambda w: (n - w * d, float(np.hypot(se_n, w * se_d)), df)


def test_fieller_by_hand():
    """N = 2 +- 0.5, D = 4 +- 0.5, many df: the roots of (2 - 4 w)^2 = z^2 (0.25 + 0.25 w^2)."""
    z2 = 1.959964**2
    roots = np.roots([16 - 0.25 * z2, -16, 4 - 0.25 * z2])
    low, high = inference.fieller(ratio(2, 4, 0.5, 0.5, 1e7), 0.5, 0.1)
    assert (low, high) == pytest.approx(sorted(roots), abs=1e-4)


def test_fieller_has_no_ends_where_the_denominator_may_be_0():
    assert np.isnan(inference.fieller(ratio(2, 0.5, 0.5, 0.5, 1e7), 4.0, 1.0)).all()
    assert np.isnan(inference.fieller(ratio(2, 4, np.nan, 0.5, 1e7), 0.5, 0.1)).all()
