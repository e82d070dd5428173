"""train/batches.py: what is fixed for every arm and seed, and what the seed decides."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.bm25 import BM25
from eval.collections import Collection
from experiments import Config
from model.token_lists import TokenLists
from model.tokens import Prompts, Tokenizer
from tests.train.tiny import TRAIN, tiny_config, tokens_only
from train import batches
from train.batches import EmbeddingBatch, TrainingData


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer(tiny_base, Prompts(), 24)


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(tiny_base, tiny_data)


@pytest.fixture
def make(collection: Collection, tokenizer: Tokenizer, config: Config):
    def make(of: Collection = collection, **changes) -> TrainingData:
        return TrainingData(of, tokenizer, replace(config, **changes), tokens_only)

    return make


def texts(data: TrainingData, step: int, task: str) -> list[list[int]]:
    """The token ids of a micro-batch, in its order."""
    if task == "embedding":
        batch = data.embedding(step)
        return [list(data.embedding_texts.ids[i]) for i in batch.queries + batch.documents]
    return [list(data.reranking_texts.ids[i]) for i in data.reranking(step).pairs]


def ids(data: TrainingData, steps: range, task: str) -> list[list[str]]:
    return [getattr(data, task)(step).ids for step in steps]


def test_the_pairs_depend_on_neither_seed_nor_arm(make):
    data = make()
    for other in (make(seed=1), make(seed_offset=1000), make(tasks=("embedding",))):
        assert other.queries == data.queries
        assert other.positive == data.positive
        assert other.negatives == data.negatives


def test_texts_are_tokenized_a_part_at_a_time_and_kept_on_disk(make, monkeypatch):
    """In whatever parts, they are the same; none of them is a list in memory."""
    whole, most = make(), 0
    monkeypatch.setattr(batches, "AT_ONCE", 5)
    for name in ("queries", "documents", "pairs"):
        real = getattr(Tokenizer, name)

        def counted(self, texts, real=real):
            nonlocal most
            most = max(most, len(texts))
            return real(self, texts)

        monkeypatch.setattr(Tokenizer, name, counted)
    parts = make()
    assert most == 5
    for name in ("embedding_texts", "reranking_texts"):
        one, other = (getattr(data, name).ids for data in (whole, parts))
        assert isinstance(one, TokenLists) and isinstance(other, TokenLists)
        assert len(one) > 10 and list(one) == list(other)


def test_negatives_are_searched_once_for_all_trials(make, collection, monkeypatch):
    """Of a query and setting, whichever arms ask for them; another depth is another setting."""
    fresh, asked = replace(collection), []
    search = BM25.search

    def counted(self, queries, k):
        asked.extend(queries)
        return search(self, queries, k)

    monkeypatch.setattr(BM25, "search", counted)
    few = make(of=fresh, tasks=("reranking",), steps=1)
    assert set(asked) == set(few.queries)
    asked.clear()
    both = make(of=fresh, seed=1)
    assert set(asked) == set(both.queries) - set(few.queries) != set()
    assert {q: both.negatives[q] for q in few.queries} == few.negatives
    asked.clear()
    make(of=fresh, seed=2)
    assert not asked
    make(of=fresh, negatives_depth=2)
    assert set(asked) == set(both.queries)


@pytest.mark.parametrize("steps", [3, 8])  # less than an epoch of either task, and two of one
@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_what_is_trained_on_does_not_depend_on_the_seed(make, task, steps):
    seen = []
    for seed in range(4):
        data = make(seed=seed, steps=steps)
        assert {task: len(rows) for task, rows in data.used.items()} == {
            "embedding": min(6 * steps, TRAIN), "reranking": min(3 * steps, TRAIN),
        }  # fmt: skip
        seen.append({query for batch in ids(data, range(steps), task) for query in batch})
    assert seen[0] == seen[1] == seen[2] == seen[3] == set(data.used[task])


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_more_or_fewer_steps_over_the_queries_of_an_arm(make, task):
    """Half of its very batches, or all of them and then the same queries in another order."""
    arm, half, double = make(steps=2), *(make(steps=n, data_steps=2) for n in (1, 4))
    assert arm.used == half.used == double.used and arm.negatives == double.negatives
    assert len(arm.used[task]) < len(make(steps=4).used[task])
    whole = ids(arm, range(2), task)
    assert ids(half, range(1), task) == whole[:1]
    assert ids(double, range(2), task) == whole
    again = ids(double, range(2, 4), task)
    assert again != whole and sorted(sum(again, [])) == sorted(sum(whole, []))
    halves = {tuple(sorted(make(steps=1, data_steps=2, seed=s).embedding(0).ids)) for s in range(6)}
    assert len(halves) > 1, "which half, the seed decides"


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_every_arm_sees_the_same_micro_batches(make, task):
    joint, only = make(seed=3), make(seed=3, tasks=(task,))
    moe = make(seed=3, experts=("embedding", "reranking", "shared"), ranks=(4, 4, 4))
    for step in range(10):
        assert texts(only, step, task) == texts(joint, step, task) == texts(moe, step, task)


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_the_seed_decides_the_order(make, task):
    steps = range(8)
    first = ids(make(seed=0), steps, task)
    assert ids(make(seed=0), steps, task) == first
    assert ids(make(seed=1), steps, task) != first
    # the A/A control is another seed under its own name
    assert ids(make(seed=0, seed_offset=1), steps, task) == ids(make(seed=1), steps, task)


@pytest.mark.parametrize(("task", "size"), [("embedding", 6), ("reranking", 3), ("embedding", 5)])
def test_an_epoch_is_a_permutation(make, task, size):
    data = make(embedding_batch=size, reranking_batch=size)
    per_epoch = TRAIN // size
    epochs = [
        [q for row in ids(data, range(e * per_epoch, (e + 1) * per_epoch), task) for q in row]
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == per_epoch * size
        assert set(epoch) <= set(data.queries)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_best_grade_is_the_positive_and_grade_0_is_not(make, collection, tokenizer, config):
    assert make().positive["q2"] == "d2"
    train = {"q0": {"d7": 1, "d5": 1, "d6": 0}, "q1": {"d1": 0}}
    judged = replace(collection, qrels={"train": train})
    data = TrainingData(
        judged, tokenizer, replace(config, embedding_batch=1, reranking_batch=1), tokens_only
    )
    assert data.queries == ["q0"]  # q1 has nothing relevant
    assert data.positive == {"q0": "d5"}  # of equal grades, the smallest id


def relevant(batch: EmbeddingBatch) -> torch.Tensor:
    """(B, M) bool of the batch's pairs."""
    known = torch.zeros(len(batch.queries), len(batch.documents), dtype=torch.bool)
    known[batch.relevant[:, 0], batch.relevant[:, 1]] = True
    return known


