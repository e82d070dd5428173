"""eval/stats.py against hand-worked and published cases."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from eval import rule, stats
from tests.eval.studies import AB, J, P


def test_interference_by_hand():
    # I = 100 * 0.1 / 0.5; gradient 100 * 0.4 / 0.25 = 160 and -100 / 0.5 = -200.
    # u = 160 * (.6, .6, .4, .4) - 200 * (.5, .5, .3, .3) = (-4, -4, 4, 4): the mean's variance over
    # two clusters is 32 / 2 = 16 (1 df). sigma^2 = 0.02 in both arms (1 df each): seed parts
    # 0.02 * 160^2 / 2 = 256 and 0.02 * 200^2 / 2 = 400. df = 672^2 / (16^2 + 256^2 + 400^2).
    e = stats.interference({"p": P, "j": J}, AB, "p", "j")
    df = 672**2 / (16**2 + 256**2 + 400**2)
    assert e.value == pytest.approx(20)
    assert e.se == pytest.approx(672**0.5)
    assert e.df == pytest.approx(df)
    half = scipy_stats.t.ppf(0.975, df) * 672**0.5
    assert e.interval == pytest.approx([20 - half, 20 + half])
    assert e.p == pytest.approx(2 * scipy_stats.t.sf(20 / 672**0.5, df))


def test_mean_and_difference_by_hand():
    # Mean: query part ((.6 - .4) / 2)^2 = .01, seed part .02 / 2.
    e = stats.arm_mean({"p": P, "j": J}, AB, "p")
    assert (e.value, e.se) == pytest.approx((0.5, 0.02**0.5))
    # Difference in points: no query part, seed part 100^2 * 2 * .02 / 2; df = seed df alone.
    e = stats.arm_difference({"p": P, "j": J}, AB, "p", "j")
    assert (e.value, e.se, e.df) == pytest.approx((10, 200**0.5, 2))


def test_each_arm_has_its_own_seed_variance():
    ids = stats.cluster_ids(AB, 4)
    third = np.array([[0.1] * 4, [0.5] * 4])
    assert stats.seed_variance(P, ids) == pytest.approx((0.02, 0))
    assert stats.seed_variance(third, ids) == pytest.approx((0.08, 0))
    # Points: 100^2 (.02 + .08) / 2 = 500 from seeds; u = -+ 10 a cluster, (10^2 + 10^2) / 2 = 100.
    e = stats.arm_difference({"p": P, "m": third, "j": J}, AB, "p", "m")
    assert (e.value, e.se) == pytest.approx((20, 600**0.5))
    assert e.df == pytest.approx(600**2 / (100**2 + 100**2 + 400**2))
    # An arm that is not compared changes nothing; one seed more of it neither.
    assert e == stats.arm_difference({"p": P, "m": third}, AB, "p", "m")
    assert math.isnan(stats.arm_difference({"p": P, "m": third[:1]}, AB, "p", "m").se)


def test_paired_by_hand():
    # J is P - 0.1 at each seed and query, so the difference is 10 points whatever is drawn.
    arms = {"p": P, "j": P - 0.1, "k": P[::-1] - 0.1}
    e = stats.paired(10.0, {"p": 100.0, "j": -100.0}, arms, AB)
    assert (e.value, e.se, e.p) == pytest.approx((10, 0, 0), abs=1e-9)
    # With k's seeds the other way round it is 100 (P_s - P_s') + 10 = -10, 30: (20^2 / 2) * 2.
    e = stats.paired(10.0, {"p": 100.0, "k": -100.0}, arms, AB)
    assert (e.se, e.df) == pytest.approx((400**0.5, 1))
    assert e.p == pytest.approx(2 * scipy_stats.t.sf(10 / 20, 1))
    with pytest.raises(ValueError, match="2, 1"):
        stats.paired(0.0, {"p": 1.0, "j": -1.0}, arms | {"j": P[:1]}, AB)


def test_above_reference_by_hand():
    # u - 100 b = 100 (.6, .6, .4, .4) - (50, 50, 30, 30): 10 everywhere, no query part; seeds .01.
    e = stats.above_reference({"p": P}, AB, "p", np.array([0.5, 0.5, 0.3, 0.3]))
    assert (e.value, e.se, e.df) == pytest.approx((10, 10, 1))


def test_crossed_variance_is_the_two_way_anova():
    # Every query its own cluster: var(mean) = (MS_seed + MS_query - MS_interaction) / (S Q), the
    # textbook estimate for a two-way random layout with one observation a cell.
    rng = np.random.default_rng(0)
    s, q = 4, 6
    y = rng.normal(size=(s, 1)) + rng.normal(size=q) + 0.3 * rng.normal(size=(s, q))
    row, column = y.mean(1, keepdims=True), y.mean(0)
    ms_seed = q * np.sum((row - y.mean()) ** 2) / (s - 1)
    ms_query = s * np.sum((column - y.mean()) ** 2) / (q - 1)
    ms_both = np.sum((y - row - column + y.mean()) ** 2) / ((s - 1) * (q - 1))
    e = stats.arm_mean({"a": y}, None, "a")
    variance = (ms_seed + ms_query - ms_both) / (s * q)
    assert e.se**2 == pytest.approx(variance)
    parts = (ms_query / (s * q)) ** 2 / (q - 1) + (ms_seed / (s * q)) ** 2 / (s - 1)
    assert e.df == pytest.approx(variance**2 / parts)


def test_pure_interaction_is_not_seed_variance():
    # Both seed means are 0.5; what differs is which query each seed gets right.
    ids = stats.cluster_ids(None, 2)
    assert stats.seed_variance(np.eye(2), ids) == pytest.approx((0, 0.5))


def test_cluster_variance_is_the_delete_one_jackknife():
    rng = np.random.default_rng(1)
    ids = np.repeat(np.arange(5), [1, 2, 3, 7, 12])
    u = rng.normal(size=25) + rng.normal(size=5)[ids]
    left_out = np.array([u[ids != c].mean() for c in range(5)])
    variance, df = stats.cluster_variance(u, ids)
    assert variance == pytest.approx(4 / 5 * np.sum((left_out - u.mean()) ** 2))
    assert df == pytest.approx(25**2 / (1 + 4 + 9 + 49 + 144) - 1)
    # Clusters of one query are the plain variance of a mean.
    variance, df = stats.cluster_variance(u, np.arange(25))
    assert (variance, df) == pytest.approx((u.var(ddof=1) / 25, 24))


def test_satterthwaite_is_welch():
    # Moore and McCabe, reading scores (DRP): s 11.01, n 21 against s 17.15, n 23: df 37.86.
    got = stats.satterthwaite([11.01**2 / 21, 17.15**2 / 23], [20, 22])
    assert got == pytest.approx(37.86, abs=0.01)


def test_ratios_against_a_double_bootstrap():
    # Seeds of each arm and clusters resampled together. Many of both, because a bootstrap of n
    # units is (n - 1) / n too small, and little interaction, because it counts that three times.
    rng = np.random.default_rng(2)
    sizes = rng.integers(2, 12, 120)
    ids, seeds = np.repeat(np.arange(120), sizes), 60
    hard = rng.normal(0.5, 0.3, len(ids)) + rng.normal(0, 0.1, 120)[ids]
    arms = {
        name: mean
        + hard
        + rng.normal(0, 0.05, 120)[ids]
        + rng.normal(0, 0.05, (seeds, 1))
        + rng.normal(0, 0.01, (seeds, len(ids)))
        for name, mean in (("p", 0.1), ("j", 0.0), ("m", 0.05))
    }
    base = 0.5 * hard + rng.normal(0, 0.05, 120)[ids]

    draws = 4000
    wc = rng.multinomial(120, np.full(120, 1 / 120), draws)  # (draws, C), one for all arms
    onehot = ids[:, None] == np.arange(120)

    def resampled(y: np.ndarray) -> np.ndarray:
        ws = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), draws) / len(y)  # (draws, S)
        return ((ws @ (y @ onehot)) * wc).sum(1) / (wc @ sizes)

    p, j, m = (resampled(arms[name]) for name in "pjm")
    b = resampled(base[None])
    for estimate, boot in (
        (stats.interference(arms, [str(c) for c in ids], "p", "j"), 100 * (p - j) / p),
        (stats.gain_normalised(arms, [str(c) for c in ids], "p", "j", base), (p - j) / (p - b)),
        (stats.won_back(arms, [str(c) for c in ids], "p", "j", "m"), (m - j) / (p - j)),
    ):
        assert estimate.value == pytest.approx(np.median(boot), rel=0.02)
        assert estimate.se == pytest.approx(boot.std(), rel=0.07)


def test_what_is_won_back_has_fiellers_interval():
    """Closed form where all that spreads is the queries: the contrast's df do not depend on w."""
    rng = np.random.default_rng(4)
    x, loss = rng.normal(0.01, 0.06, 300), rng.normal(0, 0.12, 300)  # M - J, P - J by query
    loss += 0.02 - loss.mean()  # 2.9 standard errors
    joint = rng.uniform(0.2, 0.6, 300)
    arms = {"p": joint + loss, "j": joint, "m": joint + x}

    def won(arms: dict[str, np.ndarray]) -> stats.Estimate:
        return stats.won_back({n: np.stack([y, y]) for n, y in arms.items()}, None, *"pjm")

    found = won(arms)
    a, b = x.mean(), loss.mean()
    cov = np.cov(x, loss) / 300
    t2 = scipy_stats.t.isf(0.025, 299) ** 2
    # |a - w b| <= t se: (b^2 - t2 v_bb) w^2 - 2 (a b - t2 v_ab) w + a^2 - t2 v_aa <= 0
    square, twice, rest = (a * b - t2 * c for a, b, c in (
        (b, b, cov[1, 1]), (a, b, cov[0, 1]), (a, a, cov[0, 0])))  # fmt: skip
    roots = np.roots([square, -2 * twice, rest])
    assert found.value == pytest.approx(a / b)
    assert found.interval == pytest.approx(sorted(roots.real.tolist()), rel=1e-6)
    wide = found.high - found.value, found.value - found.low
    assert wide[0] > 1.2 * wide[1]  # the loss is a few standard errors: no symmetric interval
    # A loss that cannot be told from none leaves no ends.
    assert won({**arms, "p": joint + loss - loss.mean() + 1e-4}).interval is None


