"""eval/stats.py against hand-worked and published cases, and its calibration by simulation."""

import contextlib
import json
import math
from unittest import mock

import numpy as np
import pytest
from scipy import stats as scipy_stats

from eval import inference, stats

# ---- hand-worked and published cases ------------------------------------------------------------

# Additive, so that seeds and queries do not interact: P = 0.5 -+ 0.1 (seed) -+ 0.1 (cluster).
P = np.array([[0.5, 0.5, 0.3, 0.3], [0.7, 0.7, 0.5, 0.5]])
J = P - 0.1
AB = ["a", "a", "b", "b"]


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


def test_holm_example():
    # R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.7, 0.6]) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"\[0, 1\]; found \[0.5, 1.5\]"):
        stats.holm([0.5, 1.5])


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


def test_tost_from_t_tables():
    # t_{0.95, 10} = 1.812: (2 - 0.188) / 1 on the near side, 2.188 on the far one.
    assert stats.tost(0.188, 1.0, 10, 2.0) == pytest.approx(0.05, abs=1e-4)
    assert stats.tost(-0.188, 1.0, 10, 2.0) == pytest.approx(0.05, abs=1e-4)
    assert stats.tost(2.0, 1.0, 10, 2.0) == 0.5
    assert (stats.tost(1.9, 0.0, 10, 2.0), stats.tost(2.0, 0.0, 10, 2.0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="margin > 0"):
        stats.tost(0.0, 1.0, 10, 0.0)


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
    assert stats.smallest_detectable_effect(0.5, 1e6, 0.05) == pytest.approx(
        0.5 * 2.80158, abs=1e-4
    )
    for df in (1, 1.5, 4, 9.3, 100):  # where scipy's far tail turns into NaN
        for alpha in (1e-4, 0.0113, 0.05):
            effect = stats.smallest_detectable_effect(2.0, df, alpha)
            assert inference.power(effect, 2.0, df, alpha) == pytest.approx(0.8, abs=1e-6)
    assert stats.smallest_detectable_effect(0.0, 5, 0.05) == 0


@pytest.mark.parametrize("df", [2, 4.5, 30])
def test_the_interval_of_what_is_detectable_covers_it(df):
    """Of 20,000 standard errors that are estimated, 95 % give an interval with the true effect."""
    rng = np.random.default_rng(0)
    true = stats.smallest_detectable_effect(1.0, df, 0.025)
    s = np.sqrt(rng.chisquare(df, 20_000) / df)
    assert stats.detectable_interval(3 * true, df) == pytest.approx(
        3 * np.array(stats.detectable_interval(true, df))
    )
    low, high = np.outer(stats.detectable_interval(true, df), s)
    assert np.mean((low <= true) & (true <= high)) == pytest.approx(0.95, abs=0.005)
    assert np.mean(low > true) == pytest.approx(0.025, abs=0.004)


def test_alpha_spending():
    # Lan and DeMets' Pocock-type function at three equal looks: 0.0226, 0.0382, 0.05 cumulative.
    spent = np.cumsum([stats.alpha_at_look(s) for s in (3, 6, 9)])
    assert spent == pytest.approx([0.0226, 0.0382, 0.05], abs=5e-5)
    # Off the plan: one look in each slot never spends more than the plan does.
    for plan in ((1, 4, 7), (2, 5, 8), (3, 6, 20)):
        assert sum(stats.alpha_at_look(s) for s in plan) <= 0.05 + 1e-12
    # A slot looked at twice, or a first look at nine, by naming the previous look.
    twice = stats.alpha_at_look(3) + stats.alpha_at_look(5) + stats.alpha_at_look(6, previous=5)
    assert twice == pytest.approx(stats.alpha_at_look(6, previous=0))
    assert stats.alpha_at_look(9, previous=0) == pytest.approx(0.05)
    for seeds, previous in ((0, None), (3, 3), (12, 9), (3, -1)):
        with pytest.raises(ValueError, match="look at"):
            stats.alpha_at_look(seeds, previous)


# ---- the decision -------------------------------------------------------------------------------


def task(interference, measurable=True, p_holm=0.5, p_equivalence=0.5):
    return {
        "measurable": measurable,
        "interference": interference,
        "p_holm": p_holm,
        "p_equivalence": p_equivalence,
    }


@pytest.mark.parametrize(
    ("embedding", "reranking", "seeds", "decision"),
    [
        (task(0.99), task(0.99), 3, "pivot"),
        (task(-8.0), task(0.0), 3, "pivot"),
        (task(1.0), task(0.99), 3, "more_seeds"),
        (task(1.0 - 1e-13), task(0.0), 3, "more_seeds"),  # 1 % but for rounding
        (task(0.5), task(1.99), 8, "more_seeds"),
        (task(0.5), task(1.99), 9, "inconclusive"),
        (task(0.5), task(1.5), 12, "inconclusive"),
        (task(2.0), task(-5.0), 3, "proceed"),
        (task(2.0 - 1e-13), task(1.5), 9, "proceed"),
        (task(0.0), task(2.01), 9, "proceed"),
        # Not measurable is not "no interference": it neither proceeds nor lets pivot.
        (task(50.0, measurable=False), task(0.1), 3, "inconclusive"),
        (task(None, measurable=False), task(0.1), 9, "inconclusive"),
        (task(0.1, measurable=False), task(1.5), 3, "more_seeds"),
        (task(0.1, measurable=False), task(1.5), 9, "inconclusive"),
        (task(0.1, measurable=False), task(2.5), 3, "proceed"),
        (task(9.0, measurable=False), task(9.0, measurable=False), 3, "inconclusive"),
    ],
)
def test_decision_table(embedding, reranking, seeds, decision):
    got = stats.decide({"embedding": embedding, "reranking": reranking}, seeds)
    assert got["decision"] == decision
    assert not got["supported"]
    for name, t in (("retrieval", embedding), ("reranking", reranking)):
        assert (f"{name} is not measurable" in got["reason"]) == (not t["measurable"])


def test_supported_proceed_needs_the_large_task_significant():
    alpha = stats.alpha_at_look(3)
    small = task(0.5, p_holm=1e-6, p_equivalence=1e-6)
    for p, expected in ((alpha, True), (alpha * 1.001, False), (0.03, False)):
        got = stats.decide({"a": task(2.5, p_holm=p), "b": small}, 3)
        assert (got["decision"], got["supported"]) == ("proceed", expected)
    # Either of two large tasks will do; a task that is not measurable will not.
    assert stats.decide({"a": task(2.5), "b": task(3, p_holm=0.001)}, 3)["supported"]
    hidden = task(9, measurable=False, p_holm=1e-6)
    assert not stats.decide({"a": task(2.5), "b": hidden}, 3)["supported"]
    # The level is that of the look: what passes at three seeds does not at nine.
    assert not stats.decide({"a": task(2.5, p_holm=0.02)}, 9)["supported"]
    assert stats.decide({"a": task(2.5, p_holm=0.02)}, 9, alpha=0.05)["supported"]


def test_supported_pivot_needs_both_equivalent():
    good = task(0.2, p_equivalence=0.02)
    assert stats.decide({"a": good, "b": good}, 3)["supported"]
    assert not stats.decide({"a": good, "b": task(0.2, p_equivalence=0.03)}, 3)["supported"]
    with pytest.raises(ValueError, match="need a task"):
        stats.decide({}, 3)


# ---- the verdict --------------------------------------------------------------------------------


def modules(rng: np.random.Generator, queries: int, count: int) -> np.ndarray:
    """Cluster ids (queries,): modules of unequal size, the largest ten times the median or so."""
    share = rng.dirichlet(rng.lognormal(0, 0.9, count) * 3)
    return np.sort(np.concatenate([np.arange(count), rng.choice(count, queries - count, p=share)]))


def experiment(
    rng,
    ids,
    arms,
    seeds=3,
    lose=(),
    by=0.0,
    mean=0.45,
    arm=0.14,
    module=0.03,
    both=0.12,
    seed=0.008,
):
    """Scores of one task: arm -> (seeds, Q), every arm with the same distribution.

    Clipped to [0, 1], so mostly 0s and 1s, sd 0.38; difference of two arms sd 0.2 a query; seed sd
    of an arm's mean 0.004. Arms named in `lose` lose `by` % exactly, being scaled. `seed` may be
    a dict, arm -> spread, for arms that do not spread alike.
    """
    clusters = ids.max() + 1
    common = mean + rng.normal(0, 0.6, len(ids)) + rng.normal(0, 0.1, clusters)[ids]
    out = {}
    for name in arms:
        y = common + rng.normal(0, arm, len(ids)) + rng.normal(0, module, clusters)[ids]
        spread = seed[name] if isinstance(seed, dict) else seed
        y = y + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, both, (seeds, len(ids)))
        y = y + rng.normal(0, both / 6, (seeds, clusters))[:, ids]
        out[name] = y.clip(0, 1) * (1 - by / 100 * (name in lose))
    return out


