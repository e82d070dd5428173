"""Statistics of the study: crossed seed-and-query intervals and the tests that rest on them.

For one task every arm a has scores Y_a of shape (S_a, Q): S_a seeds on the same Q queries, which
carry cluster labels (domain or module; C clusters). What is reported is a smooth function of the
arms' means with gradient g_a; with u_q = sum_a g_a mean_s Y_a[s, q] the delta method gives

    V = V_query + sum_a V_a,   V_a = max(sigma_a^2 - omega_a^2, 0) * g_a^2 / S_a

    V_query    variance of mean_q u_q over clusters (`cluster_variance`)
    sigma_a^2  variance over seeds of the arm's mean
    omega_a^2  the part of sigma_a^2 that is seed x query interaction, estimated over clusters

Seeds and queries are crossed: V_query holds their interaction once and sigma^2 again, hence the
subtraction (two-way random effects, as in multi-reader studies: Hillis 2007, doi:10.1002/sim.2532).
df = V^2 / (V_query^2 / df_query + sum_a V_a^2 / (S_a - 1)), the V_a before subtraction. Each arm
has its own seed variance, as in Welch's test: pooled, intervals cover 89 % where one arm spreads
three times as much as the other. Assumed: the arms are independent given the queries (a positive
correlation through a shared seed number leaves it too wide); the untrained base has no seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from eval.inference import fieller

Arms = Mapping[str, np.ndarray]  # arm -> (S_a, Q) scores
Clusters = Sequence[str] | np.ndarray | None  # Q labels; None: each query its own cluster

BASE = "untrained base"  # its key among the arms while they are checked


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, degrees of freedom, 95 % interval and two-sided p of value = 0.

    All but `value` are NaN when an arm has one seed: its seed variance is then unknown.
    """

    value: float
    se: float = math.nan
    df: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan

    @property
    def interval(self) -> list[float] | None:
        """[low, high], or None where there is none."""
        return None if math.isnan(self.low) else [self.low, self.high]


def cluster_ids(clusters: Clusters, queries: int) -> np.ndarray:
    """Labels -> integers (Q,) in 0..C-1; raises ValueError unless Q labels name 2 clusters."""
    labels = np.arange(queries) if clusters is None else np.asarray(clusters)
    if labels.shape != (queries,):
        raise ValueError(f"cluster labels have shape {labels.shape}; expected ({queries},)")
    names, ids = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{queries} queries in {len(names)} cluster; expected 2 clusters or more")
    return ids


