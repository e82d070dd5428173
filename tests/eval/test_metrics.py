"""eval/metrics.py against values worked out by hand."""

import math

import numpy as np
import pytest

from eval.metrics import METRICS, MRR_10, evaluate, ideal, mean


def test_ndcg_and_the_rest_worked_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "c": 0, "d": 1}}  # d is never retrieved
    run = {"q": {"x": 9.0, "a": 8.0, "c": 7.0, "b": 6.0}}  # x is not judged
    # ranks: x 0, a 2, c 0, b 1; ideal order: a 2, b 1, d 1
    dcg = 2 / math.log2(3) + 1 / math.log2(5)
    ideal_dcg = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    row = evaluate(qrels, run)["q"]
    assert tuple(row) == METRICS
    assert row["ndcg_cut_10"] == pytest.approx(dcg / ideal_dcg, abs=1e-9)
    assert row["map"] == pytest.approx((1 / 2 + 2 / 4) / 3, abs=1e-9)
    assert row["recip_rank"] == pytest.approx(1 / 2, abs=1e-9)
    assert row["recall_100"] == pytest.approx(2 / 3, abs=1e-9)


def test_only_the_first_ten_and_the_first_hundred_count():
    run = {"q": {f"d{i:03d}": -float(i) for i in range(150)}}
    row = evaluate({"q": {"d009": 1, "d010": 1, "d100": 1}}, run)["q"]
    best = sum(1 / math.log2(rank + 1) for rank in (1, 2, 3))
    assert row["ndcg_cut_10"] == pytest.approx(1 / math.log2(11) / best, abs=1e-9)
    assert row["recall_100"] == pytest.approx(2 / 3, abs=1e-9)


def test_ties_are_ordered_by_document_id_descending():
    assert evaluate({"q": {"b": 1}}, {"q": {"a": 1.0, "b": 1.0}})["q"]["recip_rank"] == 1
    assert evaluate({"q": {"a": 1}}, {"q": {"a": 1.0, "b": 1.0}})["q"]["recip_rank"] == 0.5


def test_what_is_equal_in_float32_is_a_tie():
    higher = 1.0 + 1e-9  # above 1 in float64, equal to 1 in float32
    assert higher > 1.0
    assert evaluate({"q": {"a": 1}}, {"q": {"a": higher, "b": 1.0}})["q"]["recip_rank"] == 0.5
    apart = float(np.nextafter(np.float32(1), np.float32(2)))
    assert evaluate({"q": {"a": 1}}, {"q": {"a": apart, "b": 1.0}})["q"]["recip_rank"] == 1


def test_a_judged_query_is_never_dropped_and_an_unjudged_one_is_ignored():
    qrels = {"found": {"a": 1}, "absent": {"a": 1}, "empty": {"a": 1}, "none": {"a": 0}, "bare": {}}
    run = {"unjudged": {"a": 1.0}, "none": {"a": 1.0}, "empty": {}, "found": {"a": 1.0}}
    rows = evaluate(qrels, run)
    assert list(rows) == list(qrels)
    assert rows["found"] == dict.fromkeys(METRICS, 1.0)
    for query in ("absent", "empty", "none", "bare"):
        assert rows[query] == dict.fromkeys(METRICS, 0.0)
    assert mean(rows, "map") == pytest.approx(1 / 5)


def test_nothing_retrieved_at_all_scores_zero():
    assert evaluate({"q": {"a": 1}}, {}) == {"q": dict.fromkeys(METRICS, 0.0)}


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e39])
def test_a_score_that_is_no_float32_number_is_an_error(score):
    with pytest.raises(ValueError, match="query 'q', document 'b'"):
        evaluate({"q": {"a": 1}}, {"q": {"a": 1.0, "b": score}})


def test_mean_needs_queries_and_a_known_metric():
    rows = {"q": {"map": 0.5}, "r": {"map": 0.25}}
    assert mean(rows, "map") == 0.375
    with pytest.raises(ValueError, match="no query"):
        mean({}, "map")
    with pytest.raises(ValueError, match="'ndcg'"):
        mean(rows, "ndcg")


def test_ideal_is_the_best_of_all_orderings():
    qrels = {"q": {"a": 1, "b": 2, "z": 1}}
    candidates = ["x", "a", "b", "y"]
    best = ideal(qrels, {"q": candidates})["q"]
    dcg = 2 + 1 / math.log2(3)
    assert best["ndcg_cut_10"] == pytest.approx(dcg / (dcg + 1 / math.log2(4)), abs=1e-9)
    assert best["recip_rank"] == 1
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores = dict(zip(candidates, rng.permutation(4).astype(float).tolist(), strict=True))
        row = evaluate(qrels, {"q": scores})["q"]
        assert all(row[metric] <= best[metric] + 1e-12 for metric in METRICS)


