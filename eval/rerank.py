"""Reranking of fixed first-stage candidates, and what an untrained head makes of them."""

import torch
from torch import Tensor

from eval.metrics import METRICS, MRR_10, evaluate
from model import parallel
from model.prefix import TextSet
from model.texts import in_batches
from model.unimoer import UniMoER

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


@torch.no_grad()
def scores_by_heads(model: UniMoER, texts: TextSet, progress: bool = False) -> Tensor:
    """Scores (n, HEADS) of n pairs by `head_weights` over the bare base; shared over ranks."""
    weights = head_weights(model.decoder.config.hidden_size).to(model.device)
    scores = torch.zeros(len(texts.ids), HEADS)

    def score(batch, states, base) -> tuple[Tensor, list[Tensor]]:
        read, routing = model.pooled(batch, "reranking", states, base)
        return read.float() @ weights, routing

    for indices, rows in in_batches(
        model.decoder, texts, score, base=True, progress=progress, shared=True, trie=True
    ):
        scores[indices] = rows
    return parallel.together(scores, model.device)


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
