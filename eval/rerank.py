"""Reranking of fixed first-stage candidates, and what an untrained head makes of them."""

import torch
from torch import Tensor

from eval.metrics import METRICS, MRR_10, evaluate

HEADS = 20  # random ones of an untrained model


def to_run(scores: Tensor, pairs: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Scores (n,) of n (query id, document id) pairs as a run: query -> document -> score."""
    run: dict[str, dict[str, float]] = {}
    for (query, document), score in zip(pairs, scores.tolist(), strict=True):
        run.setdefault(query, {})[document] = score
    return run


def random_heads(
    pooled: Tensor,
    pairs: list[tuple[str, str]],
    qrels: dict[str, dict[str, int]],
    heads: int = HEADS,
) -> dict[str, dict[str, float]]:
    """What reranking is worth before training: per query, the mean over random linear heads.

    An untrained model has no relevance head, and one random head may be lucky by several points,
    so the reference is the mean of many, each with weights drawn as `heads.LinearScore` draws them.

    Args:
        pooled: (n, D) pooled final states of the bare base, one row per pair.
    """
    return over_heads(pooled @ head_weights(pooled.shape[1], heads), pairs, qrels)


def head_weights(width: int, heads: int = HEADS) -> Tensor:
    """(width, heads) weights of random linear heads, always the same."""
    return torch.rand(width, heads, generator=torch.Generator().manual_seed(0)) * 2 - 1


def over_heads(
    scores: Tensor, pairs: list[tuple[str, str]], qrels: dict[str, dict[str, int]]
) -> dict[str, dict[str, float]]:
    """Per query, the mean over heads of what their scores (n, heads) of n pairs are worth."""
    names = (*METRICS, MRR_10)  # whose cut does not follow from a mean of reciprocal ranks
    runs = [evaluate(qrels, to_run(column, pairs), metrics=names) for column in scores.t()]
    return {
        query: {metric: sum(run[query][metric] for run in runs) / len(runs) for metric in names}
        for query in qrels
    }
