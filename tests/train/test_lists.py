"""Training of an interaction head: the batches of lists, their loss, repeatability."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import Config
from model.listwise import Interaction
from model.packed import pack
from tests.train.tiny import NOISY_MOE, TRAIN, build, tiny_config
from train.batches import DROPPED, TrainingData, alter
from train.loop import train
from train.step import WORK, lists, run, task_loss


@pytest.fixture(scope="module")
def config(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(tiny_base, tiny_data, rerank_head="interaction", tasks=("reranking",))


def documents_of(data: TrainingData, ids: list[int]) -> tuple[str, list[str]]:
    """The query and the documents that a list's token ids spell."""
    fast = data.template.tokenizer.fast
    parts, run = [], []
    for i in ids:
        if i in data.template.marks:
            parts.append(fast.decode(run))
            run = []
        else:
            run.append(i)
    query = parts[0].rpartition("relevance to query: ")[2]
    assert parts[-1] == f"\n</passage>\n<query>\n{query}"
    return query, [part.partition('">\n')[2] for part in parts[1:-1]]


# Batches --------------------------------------------------------------------------------------


def test_lists_are_the_groups_of_the_same_step_in_a_random_order(config, collection):
    _, data = build(replace(config, document_tokens=99), collection)
    _, pairs = build(replace(config, rerank_head="linear"), collection)
    places = []
    for step in range(8):
        batch = data.lists(step)
        assert batch.ids == pairs.reranking(step).ids  # an arm differs in how it reads, not what
        assert len(batch.texts) == 6 and batch.place.shape == (3, 3)
        assert batch.again is not None and batch.again.shape == (3, 3) and batch.teacher is None
        for i, query in enumerate(batch.ids):
            text, documents = documents_of(data, batch.texts[i])
            assert text == collection.queries[query]
            group = [data.positive[query], *data.negatives[query][:2]]
            assert [documents[at] for at in batch.place[i]] == [collection.corpus[d] for d in group]
            places.append(int(batch.place[i, 0]))
            other, altered = documents_of(data, batch.texts[3 + i])
            assert other == text
            for d, at in zip(group, batch.again[i], strict=True):
                words, kept = collection.corpus[d].split(), altered[int(at)].split()
                assert set(kept) <= set(words) and (kept or not words)
    assert {places.count(place) for place in range(3)} <= set(range(2, 15))  # 24 lists, 8 each


def test_seed_and_step_decide_the_order(config, collection):
    _, data = build(config, collection)
    _, same = build(config, collection)
    _, other = build(replace(config, seed=1), collection)
    _, offset = build(replace(config, seed_offset=1), collection)
    for step in range(4):
        assert data.lists(step).texts == same.lists(step).texts
        assert other.lists(step).texts == offset.lists(step).texts == data.lists(step, 1).texts
    per_epoch = TRAIN // 3
    first, second = data.lists(0), data.lists(per_epoch)
    assert other.lists(0).texts != first.texts != second.texts


def test_without_the_similarity_loss_lists_are_read_once(config, collection):
    _, data = build(replace(config, similarity_weight=0.0), collection)
    batch = data.lists(0)
    assert len(batch.texts) == 3 and batch.again is None


def test_a_group_that_does_not_fit_is_refused(config, collection):
    """Three documents of at most 24 tokens, and a template of some 200."""
    _, data = build(replace(config, list_tokens=260), collection)
    with pytest.raises(ValueError, match=r"its 3 documents take \d texts of list_tokens=260"):
        data.lists(0)


def test_altered_texts_lack_a_tenth_of_their_words():
    rng = random.Random(0)
    text = " ".join(f"w{i}" for i in range(2000))
    kept = alter(text, rng).split()
    assert kept == [word for word in text.split() if word in set(kept)]  # in order
    assert len(kept) == pytest.approx(2000 * (1 - DROPPED), abs=50)
    assert all(alter("one", rng) == "one" for _ in range(100))
    assert alter("  \n", rng) == ""


# The loss -------------------------------------------------------------------------------------