ARMS = {
    "embedding": ("emb-only", "joint-single", "joint-moe"),
    "reranking": ("rank-only", "joint-single", "joint-moe"),
}


def study(rng, seeds=3, lose=(), by=0.0, **spread):
    """(scores, base, clusters) as `verdict` takes them; the loss is planted in the tasks `lose`."""
    ids = {"embedding": modules(rng, 1000, 50), "reranking": modules(rng, 150, 30)}
    scores = {
        t: experiment(
            rng,
            ids[t],
            ARMS[t],
            seeds,
            ("joint-single",) if t in lose else (),
            by,
            module=m,
            **spread,
        )
        for t, m in (("embedding", 0.03), ("reranking", 0.05))
    }
    return scores, {t: np.full(len(ids[t]), 0.2) for t in ids}, ids


def test_verdict_fields():
    scores, base, clusters = study(np.random.default_rng(5), lose=("embedding",), by=12.0)
    labels = {t: [f"module{c}" for c in ids] for t, ids in clusters.items()}
    got = stats.verdict(scores, base, labels)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["decision"], got["supported"], got["seeds"]) == ("proceed", True, 3)
    assert got["alpha"] == stats.alpha_at_look(3)
    e = got["tasks"]["embedding"]
    arms, pair = scores["embedding"], ("emb-only", "joint-single")
    alone = stats.interference(arms, labels["embedding"], *pair)
    assert (e["interference"], e["se"], e["df"], e["p"]) == (
        alone.value,
        alone.se,
        alone.df,
        alone.p,
    )
    assert e["interval"] == alone.interval
    assert e["p_equivalence"] == stats.tost(alone.value, alone.se, alone.df, 2.0)
    assert e["detectable_alpha"] == got["alpha"] / 2
    assert e["smallest_detectable_effect"] == stats.smallest_detectable_effect(
        alone.se, alone.df, got["alpha"] / 2
    )
    back = stats.won_back(arms, labels["embedding"], *pair, "joint-moe")
    assert (e["won_back"], e["won_back_interval"]) == (back.value, back.interval)
    assert "excludes 0" in e["won_back_reason"]
    assert e["gain_normalised"] == pytest.approx(
        (e["specialist"] - e["joint"]) / (e["specialist"] - e["base"])
    )
    r = got["tasks"]["reranking"]
    ps = stats.holm([e["p"], r["p"]])
    assert [e["p_holm"], r["p_holm"]] == ps
    assert r["won_back"] is None and "no loss" in r["won_back_reason"]


