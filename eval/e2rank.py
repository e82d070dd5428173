"""E2Rank's way to rerank (`model.pseudo`) for any embedder, under the evaluation protocol."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from eval.protocol import EvaluationSet
from model.pseudo import ByPseudoQuery, List, PseudoQuery
from model.unimoer import UniMoER

__all__ = ["PseudoQuery", "pair_scores", "score_lists"]


def score_lists(
    model: UniMoER, lists: Sequence[List], asked: PseudoQuery | None = None
) -> list[Tensor]:
    """The scores (n,) of each list's n documents, from their texts; asked None: the defaults."""
    return ByPseudoQuery(model.tokenizer, asked).scores(model.embed_all, lists)


def pair_scores(
    model: UniMoER,
    evaluation: EvaluationSet,
    vectors: Tensor,
    asked: PseudoQuery,
    progress: bool = False,
) -> Tensor:
    """Scores (n,) of the evaluation's `pairs`, its candidates being read in BM25's order.

    Args:
        vectors: of `evaluation.vectors`.
    """
    c, documents = evaluation.collection, vectors[len(evaluation.queries) :]
    place = {d: i for i, d in enumerate(evaluation.documents)}
    lists, rows = [], []
    for query, found in evaluation.candidates.items():
        if found:
            lists.append((c.queries[query], [c.corpus[d] for d in found]))
            rows.append(documents[[place[d] for d in found]])
    embed = partial(model.embed_all, progress=progress, shared=True)
    scores = ByPseudoQuery(model.tokenizer, asked).scores(embed, lists, rows)
    return torch.cat([torch.zeros(0), *scores])