def test_the_loss_is_its_formula_list_by_list(config, collection):
    """In float64, each list by itself, every term written out."""
    config = replace(config, dtype="float64", group_size=4, **NOISY_MOE)
    model, data = build(config, collection)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.trained().items():
            if "lora_B" in name or "marks" in name:
                p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
        rows = data.lists(1)
        vectors = [F.normalize(model.marked(pack([ids]))[0], dim=-1) for ids in rows.texts]
        t, terms = config.list_temperature, []
        for i in range(3):
            early, *documents, query = vectors[i]
            assert rows.again is not None
            altered = [vectors[3 + i][1:-1][at] for at in rows.again[i]]
            documents = [documents[at] for at in rows.place[i]]

            def against(q, documents=documents):
                scores = torch.stack([q @ d / t for d in documents])
                return scores.logsumexp(0) - scores[0]

            pairs = [documents[a] @ documents[b] / t for a in range(4) for b in range(a)]
            disperse = (torch.stack(pairs).exp().sum() / 3).log()
            similar = []
            for k, (document, copy) in enumerate(zip(documents, altered, strict=True)):
                others = [document @ d / t for j, d in enumerate(documents) if j != k]
                scores = torch.stack([document @ copy / t, *others])
                similar.append(scores.logsumexp(0) - scores[0])
            similar = torch.stack(similar).mean()
            terms.append(against(query) + 0.45 * disperse + 0.85 * against(early) + 0.85 * similar)
        work = lists(data, 1)
        made = run(model, work)
        found = work.loss(made.rows)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-9, atol=1e-10)
    assert work.ids == rows.ids and [w.shape for w in made.routing] == [(6, 3)] * 2
    assert WORK["reranking"](data, 1).ids == rows.ids
    assert torch.equal(task_loss("reranking", model, data, 1), found)
    lengths = [len(ids) for ids in rows.texts]
    assert lengths != sorted(lengths)  # the loop did have to sort


def test_weights_of_the_terms_come_from_the_config(config, collection):
    values = {}
    for name in ("dispersive_weight", "dual_weight", "similarity_weight"):
        for weight in (0.0, 0.5, 1.0):
            model, data = build(replace(config, **{name: weight}), collection)
            model.eval()
            values[name, weight] = float(task_loss("reranking", model, data, 0).detach())
        step = values[name, 0.5] - values[name, 0.0]
        assert step != 0
        if name != "similarity_weight":  # without it other lists are drawn
            assert values[name, 1.0] - values[name, 0.5] == pytest.approx(step, abs=1e-5)


# Training -------------------------------------------------------------------------------------


def test_few_groups_can_be_learnt_in_every_order(config, collection, tmp_path):
    config = replace(
        config, train_queries=4, reranking_batch=4, steps=50, learning_rate=4e-3, ranks=(8,),
        head_learning_rate=4e-3, dispersive_weight=0.0, dual_weight=0.0, similarity_weight=0.0,
    )  # fmt: skip
    model, data = build(config, collection)
    log = train(model, data, config, tmp_path / "a")
    losses = [line["loss_reranking"] for line in log]
    assert sum(losses[:5]) / 5 > 0.9 and sum(losses[-10:]) / 10 < 0.6, losses  # ln 3 = 1.1


class Stopped(Exception):
    """Stands for whatever ends a run."""


def test_killed_and_resumed_ends_like_never_killed(config, collection, tmp_path):
    """Both tasks, with everything that is random, bit for bit; the marks have moved."""
    config = replace(config, tasks=("embedding", "reranking"), steps=5, **NOISY_MOE)

    def stop(step: int, line: dict) -> None:
        if step == 3:  # a checkpoint was due after the third step
            raise Stopped

    model, data = build(config, collection)
    start = {name: p.detach().clone() for name, p in model.trained().items()}
    whole = train(model, data, config, tmp_path / "whole")
    again, data = build(config, collection)
    with pytest.raises(Stopped):
        train(again, data, config, tmp_path / "parts", callback=stop)
    again, data = build(config, collection)
    assert train(again, data, config, tmp_path / "parts") == whole
    for name, parameter in again.trained().items():
        assert torch.equal(parameter, model.trained()[name]), name
    assert isinstance(model.head, Interaction) and model.head.marks is not None
    moved = (model.head.marks.detach() - start["head.marks"]).abs().amax(dim=1)
    assert (moved > 1e-4).all() and not torch.equal(*model.head.marks.detach())
    assert {"loss_embedding", "loss_reranking", "loss_balance"} <= whole[-1].keys()