def test_measurable_is_a_gain_of_a_twentieth():
    scores = {"embedding": {"emb-only": P, "joint-single": P}}
    for base, expected in ((0.45, True), (0.4501, False)):
        got = stats.verdict(scores, {"embedding": np.full(4, base)}, {"embedding": AB})
        assert got["tasks"]["embedding"]["measurable"] == expected
        assert (got["tasks"]["embedding"]["gain_normalised"] is None) == (not expected)
        assert got["tasks"]["embedding"]["won_back_reason"] == "joint-moe was not run"
        assert got["decision"] == ("pivot" if expected else "inconclusive")
    # A specialist that finds nothing at all: no relative loss, no crash.
    dead = {"embedding": {"emb-only": 0 * P, "joint-single": P}}
    got = stats.verdict(dead, {"embedding": np.zeros(4)}, {"embedding": AB})
    assert got["tasks"]["embedding"]["interference"] is None
    assert got["decision"] == "inconclusive"


def test_one_seed_has_no_interval():
    scores, base, clusters = study(np.random.default_rng(5), 1, ("embedding",), 12.0)
    got = stats.verdict(scores, base, clusters)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["decision"], got["supported"]) == ("proceed", False)
    assert "seed variance is unknown" in got["reason"]
    e = got["tasks"]["embedding"]
    assert e["interference"] > 2 and e["p_randomisation"] < 0.01
    for key in ("interval", "se", "df", "p", "p_holm", "p_equivalence", "seed_sd", "won_back"):
        assert e[key] is None, key
    assert e["smallest_detectable_effect"] is None and e["gain_normalised_interval"] is None


