"""Scores for eval/stats.py: a few written by hand, and whole studies drawn at random."""

import numpy as np

# Additive, so that seeds and queries do not interact: P = 0.5 -+ 0.1 (seed) -+ 0.1 (cluster).
P = np.array([[0.5, 0.5, 0.3, 0.3], [0.7, 0.7, 0.5, 0.5]])
J = P - 0.1
AB = ["a", "a", "b", "b"]


def task(interference, measurable=True, p_holm=0.5, p_equivalence=0.5):
    return {
        "measurable": measurable,
        "interference": interference,
        "p_holm": p_holm,
        "p_equivalence": p_equivalence,
    }


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
