"""eval/protocol.py, eval/rerank.py: what a trial is measured on, for every arm and seed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval import metrics
from eval.bm25 import BM25
from eval.collections import Collection, load
from eval.protocol import EvaluationSet, without_states
from eval.rerank import HEADS, head_weights, over_heads, to_run
from eval.stages import Stages
from experiments import Config
from model.heads import pool
from model.packed import pack
from model.unimoer import UniMoER
from tests.train.tiny import NOISY_MOE, TEST, moved, tiny_config, tokens_only, write_collection
from train.trial import model_config

LOST = "q37"  # the last test query, whose words are in no document
Make = Callable[..., EvaluationSet]


@pytest.fixture(scope="module")
def config(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tiny_base, write_collection(tmp_path_factory.mktemp("protocol") / "tiny"))


@pytest.fixture(scope="module")
def collection(config: Config) -> Collection:
    return load(config.data)


@pytest.fixture(scope="module")
def model(config: Config) -> UniMoER:
    return moved(replace(config, **NOISY_MOE))


@pytest.fixture(scope="module")
def make(config: Config, collection: Collection, model: UniMoER) -> Make:
    def make(**changes) -> EvaluationSet:
        return EvaluationSet(
            collection, model.tokenizer, replace(config, **changes), without_states
        )

    return make


def test_candidates_are_bm25_s_own(make, collection):
    evaluation = make()
    assert collection.bm25("test") is make().collection.bm25("dev")  # one pool, one index
    pool = collection.pools["test"]
    bm25 = BM25(pool, [collection.corpus[d] for d in pool])
    assert list(evaluation.candidates) == sorted(collection.qrels["test"])
    for query, row in evaluation.candidates.items():
        expected = bm25.search({"q": collection.queries[query]}, 6)["q"]
        assert list(row) == list(expected)
        assert row == expected


def test_only_pairs_that_can_change_a_score_are_scored(collection, config, model):
    """As if all had been: a query without a relevant candidate scores 0 in any order. So for lists
    and for the untrained base."""
    other = next(q for q in collection.qrels["test"] if q != LOST)
    qrels = collection.qrels | {"test": collection.qrels["test"] | {other: {"d0": 1}}}
    for head in ("linear", "interaction"):
        settings, reader = (
            replace(config, rerank_head=head),
            moved(replace(config, rerank_head=head)),
        )
        of = replace(collection, qrels=qrels), reader.tokenizer, settings, without_states
        evaluation, every = EvaluationSet(*of), EvaluationSet(*of)
        every.decisive = every.candidates
        assert every.decisive.keys() - evaluation.decisive.keys() == {LOST, other}
        assert len(every.pairs) - len(evaluation.pairs) == len(every.candidates[other]) > 0
        made = [[of.reranking(reader) for of in (evaluation, every)]]
        if head == "linear":
            made.append([of.untrained(model)["reranking"] for of in (evaluation, every)])
        for found, expected in made:
            assert list(found) == list(expected) and found[other]["ndcg_cut_10"] == 0
            for query, row in expected.items():
                assert found[query] == pytest.approx(row)
    assert other in evaluation.sample(99).decisive


def test_nothing_is_forced_in(make, collection):
    """The relevant document of LOST is not found, so no reranker can score there, nor a ceiling."""
    evaluation = make()
    assert LOST in evaluation.reranking_qrels and evaluation.candidates[LOST] == {}
    assert evaluation.ceiling()[LOST] == dict.fromkeys(metrics.METRICS, 0.0)
    missed = make(candidates=1)
    absent = [q for q in missed.candidates if missed.ceiling()[q]["ndcg_cut_10"] == 0]
    top = {q: next(iter(row), None) for q, row in missed.candidates.items()}
    assert absent == [q for q in top if top[q] not in collection.qrels["test"][q]]


def test_no_ranking_beats_the_ceiling(make, model):
    evaluation = make()
    ceiling = evaluation.ceiling()
    runs = [evaluation.reranking(model), evaluation.bm25_scores()["reranking"]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(len(evaluation.pairs), generator=generator)
        shuffled = to_run(scores, evaluation.pairs)
        runs.append(metrics.evaluate(evaluation.reranking_qrels, shuffled))
    below = 0
    for row in runs:
        assert list(row) == list(ceiling)
        for query in ceiling:
            for metric in metrics.METRICS:
                assert row[query][metric] <= ceiling[query][metric]
            below += row[query]["ndcg_cut_10"] < ceiling[query]["ndcg_cut_10"]
    assert below > 20
    # and the judge itself reaches it
    perfect = [float(d in evaluation.qrels[q]) for q, d in evaluation.pairs]
    best = to_run(torch.tensor(perfect), evaluation.pairs)
    assert metrics.evaluate(evaluation.reranking_qrels, best) == ceiling


def test_pairs_depend_on_neither_seed_nor_arm(make):
    evaluation = make()
    for changes in ({"seed": 7}, {"seed_offset": 1000}, {"tasks": ("reranking",)}, NOISY_MOE):
        other = make(**changes)
        assert (other.pairs, other.queries) == (evaluation.pairs, evaluation.queries)
        assert other.documents == evaluation.documents


def test_fewer_reranking_queries_are_a_subset_in_a_fixed_order(make):
    chosen = {n: list(make(reranking_queries=n).reranking_qrels) for n in (3, 6, TEST, 99, 0)}
    assert [len(row) for row in chosen.values()] == [3, 6, TEST, TEST, TEST]
    assert set(chosen[3]) < set(chosen[6]) < set(chosen[TEST])
    assert chosen[99] == chosen[0] == sorted(make().queries)
    assert all(row == sorted(row) for row in chosen.values())
    assert chosen[3] != chosen[0][:3]  # drawn, not the first by name
    assert make(reranking_queries=3, seed=5).pairs == make(reranking_queries=3).pairs
    # retrieval is measured on all of them anyway
    assert len(make(reranking_queries=3).queries) == TEST


def test_the_split_decides_queries_and_pool(make, collection):
    dev = make(split="dev")
    assert dev.queries == list(collection.qrels["dev"])
    own = replace(collection, pools={**collection.pools, "dev": ["d24", "d25", "d0"]})
    evaluation = EvaluationSet(own, dev.tokenizer, dev.config, without_states)
    assert evaluation.documents == ["d24", "d25", "d0"]
    assert {d for _, d in evaluation.pairs} <= {"d24", "d25", "d0"}
    with pytest.raises(ValueError, match="tiny has no final split"):
        make(split="final")


def test_clusters_are_domains_where_there_are_any(make, collection, model, config):
    assert make().clusters == {q: q for q in collection.qrels["test"]}
    first = next(iter(collection.qrels["test"]))
    labelled = replace(collection, domain={first: "os"})
    evaluation = EvaluationSet(labelled, model.tokenizer, config, without_states)
    assert evaluation.clusters[first] == "os" and evaluation.clusters[LOST] == LOST


def test_retrieval_is_what_a_user_gets_from_the_same_texts(make, model, collection):
    evaluation = make()
    queries = model.encode_query([collection.queries[q] for q in evaluation.queries])
    documents = model.encode_document([collection.corpus[d] for d in evaluation.documents])
    cosine = model.similarity(queries, documents)
    found = {
        q: dict(zip(evaluation.documents, cosine[i].tolist(), strict=True))
        for i, q in enumerate(evaluation.queries)
    }
    top = {q: dict(sorted(row.items(), key=lambda x: -x[1])[:20]) for q, row in found.items()}
    expected = metrics.evaluate(evaluation.qrels, top)
    scores = evaluation.retrieval(model)
    assert list(scores) == evaluation.queries
    for query, row in scores.items():
        assert row == pytest.approx(expected[query], abs=1e-6)


def test_reranking_is_what_a_user_gets_from_the_same_texts(make, model, collection):
    evaluation = make()
    pairs = [(collection.queries[q], collection.corpus[d]) for q, d in evaluation.pairs]
    expected = metrics.evaluate(
        evaluation.reranking_qrels, to_run(model.predict(pairs), evaluation.pairs)
    )
    assert evaluation.reranking(model) == expected


def test_depth_cuts_what_retrieval_may_return(make, model):
    deep, shallow = make(), make(retrieval_depth=2)
    for scores in (shallow.retrieval(model), shallow.bm25_scores()["embedding"]):
        assert {row["recip_rank"] for row in scores.values()} <= {0, 0.5, 1}
    full = deep.retrieval(model)
    cut = shallow.retrieval(model)
    assert any(cut[q]["recip_rank"] < full[q]["recip_rank"] for q in full)
    assert all(cut[q]["recip_rank"] in (0, full[q]["recip_rank"]) for q in full)


def test_the_bm25_row_ranks_as_bm25_does(make, collection):
    evaluation = make(candidates=30, retrieval_depth=3)
    scores = evaluation.bm25_scores()
    assert scores["embedding"].keys() == collection.qrels["test"].keys()
    assert scores["reranking"] == metrics.evaluate(evaluation.qrels, evaluation.candidates)
    found = max(evaluation.candidates, key=lambda q: scores["reranking"][q]["ndcg_cut_10"])
    assert scores["reranking"][found]["ndcg_cut_10"] > 0.5


def test_the_untrained_rows_ignore_what_was_trained(make, model, config):
    """Retrieval of the bare base; twenty random heads on its pooled states."""
    evaluation = make()
    fresh = UniMoER(model_config(config), seed=3)
    rows = evaluation.untrained(model)
    assert rows == evaluation.untrained(fresh)
    assert rows["embedding"] == evaluation.retrieval(fresh, base=True)
    assert rows["embedding"] != evaluation.retrieval(model)
    collection = evaluation.collection
    ids = model.tokenizer.pairs(
        [(collection.queries[q], collection.corpus[d]) for q, d in evaluation.pairs]
    )
    with torch.no_grad():
        pooled = [pool(fresh.decoder(b, base=True)[0], b, "mean") for b in map(pack, zip(ids))]
    heads = random_heads(torch.cat(pooled), evaluation.pairs, evaluation.reranking_qrels)
    assert rows["reranking"].keys() == heads.keys()
    found, expected = (metrics.mean(r, "ndcg_cut_10") for r in (rows["reranking"], heads))
    assert found == pytest.approx(expected, abs=0.02)  # rounding may swap two documents


def random_heads(pooled, pairs, qrels, heads: int = HEADS):
    return over_heads(pooled @ head_weights(pooled.shape[1], heads), pairs, qrels)


def test_random_heads_are_a_mean_over_twenty():
    """With one feature a head is a sign: the order or its reverse, nothing between."""
    pairs = [("q", d) for d in ("a", "b", "c")]
    qrels = {"q": {"a": 1}, "unseen": {"a": 1}}
    scores = random_heads(torch.tensor([[3.0], [2.0], [1.0]]), pairs, qrels)
    assert scores["unseen"] == dict.fromkeys((*metrics.METRICS, metrics.MRR_10), 0.0)
    share = (scores["q"]["recip_rank"] - 1 / 3) / (1 - 1 / 3)  # of heads with a positive sign
    assert 0 < share < 1 and share * 20 == pytest.approx(round(share * 20), abs=1e-9)
    assert scores["q"]["ndcg_cut_10"] == pytest.approx(share + (1 - share) / 2)
    assert scores["q"]["recall_100"] == 1
    # drawn anew, they are the same
    assert random_heads(torch.tensor([[3.0], [2.0], [1.0]]), pairs, qrels) == scores


def test_random_heads_see_every_feature():
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(40, 16, generator=generator)
    pairs = [(f"q{i // 4}", f"d{i % 4}") for i in range(40)]
    qrels = {f"q{i}": {"d0": 1} for i in range(10)}
    many = metrics.mean(random_heads(pooled, pairs, qrels, heads=200), "ndcg_cut_10")
    # the right one of four at a random place: (1 + .631 + .5 + .431) / 4
    assert many == pytest.approx(0.640, abs=0.03)


def test_to_run_keeps_each_score_with_its_pair():
    scores = torch.tensor([0.5, -1.0, 2.0])
    pairs = [("q", "a"), ("p", "a"), ("q", "b")]
    assert to_run(scores, pairs) == {"q": {"a": 0.5, "b": 2.0}, "p": {"a": -1.0}}
    with pytest.raises(ValueError, match="zip"):
        to_run(scores[:2], pairs)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_large_corpus_is_searched_window_by_window(make, collection, model, monkeypatch, size):
    """The same metrics as of all vectors at once, at each width, and no vectors are kept."""
    first = next(iter(collection.qrels["test"]))
    struck = replace(collection, excluded={first: list(collection.pools["test"])[:3]})
    whole = make(retrieval_depth=5)
    whole = EvaluationSet(struck, model.tokenizer, whole.config, without_states)
    expected, vectors = whole.retrieved(model, (4, 8))
    assert vectors is not None and len({str(scores) for scores in expected}) == 3
    monkeypatch.setattr("eval.protocol.WINDOW", size)
    monkeypatch.setattr("eval.protocol.SCORES", 3 * size)  # three queries at once
    encoded = []
    embed = UniMoER.embed_all

    def counted(self, texts, **options):
        encoded.append(len(texts.ids))
        return embed(self, texts, **options)

    monkeypatch.setattr(UniMoER, "embed_all", counted)
    found, kept = whole.retrieved(model, (4, 8))
    assert found == expected
    documents = len(whole.documents)
    if size < documents:
        assert kept is None and max(encoded[1:]) == size and sum(encoded[1:]) == documents
    else:
        assert kept is not None and torch.equal(kept, vectors)


@pytest.mark.parametrize("size", [1, 7])
def test_many_pairs_are_scored_window_by_window(make, model, monkeypatch, size):
    """Of whole queries, with the scores of all pairs at once; so for the untrained base."""
    whole = make()
    expected = whole.pair_scores(model), whole.untrained(model)
    monkeypatch.setattr("eval.protocol.WINDOW", size)
    windows = whole._windows()
    assert len(windows) > 1 and [p for part in windows for p in part.pairs] == whole.pairs
    assert all(len(p.pairs) <= size or len(p.decisive) == 1 for p in windows)
    torch.testing.assert_close(
        whole._by_window(lambda part: part.pair_scores(model), None, ""), expected[0]
    )
    found = whole.untrained(model)["reranking"]
    for query, row in expected[1]["reranking"].items():
        assert found[query] == pytest.approx(row)


def test_vectors_that_a_pseudo_query_reranks_with_are_not_encoded_twice(
    make, config, tmp_path, monkeypatch
):
    """Stopped between its tasks, it ends with the same scores to the last bit."""
    model = moved(replace(config, rerank_head="pseudo_query"))
    tasks = ("embedding", "reranking")
    evaluation = make(rerank_head="pseudo_query")
    whole = evaluation.scores(model, tasks, Stages(tmp_path / "whole.json", {}))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EvaluationSet, "reranking", stopped)
        evaluation.scores(model, tasks, Stages(tmp_path / "part.json", {}))
    monkeypatch.setattr(EvaluationSet, "retrieved", None)
    assert evaluation.scores(model, tasks, Stages(tmp_path / "part.json", {})) == whole


@pytest.mark.parametrize(("relevant", "recall"), [({}, 1.0), ({"test": 2}, 0.0)])
def test_the_grade_that_counts_is_the_collections(collection, model, config, relevant, recall):
    """TREC's Deep Learning track has grades below what is relevant; nDCG keeps all of them."""
    of = replace(collection, relevant_from=relevant)
    found = EvaluationSet(of, model.tokenizer, config, without_states)
    top = {q: dict.fromkeys(row, 1.0) for q, row in found.reranking_qrels.items()}
    assert {row["recall_100"] for row in found.evaluate(found.reranking_qrels, top).values()} == {
        recall
    }
    ceiling, bm25 = found.ceiling(), found.bm25_scores()["reranking"]
    assert all((row["map"] > 0) == (recall > 0 and row["ndcg_cut_10"] > 0)
               for of in (ceiling, bm25) for row in of.values())  # fmt: skip
    assert any(row["ndcg_cut_10"] > 0 for row in ceiling.values())