def test_identical_arms_are_no_evidence_of_anything():
    e = stats.interference({"p": P, "j": P}, AB, "p", "j")
    assert e.value == 0 and e.p == 1  # the arms' seeds still vary, so the interval has width
    assert e.low < 0 < e.high
    constant = np.full((3, 4), 0.5)
    e = stats.interference({"p": constant, "j": constant}, AB, "p", "j")
    assert (e.se, e.p, e.interval) == (0, 1, [0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, b, c: s.update(j=J[:, :3]), r"'j' has shape \(2, 3\), 'p' \(2, 4\)"),
        (lambda s, b, c: s.update(j=J[0]), r"'j' has shape \(4,\)"),
        (lambda s, b, c: s.update(j=J[:0]), r"'j' has shape \(0, 4\)"),
        (lambda s, b, c: s.update(j=np.where(J == J[1, 2], np.nan, J)), r"nan at .* \[0, 0\]"),
        (lambda s, b, c: s.pop("j"), r"no scores for arm 'j'; there are \['p'"),
        (lambda s, b, c: b.update(t=np.zeros((20, 4))), r"has shape \(1, 20, 4\)"),
        (lambda s, b, c: b.update(t=np.zeros(5)), r"'untrained base' has shape \(1, 5\)"),
        (lambda s, b, c: b.update(t=np.full(4, np.inf)), "'untrained base' scores inf"),
        (lambda s, b, c: b.pop("t"), r"no base for \['t'\]"),
        (lambda s, b, c: c.update(t=["a"] * 4), "4 queries in 1 cluster; expected 2"),
        (lambda s, b, c: c.update(t=["a", "b"]), r"shape \(2,\); expected \(4,\)"),
        (lambda s, b, c: c.pop("t"), r"no clusters for \['t'\]"),
    ],
)
def test_errors_say_what_was_found(change, message):
    arms, base, clusters = {"p": P, "j": J}, {"t": np.zeros(4)}, {"t": AB}
    stats.verdict({"t": arms}, base, clusters, {"t": "p"}, "j")  # sound before the change
    change(arms, base, clusters)
    with pytest.raises(ValueError, match=message):
        stats.verdict({"t": arms}, base, clusters, {"t": "p"}, "j")


def test_ratios_without_a_denominator():
    arms = {"p": P, "j": P, "zero": 0 * P}
    with pytest.raises(ValueError, match="needs a positive mean"):
        stats.interference(arms, AB, "zero", "p")
    with pytest.raises(ValueError, match="no gain to normalise by"):
        stats.gain_normalised(arms, AB, "p", "j", P.mean(axis=0))
    with pytest.raises(ValueError, match="nothing to win back"):
        stats.won_back(arms, AB, "p", "j", "zero")


# ---- calibration --------------------------------------------------------------------------------
# Fixed generators: the counts do not vary from run to run. The bounds leave room for the binomial
# error of a count, sqrt(p (1 - p) / n), so that another generator would pass as well.

REPLICATES = 1000


