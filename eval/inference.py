"""Tests and intervals of one number: Holm, equivalence, power, the interval of a ratio."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, stats

ALPHA = 0.05  # spent over all looks
FAR = 1e6  # times the first step: beyond, the interval has no end


def holm(p: Sequence[float]) -> list[float]:
    """Holm 1979: the i-th smallest (from 0) of m becomes max_{k <= i} (m - k) p_(k), at most 1."""
    if not all(0 <= v <= 1 for v in p):
        raise ValueError(f"p-values must lie in [0, 1]; found {list(p)}")
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, dtype=np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def tost(value: float, se: float, df: float, margin: float) -> float:
    """p of two one-sided t tests (Schuirmann 1987): small means |true value| < margin.

    Larger P(t_df >= (margin +- value) / se). ValueError unless margin > 0, se >= 0 and df > 0.
    """
    if margin <= 0 or se < 0 or df <= 0:
        raise ValueError(f"need margin > 0, se >= 0, df > 0; found {margin}, {se}, {df}")
    if se == 0:
        return float(abs(value) >= margin)
    return float(stats.t.sf((margin - abs(value)) / se, df))


def power(effect: float, se: float, df: float, alpha: float = ALPHA) -> float:
    """P(|t'| > t_{1 - alpha/2, df}), t' noncentral with df and shift effect / se (in one unit).

    Raises ValueError unless se > 0, df > 0 and 0 < alpha < 1.
    """
    if se <= 0 or df <= 0 or not 0 < alpha < 1:
        raise ValueError(f"need se > 0, df > 0, 0 < alpha < 1; found {se}, {df}, {alpha}")
    return _power(abs(effect) / se, float(stats.t.isf(alpha / 2, df)), df)


def _power(shift: float, critical: float, df: float) -> float:
    far = np.nan_to_num(stats.nct.cdf(-critical, df, shift))  # scipy: NaN where it is under 1e-16
    return float(stats.nct.sf(critical, df, shift) + far)


def smallest_detectable_effect(se: float, df: float, alpha: float, target: float = 0.8) -> float:
    """The effect, in the unit of se, at which `power` reaches target; 0 when se is 0."""
    if not se > 0:  # 0, or NaN
        return se
    critical = float(stats.t.isf(alpha / 2, df))
    high = 2 * (critical + float(stats.t.isf(1 - target, df)))
    found = optimize.root_scalar(lambda x: _power(x, critical, df) - target, bracket=(0, high))
    return se * float(found.root)


def detectable_interval(effect: float, df: float) -> tuple[float, float]:
    """95 % interval of `smallest_detectable_effect`, which rests on a standard error that is itself
    an estimate: df s^2 / sigma^2 is chi-squared (of several variances: nearly, df after
    Satterthwaite), and the effect is in proportion to s."""
    low, high = stats.chi2.isf((0.025, 0.975), df)
    return effect * math.sqrt(df / low), effect * math.sqrt(df / high)


def fieller(
    contrast: Callable[[float], tuple[float, float, float]], ratio: float, step: float
) -> tuple[float, float]:
    """95 % interval of a ratio N / D: all w for which N - w D cannot be told from 0 (Fieller 1954).

    Args:
        contrast: w -> N - w D, its standard error and degrees of freedom. ratio: N / D of the
            estimates. step: how far from it to look first, its standard error by the delta method.
    Returns:
        low, high; NaN both where it has no ends, which is where D itself cannot be told from 0, or
            where there are no standard errors.
    """

    def outside(w: float) -> float:
        value, se, df = contrast(w)
        return abs(value) - float(stats.t.isf(0.025, df)) * se

    if not outside(ratio) <= 0:
        return math.nan, math.nan
    ends = []
    for side in (-1, 1):
        reach = step
        while reach < FAR * step and outside(ratio + side * reach) <= 0:
            reach *= 2
        if not 0 < reach < FAR * step:
            return math.nan, math.nan
        ends.append(float(optimize.brentq(outside, ratio, ratio + side * reach)))  # type: ignore
    return ends[0], ends[1]
