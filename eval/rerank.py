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


def head_weights(width: int, heads: int = HEADS) -> Tensor:
    """(width, heads) weights of random linear heads, always the same, drawn as `heads.LinearScore`
    draws its own.

    What reranking is worth before training: an untrained model has no relevance head, and one
    random head may be lucky by several points, so the reference is the mean of many.
    """
    return torch.rand(width, heads, generator=torch.Generator().manual_seed(0)) * 2 - 1


def over_heads(
    scores: Tensor,
    pairs: list[tuple[str, str]],
    qrels: dict[str, dict[str, int]],
    relevant: int = 1,
) -> dict[str, dict[str, float]]:
    """Per query, the mean over heads of what their scores (n, heads) of n pairs are worth."""
    names = (*METRICS, MRR_10)  # whose cut does not follow from a mean of reciprocal ranks
    runs = [
        evaluate(qrels, to_run(column, pairs), metrics=names, relevant=relevant)
        for column in scores.t()
    ]
    return {
        query: {metric: sum(run[query][metric] for run in runs) / len(runs) for metric in names}
        for query in qrels
    }