def quick(scores, base, clusters, detectable=False):
    """`verdict` without Joint-MoE, the randomisation test and, where nothing reads it, what is
    detectable: the slowest part by far."""
    pair = {t: {a: y for a, y in arms.items() if a in ARMS[t][:2]} for t, arms in scores.items()}
    skipped = mock.patch.object(stats, "smallest_detectable_effect", lambda *of: math.nan)
    with contextlib.nullcontext() if detectable else skipped:
        return stats.verdict(pair, base, clusters, draws=1)


@pytest.fixture(scope="module")
def null_studies():
    """REPLICATES studies without interference: the verdict at 3 seeds, `supported` at 6 and 9."""
    rng = np.random.default_rng(11)
    out = []
    for _ in range(REPLICATES):
        scores, base, clusters = study(rng, seeds=9)
        looks = []
        for seeds in (3, 6, 9):
            seen = {t: {a: y[:seeds] for a, y in arms.items()} for t, arms in scores.items()}
            if seeds == 3:
                first = quick(seen, base, clusters, detectable=len(out) < 200)
                looks.append(first["supported"])
                continue
            e = {t: stats.interference(y, clusters[t], *ARMS[t][:2]) for t, y in seen.items()}
            p = dict(zip(e, stats.holm([v.p for v in e.values()]), strict=True))
            rows = {t: task(e[t].value, p_holm=p[t], p_equivalence=1.0) for t in e}
            looks.append(stats.decide(rows, seeds)["supported"])
        out.append((first, looks))
    return out


def test_false_support_in_at_most_five_percent(null_studies):
    looks = np.array([looks for _, looks in null_studies])
    # The promise is 5 % over all looks. Only losses proceed, so about half of alpha is used.
    assert looks.any(axis=1).mean() <= 0.05
    assert looks[:, 0].mean() <= stats.alpha_at_look(3)
    # And the instrument is alive: at its level both signs are found at about that level
    # (0.0226, binomial error 0.0047).
    p = np.array([[t["p_holm"] for t in v["tasks"].values()] for v, _ in null_studies])
    assert 0.010 <= (p.min(axis=1) <= stats.alpha_at_look(3)).mean() <= 0.036


@pytest.mark.parametrize("factor", [2, 3])
def test_false_support_where_the_joint_arm_spreads_more(factor):
    # Seed spreads so large that they dominate, and the joint arm's `factor` times the others'.
    wide = {"emb-only": 0.02, "rank-only": 0.02, "joint-moe": 0.02, "joint-single": 0.02 * factor}
    rng = np.random.default_rng(15)
    found = [quick(*study(rng, seed=wide)) for _ in range(REPLICATES)]
    assert np.mean([v["supported"] for v in found]) <= stats.alpha_at_look(3)
    for name in ("embedding", "reranking"):
        intervals = [v["tasks"][name]["interval"] for v in found]
        assert 0.93 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.98


def test_paired_intervals_cover_and_are_narrower_where_arms_share_their_seeds():
    rng, covered, ratios = np.random.default_rng(21), [], []
    for _ in range(REPLICATES):
        hard = rng.normal(0.5, 0.2, 200)
        shared = rng.normal(0, 0.02, (6, 1))
        arms = {a: hard + shared + rng.normal(0, 0.004, (6, 1)) + rng.normal(0, 0.05, (6, 200))
                for a in ("p", "j")}  # fmt: skip
        apart, together = (
            stats.interference(arms, None, "p", "j", by_seed=paired) for paired in (False, True)
        )
        covered.append(together.low <= 0 <= together.high)
        ratios.append(together.se / apart.se)
    assert 0.93 <= np.mean(covered) <= 0.97  # binomial error 0.007
    assert np.median(ratios) < 0.4  # sqrt(.004^2 / .02^2) = 0.2, and what the queries add


@pytest.mark.parametrize("name", ["embedding", "reranking"])
def test_intervals_cover_with_three_seeds(null_studies, name):
    covered = [
        v["tasks"][name]["interval"][0] <= 0 <= v["tasks"][name]["interval"][1]
        for v, _ in null_studies
    ]
    assert 0.935 <= np.mean(covered) <= 0.98  # binomial error 0.007


