"""The fixed rule of the study: when a loss counts, what is decided, and how sure that is."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.inference import (
    ALPHA,
    detectable_interval,
    holm,
    smallest_detectable_effect,
    tost,
)
from eval.stats import (
    BASE,
    Arms,
    Clusters,
    Estimate,
    checked,
    cluster_ids,
    gain_normalised,
    interference,
    paired_randomisation,
    seed_variance,
    won_back,
)

TaskResult = dict[str, Any]  # one task of `verdict`, whose docstring lists the keys

LOOKS = (3, 6, 9)  # seeds at which the study looks at its data
MEASURABLE_GAIN = 0.05  # nDCG@10 that a specialist must add to the untrained base
PIVOT_BELOW, PROCEED_FROM = 1.0, 2.0  # % interference; the second is also the equivalence margin
SPECIALIST = {"embedding": "emb-only", "reranking": "rank-only"}
JOINT, MOE = "joint-single", "joint-moe"
NEEDED = (*SPECIALIST.values(), JOINT)  # without all of these there is no verdict
NAMES = {"embedding": "retrieval"}  # of tasks, as they are shown; else their own


def alpha_at_look(seeds: int, previous: int | None = None, alpha: float = ALPHA) -> float:
    """Level of this look: a(seeds) - a(previous), a(s) = alpha ln(1 + (e - 1) min(s / 9, 1)).

    a is the Pocock-type spending of Lan and DeMets 1983; the increments sum to alpha, so looks are
    valid by Bonferroni whatever their correlation. previous=None is the plan: the larger of 3, 6
    below `seeds`, else 0. A look off the plan, say at 5, so takes the place of the next planned
    one, and more than 9 seeds that of the last. To look at 5 and again at 6 pass previous=5; to
    look first at 9, previous=0. Raises ValueError unless 0 <= previous < min(seeds, 9).
    """
    if previous is None:
        previous = max((look for look in LOOKS[:-1] if look < seeds), default=0)
    if not 0 <= previous < min(seeds, LOOKS[-1]):
        raise ValueError(f"look at {seeds} seeds after {previous}; need previous < min(seeds, 9)")
    now, before = (math.log1p((math.e - 1) * min(s / LOOKS[-1], 1.0)) for s in (seeds, previous))
    return alpha * (now - before)


def decide(
    tasks: Mapping[str, TaskResult],
    seeds: int,
    alpha: float | None = None,
    names: Mapping[str, str] = NAMES,
) -> dict:
    """The fixed rule: {"decision", "supported", "reason"}; alpha: of this look, I: to 9 digits.

    I >= 2 % on a measurable task: `proceed`. Every task measurable and under 1 %: `pivot`. A
    measurable task between: `more_seeds`, from 9 seeds `inconclusive`. A task that is not
    measurable is no evidence of "no interference": it bars pivot, and where only that is in the
    way the answer is `inconclusive` at once, since more seeds do not make a specialist learn.
    supported: for proceed, a task with I >= 2 % has p_holm <= alpha, so there is a loss (that it is
    2 % or more is its point estimate's word alone); for pivot, every task has p_equivalence <=
    alpha, so each |I| is under 2 % (all must, so there is no correction); else, and with one seed,
    False. Reads measurable, interference, p_holm, p_equivalence; names: of tasks, in the reason.
    ValueError without tasks or seeds.
    """
    if not tasks or seeds < 1:
        raise ValueError(f"need a task and a seed; found {list(tasks)}, {seeds} seeds")
    alpha = alpha_at_look(seeds) if alpha is None else alpha
    tasks = {names.get(k, k): task for k, task in tasks.items()}
    size = {k: round(t["interference"], 9) for k, t in tasks.items() if t["measurable"]}
    large = [k for k in size if size[k] >= PROCEED_FROM]
    between = [k for k in size if PIVOT_BELOW <= size[k] < PROCEED_FROM]
    unmeasured = [k for k in tasks if k not in size]
    said = [f"Interference: {', '.join(f'{k} {v:+.2f} %' for k, v in size.items()) or 'unknown'}."]
    said += [f"{k} is not measurable: training gains it too little." for k in unmeasured]
    evidence: dict[str, float | None] = {}  # a task's p, None if there is none
    if large:
        decision, evidence = "proceed", {k: tasks[k]["p_holm"] for k in large}
        said.append(f"{PROCEED_FROM:g} % or more on {' and '.join(large)}: proceed.")
    elif between:
        decision = "more_seeds" if seeds < LOOKS[-1] else "inconclusive"
        said.append(f"Between the limits on {' and '.join(between)} with {seeds} seeds.")
    elif unmeasured:
        decision = "inconclusive"
        said.append("More seeds will not change that: train longer or change the set-up.")
    else:
        decision, evidence = "pivot", {k: t["p_equivalence"] for k, t in tasks.items()}
        said.append(f"Under {PIVOT_BELOW:g} % on every task: pivot.")
    passed = [p is not None and p <= alpha for p in evidence.values()]
    supported = seeds > 1 and (any(passed) if large else bool(passed) and all(passed))
    if seeds == 1 or None in evidence.values():
        why = "a second seed the seed variance is unknown" if seeds == 1 else (
            "an interval (queries of one cluster) nothing is tested"
        )  # fmt: skip
        said.append(f"Nothing is supported: without {why}.")
    elif evidence:
        p = ", ".join(f"{k} {v:.4f}" for k, v in evidence.items())
        sure = [k for k, v in evidence.items() if v is not None and v <= alpha]
        what = f"a loss on {' and '.join(sure or large)}" if large else (
            f"|I| under {PROCEED_FROM:g} % on every task"
        )  # fmt: skip
        p = f"{what} ({'Holm-adjusted' if large else 'equivalence'} p {p}, level {alpha:.4f})"
        said.append(f"Supported: {p}." if supported else f"Not supported: {p}.")
    return {"decision": decision, "supported": supported, "reason": " ".join(said)}


def verdict(
    scores: Mapping[str, Arms],
    base: Mapping[str, np.ndarray],
    clusters: Mapping[str, Clusters],
    specialist: Mapping[str, str] = SPECIALIST,
    joint: str = JOINT,
    moe: str | None = MOE,
    family: int | None = None,
    draws: int = 10_000,
) -> dict[str, Any]:
    """The verdict as JSON-able data: decision, supported, reason, seeds, alpha, tasks.

    scores: task -> arm -> (S_a, Q); base: task -> (Q,); clusters: task -> Q labels or None;
    family: how many tasks the study tests, also those without scores here (default: these); draws:
    of the randomisation test. seeds is the fewest of a specialist or joint arm, alpha the level of
    this look. Each task has (None: not available)
    measurable; specialist, joint, moe, base, seed_sd (nDCG, 0 to 1); interference, interval, se
    (%), df, p, p_holm, p_randomisation, p_equivalence; smallest_detectable_effect (%) with its
    detectable_interval and detectable_alpha = alpha / family, Holm's first step; gain_normalised
    and won_back (fractions) with _interval, won_back_reason. Intervals are 95 %, not adjusted for
    looks. Holm's family is all tasks, measurable or not, with scores or without. ValueError as
    `arm_mean`, or if an argument lacks a task.
    """
    for name, table in (("base", base), ("clusters", clusters), ("specialist", specialist)):
        if missing := set(scores) - set(table):
            raise ValueError(f"no {name} for {sorted(missing)}; there are {sorted(table)}")
    arms = {
        task: checked({**y, BASE: np.asarray(base[task])[None]}, [specialist[task], joint])
        for task, y in scores.items()
    }
    seeds = min((len(y[a]) for t, y in arms.items() for a in (specialist[t], joint)), default=0)
    alpha, family = alpha_at_look(seeds), family or len(arms)
    tasks: dict[str, TaskResult] = {}
    for task, y in arms.items():
        pair, labels, b = (specialist[task], joint), clusters[task], y.pop(BASE)[0]
        level = alpha / family
        p, base_mean = float(y[pair[0]].mean()), float(b.mean())
        ids, several = cluster_ids(labels, len(b)), min(len(y[arm]) for arm in pair) > 1
        spread = [seed_variance(y[arm], ids)[0] for arm in pair] if several else [math.nan]
        # To nine digits, so that rounding alone does not put 0.45 - 0.40 below 0.05.
        measurable = round(p - base_mean, 9) >= MEASURABLE_GAIN
        loss = interference(y, labels, *pair) if p > 0 else Estimate(math.nan)
        gain = gain_normalised(y, labels, *pair, b) if measurable else Estimate(math.nan)
        back, why = Estimate(math.nan), "the joint arm has no loss whose interval excludes 0"
        if moe is None:
            why = None
        elif moe not in y:
            why = f"{moe} was not run"
        elif loss.low > 0:
            back = won_back(y, labels, *pair, moe)
            why = "the interval of the joint arm's loss excludes 0"
        difference = y[pair[0]].mean(axis=0) - y[joint].mean(axis=0)
        least = smallest_detectable_effect(loss.se, loss.df, level)
        sure = least == least  # not NaN
        found = {
            **{"measurable": measurable, "specialist": p, "base": base_mean},
            "joint": float(y[joint].mean()),
            "moe": float(y[moe].mean()) if moe in y else None,
            "seed_sd": math.sqrt(sum(spread) / len(spread)),
            **{"interference": loss.value, "interval": loss.interval},
            **{"se": loss.se, "df": loss.df, "p": loss.p},
            "p_randomisation": paired_randomisation(difference, labels, draws),
            "p_equivalence": tost(loss.value, loss.se, loss.df, PROCEED_FROM),
            "smallest_detectable_effect": least,
            "detectable_interval": list(detectable_interval(least, loss.df)) if sure else None,
            "detectable_alpha": level,
            **{"gain_normalised": gain.value, "gain_normalised_interval": gain.interval},
            **{"won_back": back.value, "won_back_interval": back.interval, "won_back_reason": why},
        }
        tasks[task] = {k: None if v != v else v for k, v in found.items()}  # JSON knows no NaN
    known = [1.0 if t["p"] is None else t["p"] for t in tasks.values()]  # no p: 1
    adjusted = holm(known + [1.0] * (family - len(tasks)))
    for t, p in zip(tasks.values(), adjusted, strict=False):
        t["p_holm"] = None if t["p"] is None else p
    return {**decide(tasks, seeds, alpha), "seeds": seeds, "alpha": alpha, "tasks": tasks}
