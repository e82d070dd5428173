"""How much the order in which candidates are read matters, and how fast they are scored."""

import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from eval.metrics import evaluate, mean
from eval.protocol import EvaluationSet
from eval.rerank import to_run
from model.unimoer import UniMoER

METRIC = "ndcg_cut_10"


def kendall_tau(first: Sequence[str], second: Sequence[str]) -> float:
    """Of two orders of the same n >= 2 documents; 1 for equal ones, -1 for opposite ones."""
    at = {document: i for i, document in enumerate(second)}
    assert at.keys() == set(first) and len(at) == len(first) > 1
    found: Any = stats.kendalltau(range(len(at)), [at[document] for document in first])
    return float(found.statistic)


def sensitivity(model: UniMoER, evaluation: EvaluationSet, orders: int) -> dict[str, Any]:
    """Rerank the same candidates in `orders` random orders.

    A model that scores pairs does not see the order, so one pass stands for all of them.

    Returns:
        by_order: nDCG@10 of each order; mean, and spread, their standard deviation; tau: the mean
        of Kendall's tau between the rankings of two orders, over queries with two candidates or
        more and all pairs of orders, None without such a query; queries, orders: how many.
    """
    assert orders > 1
    numbers = range(orders) if model.config.listwise else [0]
    by_vectors = model.config.rerank_head == "pseudo_query"
    vectors = evaluation.vectors(model) if by_vectors else None
    runs = [
        to_run(evaluation.pair_scores(model, k, vectors=vectors), evaluation.pairs) for k in numbers
    ]
    values = [mean(evaluate(evaluation.reranking_qrels, run), METRIC) for run in runs]
    # Ranked as trec_eval does it: equal scores by document id, descending.
    ranked = [
        {query: sorted(row, key=lambda d: (np.float32(row[d]), d), reverse=True)
         for query, row in run.items() if len(row) > 1}
        for run in runs
    ]  # fmt: skip
    taus = [
        kendall_tau(one[query], other[query])
        for one, other in combinations(ranked, 2)
        for query in one
    ]
    if len(runs) == 1:
        values, taus = values * orders, [1.0] * len(ranked[0])
    return {
        "by_order": values,
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(set(values)) > 1 else 0.0,
        "tau": float(np.mean(taus)) if taus else None,
        "queries": len(evaluation.reranking_qrels),
        "orders": orders,
    }


def speed(model: UniMoER, evaluation: EvaluationSet) -> dict[str, Any]:
    """Pairs per second of `rank`, one query after the other, with tokenization and without prefix
    states: what a user waits for. The first query is ranked once before, untimed. Where reranking
    compares vectors, `stored_pairs_per_second` is with those of the documents at hand."""
    c = evaluation.collection
    requests = [
        (c.queries[query], [c.corpus[d] for d in found])
        for query, found in evaluation.candidates.items()
        if found
    ]
    if not requests:
        return {"pairs": 0, "seconds": 0.0, "pairs_per_second": None}
    model.rank(*requests[0])
    started = time.perf_counter()
    for query, documents in requests:
        model.rank(query, documents)
    seconds = time.perf_counter() - started
    pairs = sum(len(documents) for _, documents in requests)
    found = {"pairs": pairs, "seconds": seconds, "pairs_per_second": pairs / seconds}
    if model.config.rerank_head == "pseudo_query":
        kept = [model.encode_document(documents) for _, documents in requests]
        started = time.perf_counter()
        for (query, documents), vectors in zip(requests, kept, strict=True):
            model.rank(query, documents, vectors=vectors)
        found["stored_pairs_per_second"] = pairs / (time.perf_counter() - started)
    return found