@pytest.mark.parametrize("name", ["embedding", "reranking"])
def test_detectable_effect_is_found_in_eighty_percent(null_studies, name):
    effect = np.median(
        [v["tasks"][name]["smallest_detectable_effect"] for v, _ in null_studies[:200]]
    )
    rng = np.random.default_rng(12)
    found = []
    for _ in range(500):
        got = quick(*study(rng, lose=(name,), by=effect))
        t = got["tasks"][name]
        found.append(t["interference"] > 0 and t["p_holm"] <= got["alpha"])
        assert got["supported"] >= (found[-1] and t["interference"] >= 2)
    # Binomial error 0.018; the effect is a median of estimates, whence the wider band.
    assert 0.74 <= np.mean(found) <= 0.87


@pytest.mark.parametrize("name", ["embedding", "reranking"])
def test_detectable_effect_holds_at_the_widest_spread_of_seeds_that_was_seen(name):
    """An arm's mean varies by 0.017 from seed to seed: few degrees of freedom, a wide estimate."""
    rng = np.random.default_rng(21)
    nulls = [quick(*study(rng, seed=0.032), True)["tasks"][name] for _ in range(100)]
    assert 0.012 < np.mean([t["seed_sd"] for t in nulls]) < 0.022
    effect = np.median([t["smallest_detectable_effect"] for t in nulls])
    found = []
    for _ in range(200):
        got = quick(*study(rng, lose=(name,), by=effect, seed=0.032))
        t = got["tasks"][name]
        found.append(t["interference"] > 0 and t["p_holm"] <= got["alpha"])
    assert 0.72 <= np.mean(found) <= 0.95  # binomial error 0.028; above 0.8 it is on the safe side


@pytest.mark.parametrize(
    "spread",
    [
        dict(
            seed=0.04, arm=0.05, module=0.0, both=0.03
        ),  # seeds dominate: 2 to 4 degrees of freedom
        dict(seed={"p": 0.01, "j": 0.04, "m": 0.01}, arm=0.05, module=0.0, both=0.03),  # unequal
        dict(seed=0.0, arm=0.1, module=0.15, both=0.03),  # modules dominate
        dict(seed=0.002, arm=0.03, module=0.0, both=0.3),  # seed x query interaction dominates
        dict(seed=0.01, arm=0.2, module=0.0, both=0.1),  # queries dominate, modules mean nothing
    ],
    ids=["seeds", "unequal seeds", "modules", "interaction", "queries"],
)
def test_coverage_whatever_dominates(spread):
    # With a true loss of 5 %, so that the ratio's own linearisation is on trial too.
    rng = np.random.default_rng(13)
    covered = []
    for _ in range(REPLICATES):
        ids = modules(rng, 400, 40)
        y = experiment(rng, ids, ("p", "j", "m"), lose=("j",), by=5.0, **spread)
        e = stats.interference(y, ids, "p", "j")
        covered.append(e.low <= 5 <= e.high)
    # Wider than nominal where interaction dominates: the seed part is floored at 0, not negative.
    assert 0.93 <= np.mean(covered) <= (0.995 if spread["both"] > 0.2 else 0.975)


def test_equivalence_is_declared_in_at_most_its_level_at_the_margin():
    # True interference 2 %, the edge of "no interference", small enough spread to have a chance.
    rng = np.random.default_rng(14)
    declared, inside = [], []
    for loss, out in ((2.0, declared), (0.0, inside)):
        for _ in range(600):
            ids = modules(rng, 400, 40)
            y = experiment(
                rng,
                ids,
                ("p", "j"),
                lose=("j",),
                by=loss,
                arm=0.03,
                module=0,
                both=0.03,
                seed=0.003,
            )
            e = stats.interference(y, ids, "p", "j")
            out.append(stats.tost(e.value, e.se, e.df, 2.0) <= 0.05)
    assert 0.025 <= np.mean(declared) <= 0.077  # binomial error 0.009
    assert np.mean(inside) > 0.5