def test_sign_flips_enumerated_by_hand():
    # Clusters sum to 4, 2, -1. |+-4 +-2 +-1| is 7, 5, 3 or 1, each twice; observed 5: 4 of 8.
    difference = np.array([3.0, 1.0, 2.0, -1.0])
    assert stats.paired_randomisation(difference, ["a", "a", "b", "c"]) == 0.5
    # Query by query, |+-3 +-1 +-2 +-1| >= 5 has 3+1+2-1, 3+1+2+1, 3-1+2+1 and their opposites.
    assert stats.paired_randomisation(difference, None) == 6 / 16
    # Ties count although 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point.
    assert stats.paired_randomisation(np.array([0.1, 0.2, 0.3]), None) == 0.25


def test_sign_flips_drawn():
    rng = np.random.default_rng(3)
    d = rng.normal(0.3, 1, 60)
    exact = scipy_stats.ttest_1samp(d, 0)[1]  # agrees closely with the sign-flip p at n = 60
    assert stats.paired_randomisation(d, None) == pytest.approx(exact, abs=0.01)
    assert stats.paired_randomisation(d, None) == stats.paired_randomisation(d, None)
    # Never 0: the observed pattern is one of those possible (here 1 in 2^39 draws would hit).
    assert stats.paired_randomisation(np.ones(40), None, draws=999) == 1 / 1000


