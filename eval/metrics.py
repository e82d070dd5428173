"""Per-query ranking metrics, through trec_eval (`pytrec_eval`); the interval of a mean."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytrec_eval
from scipy import stats

METRICS = ("ndcg_cut_10", "map", "recip_rank", "recall_100")
MRR_10 = "recip_rank_cut_10"  # MS MARCO's; trec_eval's recip_rank has no cut
NAMES = {"ndcg_cut_10": "nDCG@10", MRR_10: "MRR@10"}


def headline(collection: str, split: str) -> str:
    """The one of NAMES that a collection's authors measure: MS MARCO's and mMARCO's of dev have
    MRR@10 (TREC's Deep Learning track, which is MS MARCO's test, has nDCG@10)."""
    marco = collection == "msmarco" or collection.startswith("mmarco-")
    return MRR_10 if marco and split == "dev" else "ndcg_cut_10"


def deep_enough(names: Sequence[str], depth: int) -> list[str]:
    """Those of a ranking of `depth` documents: recall at 1,000 is none of a hundred."""
    cuts = ((name, re.search(r"_(\d+)$", name)) for name in names)
    return [name for name, cut in cuts if cut is None or int(cut[1]) <= depth]


def evaluate(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Mapping[str, float]],
    *,
    metrics: Sequence[str] = METRICS,
    relevant: int = 1,
) -> dict[str, dict[str, float]]:
    """Score a run, one row for each judged query.

    nDCG@10 is trec_eval's: DCG = sum over ranks r <= 10 of grade / log2(r + 1), divided by the DCG
    of the ideal ordering of *all* judged documents; a document is relevant for the other metrics
    when its grade is at least `relevant`. recip_rank_cut_10 is MS MARCO's MRR@10: 1/rank of the
    first relevant document, 0 where that is not among the first ten. Documents are ordered by
    score, equal scores by document id, descending. Scores are rounded to float32 first, so that
    what counts as equal does not depend on the precision in which a score was computed.

    Args:
        qrels: query id -> document id -> grade.
        run: query id -> document id -> score (higher is better). A judged query that is absent
            here, or has no document, scores 0 (trec_eval -c); one that is not judged is ignored.
        metrics: names of trec_eval's, or recip_rank_cut_10.
        relevant: 2 for the passages of TREC's Deep Learning track, whose grade 1 is "related, but
            not relevant" (trec_eval -l 2). nDCG keeps all grades.
    Returns:
        query id -> metric -> value in [0, 1], in the order of `qrels`; a query whose judged
        documents are all irrelevant scores 0, as in trec_eval. (It skips one without any judgment,
        which `EvaluationSet` leaves out.)
    Raises:
        ValueError: a score is not finite in float32 (the query and the document are named), or
            `relevant` is below 1.
    """
    if relevant < 1:
        raise ValueError(f"relevant={relevant}: expected a grade of at least 1")
    scores = {query: _float32(query, run[query]) for query in qrels if run.get(query)}
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(judged) for query, judged in qrels.items()},
        {"recip_rank" if metric == MRR_10 else metric for metric in metrics},
        relevance_level=relevant,
    )
    rows = evaluator.evaluate(scores)
    return {query: {m: _value(rows.get(query, {}), m) for m in metrics} for query in qrels}


def _value(row: Mapping[str, float], metric: str) -> float:
    if not row:
        return 0.0
    if metric == MRR_10:
        return row["recip_rank"] if row["recip_rank"] >= 1 / 10 else 0.0
    return row[metric]


def mean(per_query: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """The metric's mean over queries; recip_rank_cut_10 is read off recip_rank where it is absent.

    Raises:
        ValueError: there is no query, or no such metric.
    """
    if not per_query:
        raise ValueError(f"no query to average {metric!r} over: the split has no judged query")
    values = []
    for query, row in per_query.items():
        if metric not in row and not (metric == MRR_10 and "recip_rank" in row):
            raise ValueError(f"metric {metric!r} is absent for query {query!r}: use {METRICS}")
        values.append(row[metric] if metric in row else _value(row, metric))
    return float(np.mean(values))


def ideal(
    qrels: Mapping[str, Mapping[str, int]],
    candidates: Mapping[str, Iterable[str]],
    relevant: int = 1,
) -> dict[str, dict[str, float]]:
    """What the best possible reranking of fixed candidates would score: the ceiling they set.

    Args:
        candidates: query id -> document ids (a run of `BM25.search` will do: its keys are read).
        relevant: as of `evaluate`.
    Returns:
        as `evaluate`.
    """
    run: dict[str, dict[str, float]] = {}
    for query, judged in qrels.items():
        best = sorted(set(candidates.get(query, ())), key=lambda d: (-judged.get(d, 0), d))
        run[query] = {document: -float(rank) for rank, document in enumerate(best)}
    return evaluate(qrels, run, relevant=relevant)


def _float32(query: str, documents: Mapping[str, float]) -> dict[str, float]:
    with np.errstate(over="ignore"):  # an overflow becomes inf, which is reported below
        values = np.fromiter(documents.values(), np.float64, len(documents)).astype(np.float32)
    for document, value in zip(documents, values, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"query {query!r}, document {document!r}: score {documents[document]} is not a "
                "finite float32; a ranking needs numbers"
            )
    return {document: float(v) for document, v in zip(documents, values, strict=True)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % t interval of the mean; NaN of fewer than two values."""
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    middle, se = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.isf(0.025, n - 1)) * se
    return middle - half, middle + half
