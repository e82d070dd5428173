"""Lists under the evaluation protocol, what their order does to them, and that pairs have none."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval import metrics, order
from eval.collections import Collection, load
from eval.protocol import EvaluationSet, without_states
from eval.rerank import to_run
from experiments import Config
from model.pseudo import PseudoQuery
from model.unimoer import UniMoER
from tests.train.tiny import NOISY_MOE, moved, tiny_config, write_collection

LOST = "q37"  # its words are in no document, so it has no candidates
Make = Callable[..., EvaluationSet]


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    data = write_collection(tmp_path_factory.mktemp("order") / "tiny")
    return tiny_config(tiny_base, data, rerank_head="interaction", **NOISY_MOE)


@pytest.fixture(scope="module")
def collection(config: Config) -> Collection:
    return load(config.data)


@pytest.fixture(scope="module")
def listwise(config: Config) -> UniMoER:
    return moved(config)


@pytest.fixture(scope="module")
def pointwise(config: Config) -> UniMoER:
    return moved(replace(config, rerank_head="linear"))


@pytest.fixture(scope="module")
def evaluation(config: Config, collection: Collection, listwise: UniMoER) -> EvaluationSet:
    return EvaluationSet(collection, listwise.tokenizer, config, without_states)


# Reranking of lists ---------------------------------------------------------------------------


def test_lists_are_read_in_bm25_s_order(evaluation, listwise, collection) -> None:
    scores = dict(zip(evaluation.pairs, evaluation.pair_scores(listwise).tolist(), strict=True))
    assert evaluation.candidates[LOST] == {} and len(scores) == len(evaluation.pairs) > 20
    for query, found in evaluation.candidates.items():
        if not found:
            continue
        documents = [collection.corpus[d] for d in found]
        ranked = dict(listwise.rank(collection.queries[query], documents))
        for i, d in enumerate(found):
            assert (1 + scores[query, d]) / 2 == pytest.approx(ranked[i], abs=1e-6)
    run = to_run(evaluation.pair_scores(listwise), evaluation.pairs)
    expected = metrics.evaluate(evaluation.reranking_qrels, run)
    assert evaluation.reranking(listwise) == expected
    part = evaluation.sample(4)
    assert {q: row for q, row in expected.items() if q in part.queries} == part.reranking(listwise)


def test_lists_have_the_collection_s_instruction(config, collection, listwise, evaluation) -> None:
    """A pseudo-query has none."""
    own = replace(collection, instruction="find it")
    asked = EvaluationSet(own, listwise.tokenizer, config, without_states)
    found, query = asked.pair_scores(listwise), asked.pairs[0][0]
    texts = [collection.corpus[d] for d in asked.candidates[query]]
    lists = [(collection.queries[query], texts)]
    [expected] = listwise.score_lists(lists, instruction="find it")
    torch.testing.assert_close(found[: len(texts)], expected, rtol=0, atol=1e-6)
    assert (found - evaluation.pair_scores(listwise)).abs().max() > 1e-4
    by_query = [each.pair_scores(listwise, asked=PseudoQuery()) for each in (asked, evaluation)]
    assert torch.equal(*by_query)


def test_a_shuffle_is_another_order_of_the_same_list(evaluation, listwise, collection) -> None:
    """Scores come back to their documents, whatever the order in which they were read."""
    plain = evaluation.pair_scores(listwise)
    for number in range(3):
        found = evaluation.pair_scores(listwise, number)
        assert torch.equal(found, evaluation.pair_scores(listwise, number))
        assert (found - plain).abs().max() > 1e-4
        scores = dict(zip(evaluation.pairs, found.tolist(), strict=True))
        for query, candidates in evaluation.candidates.items():
            ids = list(candidates)
            places = list(range(len(ids)))
            random.Random(f"{query} {number}").shuffle(places)
            shuffled = [ids[i] for i in places]
            texts = [collection.corpus[d] for d in shuffled]
            [expected] = listwise.score_lists([(collection.queries[query], texts)])
            for d, score in zip(shuffled, expected.tolist(), strict=True):
                assert scores[query, d] == pytest.approx(score, abs=1e-5)


def test_pseudo_queries_under_the_protocol(evaluation, config, collection, monkeypatch) -> None:
    """Their lists come in BM25's order too, another order gives other scores, and vectors at hand
    are timed by themselves."""
    model = moved(replace(config, rerank_head="pseudo_query"))
    scores = dict(zip(evaluation.pairs, evaluation.pair_scores(model).tolist(), strict=True))
    for query, found in evaluation.candidates.items():
        documents = [collection.corpus[d] for d in found]
        ranked = dict(model.rank(collection.queries[query], documents))
        for i, d in enumerate(found):
            assert (1 + scores[query, d]) / 2 == pytest.approx(ranked[i], abs=1e-5)
    plain, other = evaluation.pair_scores(model), evaluation.pair_scores(model, 0)
    # Without vectors at hand, those of the candidates alone are made.
    given = evaluation.pair_scores(model, vectors=evaluation.vectors(model))
    torch.testing.assert_close(plain, given)
    assert (other - plain).abs().max() > 1e-5
    seen = []

    def read(self, model: UniMoER, shuffle: int, vectors: Tensor) -> Tensor:
        seen.append((shuffle, len(vectors)))
        return plain

    monkeypatch.setattr(EvaluationSet, "pair_scores", read)
    order.sensitivity(model, evaluation, 3)
    texts = len(evaluation.queries) + len(evaluation.documents)
    assert seen == [(0, texts), (1, texts), (2, texts)], "each order, of the same vectors"
    monkeypatch.undo()
    # Only what is read changes places: its first two, so the third keeps its score.
    few = PseudoQuery(read=2)
    rows = [evaluation.pair_scores(model, k, asked=few) for k in (None, *range(6))]
    third = evaluation.pairs.index(
        [p for p in evaluation.pairs if p[0] == evaluation.pairs[0][0]][2]
    )
    assert len({round(float(row[third]), 5) for row in rows}) == 2
    part = evaluation.sample(3)
    found = order.speed(model, part)
    assert found["stored_pairs_per_second"] > 0 and found["pairs_per_second"] > 0
    assert found["pairs"] == len(part.pairs)


# Kendall's tau --------------------------------------------------------------------------------


def test_kendall_tau_by_hand() -> None:
    assert order.kendall_tau("abc", "abc") == 1
    assert order.kendall_tau("abc", "cba") == -1
    assert order.kendall_tau("abcd", "bacd") == pytest.approx(1 - 2 / 6)
    assert order.kendall_tau("ab", "ba") == -1


# Sensitivity ----------------------------------------------------------------------------------


def test_a_model_that_scores_pairs_never_sees_the_order(evaluation, pointwise, collection) -> None:
    found = order.sensitivity(pointwise, evaluation, 4)
    reranked = metrics.mean(evaluation.reranking(pointwise), "ndcg_cut_10")
    assert found["by_order"] == [reranked] * 4 and found["mean"] == pytest.approx(reranked)
    assert (found["spread"], found["tau"]) == (0.0, 1.0)
    # and it is so: the pairs of a shuffled list score what they score in BM25's order
    query, candidates = next(iter(evaluation.candidates.items()))
    documents = [collection.corpus[d] for d in candidates]
    plain = pointwise.predict([(collection.queries[query], d) for d in documents])
    backwards = pointwise.predict([(collection.queries[query], d) for d in documents[::-1]])
    torch.testing.assert_close(backwards.flip(0), plain, rtol=0, atol=1e-6)


def test_sensitivity_of_lists(evaluation, listwise) -> None:
    found = order.sensitivity(listwise, evaluation, 3)
    assert len(set(found["by_order"])) > 1 and 0 < found["spread"] < 1
    assert found["mean"] == pytest.approx(sum(found["by_order"]) / 3)
    assert -1 < found["tau"] < 1
    assert (found["orders"], found["queries"]) == (3, len(evaluation.reranking_qrels))


def test_sensitivity_by_hand(evaluation, listwise, monkeypatch) -> None:
    """Two orders: the right document first, then last; all other documents change places too."""
    right = [float(d in evaluation.qrels[q]) for q, d in evaluation.pairs]
    places = torch.arange(len(right)) / len(right)
    scores = [10 * torch.tensor(right) + places, -10 * torch.tensor(right) - places]
    monkeypatch.setattr(
        EvaluationSet, "pair_scores", lambda self, model, shuffle=None, **options: (
            scores[shuffle or 0])
    )  # fmt: skip
    found = order.sensitivity(listwise, evaluation, 2)
    ceiling = metrics.mean(evaluation.ceiling(), "ndcg_cut_10")
    assert found["by_order"][0] == pytest.approx(ceiling) and found["tau"] == -1
    spread = abs(found["by_order"][0] - found["by_order"][1]) / 2**0.5
    assert found["spread"] == pytest.approx(spread)


def test_equal_scores_are_ranked_as_trec_eval_does(evaluation, listwise, monkeypatch) -> None:
    """Scores that differ below float32 are equal, and the ranking is the same in each order."""
    n = len(evaluation.pairs)
    noise = [1 + 1e-12 * torch.randn(n, dtype=torch.float64) for _ in range(2)]
    monkeypatch.setattr(
        EvaluationSet, "pair_scores", lambda self, model, shuffle=None, **options: (
            noise[shuffle or 0])
    )  # fmt: skip
    found = order.sensitivity(listwise, evaluation, 2)
    assert (found["spread"], found["tau"]) == (0.0, 1.0)


def test_one_candidate_has_no_order(evaluation, config, collection, listwise) -> None:
    single = EvaluationSet(
        collection, listwise.tokenizer, replace(config, candidates=1), without_states
    )
    found = order.sensitivity(listwise, single, 2)
    assert found["tau"] is None and found["spread"] == pytest.approx(0, abs=1e-9)


# Speed ----------------------------------------------------------------------------------------


def test_speed_counts_the_pairs_that_were_ranked(evaluation, listwise, monkeypatch) -> None:
    seen = []

    def rank(self: UniMoER, query: str, documents: list[str]) -> list[Tensor]:
        seen.append((query, tuple(documents)))
        return []

    monkeypatch.setattr(UniMoER, "rank", rank)
    clock = iter((10.0, 12.5))
    monkeypatch.setattr(order.time, "perf_counter", lambda: next(clock))
    found = order.speed(listwise, evaluation)
    filled = [row for row in evaluation.candidates.values() if row]
    assert seen[0] == seen[1] and len(seen) == 1 + len(filled)  # once before, untimed
    assert found["pairs"] == len(evaluation.pairs) and found["seconds"] == 2.5
    assert found["pairs_per_second"] == len(evaluation.pairs) / 2.5
    lost = evaluation.sample(10)
    lost.candidates = {LOST: {}}
    assert order.speed(listwise, lost) == {"pairs": 0, "seconds": 0.0, "pairs_per_second": None}