def test_what_is_excluded_is_taken_out_before_the_cut(collection, model, config, make):
    """As if the ranking had been made deeper, and then the documents struck out."""
    first, second = list(collection.qrels["test"])[:2]
    free = make(candidates=40, retrieval_depth=40)
    top = {q: list(row) for q, row in free.bm25.items()}
    out = [top[first][0], "d0", top[first][2]]  # two of the best, one that is far down
    struck = replace(collection, excluded={first: out})
    settings = replace(config, candidates=3, retrieval_depth=4)
    evaluation = EvaluationSet(struck, model.tokenizer, settings, without_states)
    left = [d for d in top[first] if d not in out]
    assert list(evaluation.bm25[first]) == left[:4]
    assert list(evaluation.candidates[first]) == left[:3]
    assert list(evaluation.bm25[second]) == top[second][:4]
    assert evaluation.documents == free.documents

    vectors = free.vectors(model)
    cosine = vectors[: len(free.queries)] @ vectors[len(free.queries) :].t()
    ranked = {
        q: dict(sorted(zip(free.documents, row, strict=True), key=lambda pair: -pair[1]))
        for q, row in zip(free.queries, cosine.tolist(), strict=True)
    }
    out = list(ranked[first])[:2]
    assert not collection.qrels["test"][first].keys() & set(out)  # so the relevant one gains
    struck = replace(collection, excluded={first: out})
    run = {q: {d: s for d, s in row.items() if q != first or d not in out}
           for q, row in ranked.items()}  # fmt: skip
    run = {q: dict(list(row.items())[:30]) for q, row in run.items()}
    settings = replace(config, retrieval_depth=30)
    found = EvaluationSet(struck, model.tokenizer, settings, without_states).retrieval(model)
    assert found == metrics.evaluate(free.qrels, run)
    before = make(retrieval_depth=30).retrieval(model)
    assert found[first]["recip_rank"] > before[first]["recip_rank"]
    assert found[second] == before[second]


def test_the_collection_s_instruction_goes_before_queries_alone(collection, model, config, make):
    own = replace(collection, instruction="find it")
    evaluation = EvaluationSet(own, model.tokenizer, config, without_states)
    assert evaluation.tokenizer.prompts == model.tokenizer.prompts.instructed("find it")
    assert model.tokenizer.prompts.query == config.query_prompt  # the model keeps its own
    plain = make().vectors(model)
    vectors = evaluation.vectors(model)
    n = len(evaluation.queries)
    torch.testing.assert_close(vectors[n:], plain[n:])
    filled = ["Instruct: find it\nQuery: " + own.queries[q] for q in evaluation.queries]
    ids = [[*model.tokenizer.fast.encode(text).ids, model.tokenizer.end_id] for text in filled]
    expected = model.embed_all(tokens_only(ids, ""))
    torch.testing.assert_close(vectors[:n], expected)
    assert (vectors[:n] - plain[:n]).abs().max() > 0.01
    assert evaluation.reranking(model) == make().reranking(model)
