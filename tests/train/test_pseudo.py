"""Training of an embedder that reranks by pseudo-queries, as E2Rank is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import Config
from kernels.reference import info_nce
from model.packed import pack
from tests.train.tiny import NOISY_MOE, build, tiny_config
from train.loop import train
from train.step import WORK, pseudo, run, task_loss


@pytest.fixture(scope="module")
def config(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(
        tiny_base, tiny_data, rerank_head="pseudo_query", tasks=("reranking",), document_tokens=99
    )


def test_a_batch_is_the_groups_of_the_same_step(config, collection):
    model, data = build(config, collection)
    _, pairs = build(replace(config, rerank_head="linear"), collection)
    tokenizer, orders = model.tokenizer, set()
    for step in range(6):
        batch = data.pseudo(step)
        assert batch.ids == pairs.reranking(step).ids
        assert batch.grades.tolist() == [[1, 0, 0]] * 3
        queries = [collection.queries[q] for q in batch.ids]
        assert batch.texts[:3] == tokenizer.queries(queries)
        groups = [[data.positive[q], *data.negatives[q][:2]] for q in batch.ids]
        texts = [[collection.corpus[d] for d in group] for group in groups]
        documents = batch.texts[6:]
        assert len(documents) == len({d for group in groups for d in group})
        assert [[documents[at] for at in row] for row in batch.group] == [
            tokenizer.documents(of) for of in texts
        ]
        assert torch.equal(batch.positive, batch.group[:, 0])
        # Whatever in the batch has the text of a relevant document is known to be relevant.
        right = [{collection.corpus[d] for d in data.relevant[q]} for q in batch.ids]
        spelled = {at: text for row, of in zip(batch.group.tolist(), texts, strict=True)
                   for at, text in zip(row, of, strict=True)}  # fmt: skip
        assert {tuple(pair) for pair in batch.relevant.tolist()} == {
            (i, at) for at, text in spelled.items() for i in range(3) if text in right[i]
        }
        for ids, query, of in zip(batch.texts[3:6], queries, texts, strict=True):
            text = tokenizer.fast.decode(ids[:-1])
            _, _, lines = text.partition("Documents:\n")
            *documents, last = lines.split("\n")
            assert last == f"Query: {query}"
            found = [line.partition("] ")[2] for line in documents]
            assert sorted(found) == sorted(of) and len(found) == 3
            orders.add(tuple(of.index(text) for text in found))
    assert len(orders) > 3  # the right one is not always the first
    _, same = build(config, collection)
    _, other = build(replace(config, seed=1), collection)
    assert same.pseudo(2).texts == data.pseudo(2).texts
    assert other.pseudo(2).texts == data.pseudo(2, 1).texts != data.pseudo(2).texts


def test_the_loss_is_its_formula(config, collection):
    """InfoNCE of the query against all documents of the batch, as for retrieval, and twice RankNet
    of its own by the pseudo-query; in float64, text by text."""
    config = replace(config, dtype="float64", group_size=4, **NOISY_MOE)
    model, data = build(config, collection)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.trained().items():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    model.eval()
    rows = data.pseudo(1)
    vectors = torch.cat([model.embed(pack([ids]))[0] for ids in rows.texts])
    queries, asked, documents = vectors[:3], vectors[3:6], vectors[6:]
    options = rows.positive, rows.relevant, config.temperature, config.false_negative_margin
    ordered = []
    for i in range(3):
        own = 10 * documents[rows.group[i]] @ asked[i]
        ordered.append(torch.nn.functional.softplus(own[1:] - own[0]).mean())
    expected = info_nce(queries, documents, *options) + 2 * torch.stack(ordered).mean()
    work = pseudo(data, 1)
    found = work.loss(run(model, work).rows)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(task_loss("reranking", model, data, 1), found)
    assert WORK["reranking"](data, 1).ids == rows.ids == work.ids
    halved = replace(config, ranknet_weight=1.0, ranknet_scale=5.0)
    other = build(halved, collection)[1]
    assert not torch.equal(task_loss("reranking", model, other, 1), found)


def test_it_learns_to_order_a_list(config, collection, tmp_path):
    config = replace(
        config, train_queries=4, reranking_batch=4, steps=40, learning_rate=4e-3, ranks=(8,)
    )
    model, data = build(config, collection)
    log = train(model, data, config, tmp_path / "a")
    losses = [line["loss_reranking"] for line in log]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), losses