def test_a_document_of_two_queries_appears_once_and_is_no_negative(make):
    data = make(embedding_batch=TRAIN)  # all queries in one batch
    batch = data.embedding(0)
    assert len(batch.documents) == len(set(batch.documents))
    rows = {q: int(batch.positive[i]) for i, q in enumerate(batch.ids)}
    assert rows["q0"] == rows["q1"]  # both ask for d0
    row = {d: batch.documents.index(data.document_at[d]) for d in ("d1", "d2", "d4")}
    q2, q4 = batch.ids.index("q2"), batch.ids.index("q4")
    assert rows["q2"] == row["d2"]
    judged = relevant(batch)[:, [row["d1"], row["d2"], row["d4"]]]  # d1 is some query's negative
    assert judged[q2].tolist() == [True, True, False]
    assert judged[q4].tolist() == [False, False, True]


def test_equal_texts_of_another_id_are_relevant_too(make, collection, tokenizer, config):
    """copy4 has the text of d4: where a query brings it along, it is no negative of q4."""
    judged = dict(collection.qrels["train"], q5={"copy4": 1})
    twins = replace(collection, qrels={"train": judged})
    data = TrainingData(twins, tokenizer, replace(config, embedding_batch=TRAIN), tokens_only)
    batch = data.embedding(0)
    copy, original = (batch.documents.index(data.document_at[d]) for d in ("copy4", "d4"))
    q4, q5 = batch.ids.index("q4"), batch.ids.index("q5")
    assert relevant(batch)[q4, [copy, original]].tolist() == [True, True]
    assert relevant(batch)[q5, [copy, original]].tolist() == [True, True]
    assert not relevant(batch)[batch.ids.index("q6"), copy]