def test_ideal_keeps_a_query_without_candidates_and_reads_a_run():
    rows = ideal({"q": {"a": 1}, "r": {"a": 1}}, {"q": {"b": 3.0, "a": 1.0}})
    assert rows["q"]["ndcg_cut_10"] == 1
    assert rows["r"] == dict.fromkeys(METRICS, 0.0)


def test_ms_marcos_mrr_is_cut_at_ten():
    run = {f"q{rank}": {f"d{i:02d}": -float(i) for i in range(20)} for rank in (1, 3, 10, 11)}
    qrels = {f"q{rank}": {f"d{rank - 1:02d}": 1, "d19": 1} for rank in (1, 3, 10, 11)}
    qrels["absent"] = {"d00": 1}  # counts: the official script divides by the judged queries
    rows = evaluate(qrels, run, metrics=(MRR_10, "recip_rank"))
    assert [row[MRR_10] for row in rows.values()] == [1, 1 / 3, 1 / 10, 0, 0]
    assert rows["q11"]["recip_rank"] == pytest.approx(1 / 11)
    assert mean(rows, MRR_10) == pytest.approx((1 + 1 / 3 + 1 / 10) / 5, abs=1e-12)
    assert mean(evaluate(qrels, run), MRR_10) == mean(rows, MRR_10)  # from what is stored always


def test_the_deep_learning_track_counts_from_grade_two():
    """Its grade 1 is "related, but not relevant"; nDCG has all grades as gains."""
    qrels = {"q": {"a": 3, "b": 1, "c": 2, "d": 0}}
    run = {"q": {"b": 4.0, "c": 3.0, "d": 2.0, "a": 1.0}}
    names = (*METRICS, MRR_10)
    graded = evaluate(qrels, run, metrics=names)["q"]
    strict = evaluate(qrels, run, metrics=names, relevant=2)["q"]
    dcg = 1 + 2 / math.log2(3) + 3 / math.log2(5)
    ndcg = dcg / (3 + 2 / math.log2(3) + 1 / math.log2(4))
    assert graded["ndcg_cut_10"] == strict["ndcg_cut_10"] == pytest.approx(ndcg, abs=1e-9)
    assert (graded["recip_rank"], strict["recip_rank"], strict[MRR_10]) == (1, 1 / 2, 1 / 2)
    assert graded["map"] == pytest.approx((1 + 1 + 3 / 4) / 3, abs=1e-9)
    assert strict["map"] == pytest.approx((1 / 2 + 2 / 4) / 2, abs=1e-9)
    with pytest.raises(ValueError, match="relevant=0: expected a grade of at least 1"):
        evaluate(qrels, run, relevant=0)


def test_every_figure_is_mtebs():
    """Random graded runs with ties, against mteb's own code."""
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores as scores

    rng = np.random.default_rng(1)
    documents = [f"d{i}" for i in range(120)]
    qrels = {
        f"q{q}": {d: int(g) for d, g in zip(documents, rng.integers(0, 4, 120), strict=True)
                  if rng.random() < 0.1} | {"d0": 1}
        for q in range(30)
    }  # fmt: skip
    run = {
        query: {d: float(s) for d, s in zip(documents, rng.integers(0, 50, 120), strict=True)}
        for query in qrels
    }
    theirs = scores(run, qrels, [10, 100, 1000])
    rows = evaluate(qrels, run, metrics=(*METRICS, MRR_10, "recall_1000"))
    for name, value in (
        (MRR_10, theirs.mrr["MRR@10"]),
        ("ndcg_cut_10", theirs.ndcg["NDCG@10"]),
        ("map", theirs.map["MAP@1000"]),
        ("recall_100", theirs.recall["Recall@100"]),
        ("recall_1000", theirs.recall["Recall@1000"]),
    ):
        # mteb rounds means to 5 digits, and not what it has of each query.
        assert abs(round(mean(rows, name), 5) - value) < 1e-6, name
    for query, row in rows.items():
        for name in ("ndcg_cut_10", "map", "recall_100", "recall_1000"):
            value = theirs.all_scores[query]["map_cut_1000" if name == "map" else name]
            assert row[name] == pytest.approx(value, abs=1e-6), (query, name)
    assert [row[MRR_10] for row in rows.values()] == pytest.approx(_mteb_mrr(qrels, run), abs=1e-6)


def _mteb_mrr(qrels, run) -> list[float]:
    from mteb._evaluators.retrieval_metrics import mrr

    return mrr(qrels, run, [10])["MRR@10"]