def cluster_variance(u: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """Variance of mean(u) with clusters resampled, and its degrees of freedom; u and ids (Q,).

    V = (C - 1) / C * sum_c (T_c / (Q - n_c))^2,  T_c = sum_{q in c} (u_q - mean u)
    df = max(1 / sum_c (n_c / Q)^2 - 1, 1), the effective number of clusters less one

    The delete-one-cluster jackknife (CR3; Bell and McCaffrey 2002), which respects unequal sizes;
    equal ones give the usual factor C / (C - 1) and C - 1 degrees of freedom.
    """
    sizes = np.bincount(ids)
    totals = np.bincount(ids, weights=u - u.mean())
    variance = (1 - 1 / len(sizes)) * float(np.sum((totals / (len(u) - sizes)) ** 2))
    return variance, max(len(u) ** 2 / float(np.sum(sizes**2)) - 1, 1.0)


def satterthwaite(variances: Sequence[float], dfs: Sequence[float]) -> float:
    """df of a sum of variances, (sum v)^2 / sum(v^2 / df), or min(dfs) if all are 0."""
    spread = sum(v**2 / f for v, f in zip(variances, dfs, strict=True))
    return sum(variances) ** 2 / spread if spread else float(min(dfs))


def seed_variance(y: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """(sigma^2, omega^2) of one arm (S, Q), S > 1, as in the module docstring; score units squared.

    sigma^2 = sum_s (mean_q y[s] - mean y)^2 / (S - 1); omega^2 = sum_s cluster_variance of
    y[s] - row mean - column means + mean y, / (S - 1).
    """
    row = y.mean(axis=1, keepdims=True)  # (S, 1)
    residual = y - row - y.mean(axis=0) + y.mean()  # (S, Q)
    interaction = sum(cluster_variance(r, ids)[0] for r in residual)
    return float(row.var(ddof=1)), interaction / (len(y) - 1)


def checked(arms: Arms, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """The arms in float64, or a ValueError that says which one does not fit."""
    if missing := [name for name in needed if name not in arms]:
        raise ValueError(f"no scores for arm {missing[0]!r}; there are {sorted(arms)}")
    checked = {name: np.asarray(y, dtype=np.float64) for name, y in arms.items()}
    shape = checked[needed[0]].shape
    for name, y in checked.items():
        if y.ndim != 2 or len(y) == 0 or y.shape[1:] != shape[1:]:
            raise ValueError(f"{name!r} has shape {y.shape}, {needed[0]!r} {shape}; not (seeds, Q)")
        for at in np.argwhere(~np.isfinite(y))[:1].tolist():
            raise ValueError(f"{name!r} scores {y[tuple(at)]} at [seed, query] {at}; not finite")
    return checked


@dataclass(frozen=True)
class Part:
    """What an estimate takes from one set of queries: the gradient of it by each arm's mean there,
    the arms' scores, the clusters, and `fixed` (Q,), which is added to u."""

    gradient: Mapping[str, float]
    arms: Arms
    clusters: Clusters
    fixed: Any = 0.0


def estimate(
    value: float, gradient: Mapping[str, float], arms: Arms, clusters: Clusters, fixed: Any = 0.0
) -> Estimate:
    """Interval of f(means) from its gradient (module docstring); `fixed` (Q,) is added to u."""
    return estimate_over(value, [Part(gradient, arms, clusters, fixed)])


def estimate_over(value: float, parts: Sequence[Part]) -> Estimate:
    """The same where f depends on the means over several sets of other queries, of the same models:
    the sets are independent as queries are drawn, and a seed moves an arm on all of them at once.

        V_query = sum_k V_query,k,   omega_a^2 = sum_k g_ak^2 omega_ak^2,
        sigma_a^2 = variance over seeds of sum_k g_ak mean_q Y_ak[s]

    Args:
        parts: the same arms in each, an arm's seeds in one order.
    """
    names, query = list(parts[0].gradient), []  # (variance, df) of each part
    for part in parts:
        scored = (g * part.arms[name].mean(axis=0) for name, g in part.gradient.items())
        u = np.asarray(part.fixed + sum(scored))
        query.append(cluster_variance(u, cluster_ids(part.clusters, len(u))))
    if min(len(parts[0].arms[name]) for name in names) < 2:
        return Estimate(value)
    before = [variance for variance, _ in query]  # of the interaction's subtraction
    after, dfs = list(before), [df for _, df in query]
    for name in names:
        seeds, omega2 = len(parts[0].arms[name]), 0.0
        moved = np.zeros(seeds)
        for part in parts:
            y, g = part.arms[name], part.gradient[name]
            omega2 += g**2 * seed_variance(y, cluster_ids(part.clusters, y.shape[1]))[1]
            moved += g * y.mean(axis=1)
        sigma2 = float(moved.var(ddof=1))
        before.append(sigma2 / seeds)
        after.append(max(sigma2 - omega2, 0.0) / seeds)
        dfs.append(seeds - 1.0)
    variance, df = sum(after), satterthwaite(before, dfs)
    if variance > 0:  # its numerator is the sum before subtraction
        df = max(df * (variance / sum(before)) ** 2, 1.0)
    se = math.sqrt(variance)
    half = float(stats.t.isf(0.025, df)) * se
    p = float(2 * stats.t.sf(abs(value) / se, df)) if se else float(value == 0)
    return Estimate(value, se, df, value - half, value + half, p)


def paired(value: float, gradient: Mapping[str, float], arms: Arms, clusters: Clusters) -> Estimate:
    """As `estimate`, where seed s stands for the same batches and initialisation in all arms: what
    varies is sum_a g_a Y_a[s], a draw a seed, so what a seed does to all arms alike drops out.

    Raises ValueError unless the arms have equally many seeds, which have to be the same ones.
    """
    if len({len(arms[name]) for name in gradient}) > 1:
        raise ValueError(f"paired arms have {[len(arms[name]) for name in gradient]} seeds")
    together = np.asarray(sum(g * arms[name] for name, g in gradient.items()))  # (S, Q)
    return estimate(value, {"contrast": 1.0}, {"contrast": together}, clusters)


def arm_mean(arms: Arms, clusters: Clusters, arm: str) -> Estimate:
    """Mean score of one arm, in score units (nDCG 0 to 1).

    arms: arm -> (S_a, Q). ValueError for a missing arm, misfit shapes, non-finite scores, one
    cluster: also in the five functions below.
    """
    y = checked(arms, [arm])
    return estimate(float(y[arm].mean()), {arm: 1.0}, y, clusters)


def above_reference(arms: Arms, clusters: Clusters, arm: str, reference: np.ndarray) -> Estimate:
    """100 * (mean_arm - mean of reference), in points; reference (Q,) has no seeds, as BM25."""
    y = checked({**arms, BASE: np.asarray(reference)[None]}, [arm])
    value = 100 * float(y[arm].mean() - y[BASE].mean())
    return estimate(value, {arm: 100.0}, y, clusters, -100 * y[BASE][0])


def arm_difference(
    arms: Arms, clusters: Clusters, arm: str, other: str, by_seed: bool = False
) -> Estimate:
    """100 * (mean_arm - mean_other), in points (0.01 nDCG). by_seed: as of `interference`."""
    y = checked(arms, [arm, other])
    value, of = 100 * float(y[arm].mean() - y[other].mean()), paired if by_seed else estimate
    return of(value, {arm: 100.0, other: -100.0}, y, clusters)


def interference(
    arms: Arms, clusters: Clusters, specialist: str, joint: str, by_seed: bool = False
) -> Estimate:
    """I = 100 * (P - J) / P, in % of the specialist's mean P; J the joint arm's.

    u[s, q] = 100 * (J / P * Y_P[s, q] - Y_J[s, q]) / P. Also raises ValueError unless P > 0.
    by_seed: by `paired`, not as independent arms.
    """
    y = checked(arms, [specialist, joint])
    p, j = float(y[specialist].mean()), float(y[joint].mean())
    if p <= 0:
        raise ValueError(f"mean of {specialist!r} is {p}; a relative loss needs a positive mean")
    of = paired if by_seed else estimate
    return of(100 * (p - j) / p, {specialist: 100 * j / p**2, joint: -100 / p}, y, clusters)


def gain_normalised(
    arms: Arms, clusters: Clusters, specialist: str, joint: str, base: np.ndarray
) -> Estimate:
    """G = (P - J) / (P - B), a fraction of what training gained the specialist; base (Q,), mean B.

    First order: needs P - B of several standard errors. Also raises ValueError if P = B.
    """
    y = checked({**arms, BASE: np.asarray(base)[None]}, [specialist, joint])
    b = y.pop(BASE)
    p, j = float(y[specialist].mean()), float(y[joint].mean())
    if (gain := p - float(b.mean())) == 0:
        raise ValueError(f"specialist and base both score {p}; there is no gain to normalise by")
    value = (p - j) / gain
    gradient = {specialist: (1 - value) / gain, joint: -1 / gain}
    return estimate(value, gradient, y, clusters, value / gain * b[0])


def won_back(arms: Arms, clusters: Clusters, specialist: str, joint: str, other: str) -> Estimate:
    """W = (M - J) / (P - J), the fraction of the joint arm's loss that arm `other` (M) undoes, with
    Fieller's interval (none where it has no ends): the loss may be few standard errors.

    `eval.rule.verdict` gives it where the interval of P - J excludes 0. Also raises ValueError if
    P = J.
    """
    y = checked(arms, [specialist, joint, other])
    p, j, m = (float(y[name].mean()) for name in (specialist, joint, other))
    if (loss := p - j) == 0:
        raise ValueError(f"{specialist!r} and {joint!r} both score {p}; nothing to win back")

    def contrast(w: float, unit: float = 1.0) -> Estimate:
        gradient = {other: unit, specialist: -w * unit, joint: (w - 1) * unit}
        return estimate((m - j - w * loss) * unit, gradient, y, clusters)

    first = contrast((m - j) / loss, 1 / loss)  # by the delta method
    low, high = fieller(lambda w: astuple(contrast(w))[:3], (m - j) / loss, first.se)
    return replace(first, value=(m - j) / loss, low=low, high=high, p=contrast(0.0).p)


def paired_randomisation(
    difference: np.ndarray, clusters: Clusters, draws: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of mean difference = 0 when signs flip by whole cluster; difference (Q,).

    T = |sum_c +-D_c|; p = share of sign patterns with T at least as observed, all of them for 12
    clusters or fewer, else (1 + hits) / (1 + draws) (Smucker et al. 2007, Phipson and Smyth 2010).
    On seed-averaged differences it asks about new queries for these very models: blind to seeds,
    it decides nothing by itself. Raises ValueError as `cluster_ids`.
    """
    totals = np.bincount(cluster_ids(clusters, len(difference)), weights=difference)  # (C,)
    # A tie with the observed sum counts in spite of rounding.
    observed = abs(totals.sum()) - 1e-12 * np.abs(totals).sum()
    if (count := len(totals)) <= 12:
        flips = (np.arange(2**count)[:, None] >> np.arange(count)) & 1  # (2^C, C)
        return float(np.mean(np.abs((1 - 2 * flips) @ totals) >= observed))
    rng = np.random.default_rng(seed)
    hits = 0
    for left in range(draws, 0, -1000):  # blocks bound the memory when every query is a cluster
        flips = rng.integers(0, 2, size=(min(1000, left), count))
        hits += int(np.sum(np.abs((1 - 2 * flips) @ totals) >= observed))
    return (1 + hits) / (1 + draws)