def test_what_another_id_asks_in_the_same_words_is_relevant_too(
    make, collection, tokenizer, config
):
    """q5 asks what q4 asks: neither's document is a negative of the other, drawn or offered."""
    texts = dict(collection.queries, q5=f"  {collection.queries['q4'].upper()}")
    twins = replace(collection, queries=texts)
    assert twins.relevant("train")["q4"] == twins.relevant("train")["q5"] == {"d4": 1, "d5": 1}
    data = TrainingData(twins, tokenizer, replace(config, embedding_batch=TRAIN), tokens_only)
    assert (data.positive["q4"], data.positive["q5"]) == ("d4", "d5")
    assert not {"d4", "d5"} & {*data.negatives["q4"], *data.negatives["q5"]}
    batch = data.embedding(0)
    both = [batch.documents.index(data.document_at[d]) for d in ("d4", "d5")]
    for query in ("q4", "q5"):
        assert relevant(batch)[batch.ids.index(query), both].tolist() == [True, True]


def test_an_embedding_batch_holds_what_it_says(make, collection, tokenizer):
    data = make(hard_negatives=2)
    batch = data.embedding(1)
    at = data.embedding_texts.ids
    assert [at[i] for i in batch.queries] == tokenizer.queries(
        [collection.queries[q] for q in batch.ids]
    )
    found = {tuple(at[i]) for i in batch.documents}
    for i, query in enumerate(batch.ids):
        positive = tokenizer.documents([collection.corpus[data.positive[query]]])[0]
        assert at[batch.documents[batch.positive[i]]] == positive
        hard = data.negatives[query][:2]
        wanted = tokenizer.documents([collection.corpus[d] for d in hard])
        assert {tuple(row) for row in wanted} <= found
        for document in hard:
            row = batch.documents.index(data.document_at[document])
            assert not relevant(batch)[i, row]
    known = {data.document_at[d] for q in batch.ids for d in [data.positive[q]]}
    known |= {data.document_at[d] for q in batch.ids for d in data.negatives[q][:2]}
    assert set(batch.documents) == known


def test_a_reranking_group_is_the_positive_and_its_negatives(make, collection, tokenizer):
    data = make(group_size=4)
    batch = data.reranking(2)
    assert batch.size == 4 and len(batch.pairs) == 3 * 4
    for i, query in enumerate(batch.ids):
        documents = [data.positive[query], *data.negatives[query][:3]]
        pairs = [(collection.queries[query], collection.corpus[d]) for d in documents]
        group = batch.pairs[4 * i : 4 * i + 4]
        assert [data.reranking_texts.ids[p] for p in group] == tokenizer.pairs(pairs)


def test_without_hard_negatives_only_positives_compete(make):
    batch = make(hard_negatives=0).embedding(0)
    assert len(batch.documents) == len(set(batch.positive.tolist()))


def test_train_queries_is_a_prefix_of_a_fixed_order(make):
    everything = make().queries
    assert sorted(everything) != everything and len(everything) == TRAIN
    few = make(train_queries=10)  # batches of 6 and of 3: whole batches alone
    assert few.used == {"embedding": everything[:6], "reranking": everything[:9]}
    assert make(train_queries=999).queries == everything


def test_too_few_queries_for_a_batch(make):
    with pytest.raises(ValueError, match=r"tiny: 8 training queries .* a batch takes 9: lower"):
        make(train_queries=8, embedding_batch=9)
    with pytest.raises(ValueError, match="a batch takes 9"):
        make(train_queries=8, reranking_batch=9)
    # the other task's batch does not matter to an arm without it
    assert make(train_queries=8, reranking_batch=9, tasks=("embedding",)).queries


def test_data_without_a_train_split(collection, tokenizer, config):
    bare = replace(collection, qrels={"test": collection.qrels["test"]})
    with pytest.raises(ValueError, match=r"tiny has no train split \(it has test\): add qrels/tr"):
        TrainingData(bare, tokenizer, config, tokens_only)