def test_alpha_spending():
    # Lan and DeMets' Pocock-type function at three equal looks: 0.0226, 0.0382, 0.05 cumulative.
    spent = np.cumsum([rule.alpha_at_look(s) for s in (3, 6, 9)])
    assert spent == pytest.approx([0.0226, 0.0382, 0.05], abs=5e-5)
    # Off the plan: one look in each slot never spends more than the plan does.
    for plan in ((1, 4, 7), (2, 5, 8), (3, 6, 20)):
        assert sum(rule.alpha_at_look(s) for s in plan) <= 0.05 + 1e-12
    # A slot looked at twice, or a first look at nine, by naming the previous look.
    twice = rule.alpha_at_look(3) + rule.alpha_at_look(5) + rule.alpha_at_look(6, previous=5)
    assert twice == pytest.approx(rule.alpha_at_look(6, previous=0))
    assert rule.alpha_at_look(9, previous=0) == pytest.approx(0.05)
    for seeds, previous in ((0, None), (3, 3), (12, 9), (3, -1)):
        with pytest.raises(ValueError, match="look at"):
            rule.alpha_at_look(seeds, previous)


def test_identical_arms_are_no_evidence_of_anything():
    e = stats.interference({"p": P, "j": P}, AB, "p", "j")
    assert e.value == 0 and e.p == 1  # the arms' seeds still vary, so the interval has width
    assert e.low < 0 < e.high
    constant = np.full((3, 4), 0.5)
    e = stats.interference({"p": constant, "j": constant}, AB, "p", "j")
    assert (e.se, e.p, e.interval) == (0, 1, [0, 0])


def test_ratios_without_a_denominator():
    arms = {"p": P, "j": P, "zero": 0 * P}
    with pytest.raises(ValueError, match="needs a positive mean"):
        stats.interference(arms, AB, "zero", "p")
    with pytest.raises(ValueError, match="no gain to normalise by"):
        stats.gain_normalised(arms, AB, "p", "j", P.mean(axis=0))
    with pytest.raises(ValueError, match="nothing to win back"):
        stats.won_back(arms, AB, "p", "j", "zero")
