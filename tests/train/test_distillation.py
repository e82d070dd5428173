"""A teacher's scores beside mined negatives, and the term of the loss that learns from them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.collections import Collection
from kernels.reference import info_nce
from model.packed import pack
from tests.train.mined import changed, rows
from tests.train.tiny import build, tiny_config, tokens_only
from train import losses
from train.batches import TrainingData
from train.loop import train
from train.step import task_loss
from train.trial import resolved
from trials import Config


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, mined: Path) -> Config:
    return resolved(tiny_config(tiny_base, tiny_data, negatives=str(mined)), "cpu")


@pytest.fixture(scope="module")
def planted(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that likes the positive least, and the negatives in an order of its own."""

    def teach(row: dict) -> None:
        names = [row["positive"], *row["negatives"]]
        values = [-3.0, *random.Random(row["query"]).sample([0.0, 2.0, 4.0, 6.0], 4)]
        row["teacher"] = dict(zip(names, values, strict=True))

    return changed(mined, tmp_path_factory.mktemp("planted") / "out", teach)


def test_groups_and_scores_line_up(
    config: Config, collection: Collection, planted: Path, tiny_base: Path
) -> None:
    c = replace(config, negatives=str(planted), distill="kl", group_size=4, hard_negatives=2)
    model, data = build(resolved(c, "cpu"), collection)
    lines = rows(planted)
    place = {at: d for d, at in data.document_at.items()}
    batch = data.embedding(1)
    assert batch.teacher is not None and batch.teacher.shape == batch.group.shape == (6, 3)
    for query, group, scores in zip(batch.ids, batch.group, batch.teacher, strict=True):
        names = [place[batch.documents[i]] for i in group]
        assert names == [lines[query]["positive"], *list(lines[query]["negatives"])[:2]]
        assert scores.tolist() == [lines[query]["teacher"][d] for d in names]
    groups = data.reranking(1)
    assert groups.teacher is not None and groups.teacher.shape == (3, 4)
    for i, query in enumerate(groups.ids):
        names = [lines[query]["positive"], *list(lines[query]["negatives"])[:3]]
        pairs = [(collection.queries[query], collection.corpus[d]) for d in names]
        ids = [list(data.reranking_texts.ids[p]) for p in groups.pairs[4 * i : 4 * i + 4]]
        assert ids == model.tokenizer.pairs(pairs)
        assert groups.teacher[i].tolist() == [lines[query]["teacher"][d] for d in names]


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_the_weighted_term_is_added(
    config: Config, collection: Collection, planted: Path, task: str, kind: str
) -> None:
    """Against the formula of each group, in float64, texts one at a time; of whole vectors, even
    where narrower ones are trained too."""
    fields = {"negatives": str(planted), "distill": kind, "distill_weight": 0.5,
              "distill_temperature": 2.0, "hard_negatives": 2, "matryoshka": (4, 8),
              "dtype": "float64"}  # fmt: skip
    c = resolved(replace(config, **fields), "cpu")
    model, data = build(c, collection)
    plain = TrainingData(collection, model.tokenizer, replace(c, distill=""), tokens_only)
    found = task_loss(task, model, data, 0) - task_loss(task, model, plain, 0)
    terms = []
    rows = data.embedding(0) if task == "embedding" else data.reranking(0)
    assert rows.teacher is not None
    for i in range(len(rows.ids)):
        if task == "embedding":
            batch = data.embedding(0)
            at = [batch.queries[i], *(batch.documents[j] for j in batch.group[i])]
            q, *documents = (
                model.embed(data.embedding_texts.batch([a], model.device, model.dtype)[0])[0][0]
                for a in at
            )
            student = torch.stack([q @ d for d in documents]) / c.temperature
        else:
            at = data.reranking(0).pairs[3 * i : 3 * i + 3]
            student = torch.cat([
                model.score(data.reranking_texts.batch([a], model.device, model.dtype)[0])[0]
                for a in at
            ])  # fmt: skip
        teacher = rows.teacher[i].double()
        if kind == "kl":
            p, log_q = (teacher / 2).softmax(0), (student / 2).log_softmax(0)
            terms.append(4 * (p * (p.log() - log_q)).sum())
        else:
            terms += list(((student[0] - student[1:]) - (teacher[0] - teacher[1:])) ** 2)
    torch.testing.assert_close(found, 0.5 * torch.stack(terms).mean(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_planted_order_is_learnt(
    config: Config, collection: Collection, planted: Path, tmp_path: Path, kind: str
) -> None:
    """Of both tasks, though the labels say otherwise."""
    c = replace(
        config, negatives=str(planted), distill=kind, distill_weight=20.0, train_queries=3,
        distill_temperature=3.0,
        embedding_batch=3, reranking_batch=3, group_size=4, hard_negatives=3, steps=60,
        ranks=(16,), learning_rate=2e-2, head_learning_rate=2e-2, temperature=0.1,
    )  # fmt: skip
    model, data = build(resolved(c, "cpu"), collection)
    train(model, data, data.config, tmp_path / "a")
    with torch.no_grad():
        for query in data.queries:
            documents = [data.positive[query], *data.negatives[query][:3]]
            wanted = sorted(documents, key=lambda d: -data.teacher[query][d])
            texts = [collection.corpus[d] for d in documents]
            order = model.rank(collection.queries[query], texts)
            assert [documents[i] for i, _ in order] == wanted
            vectors = model.encode_document(texts)
            near = (model.encode_query([collection.queries[query]]) @ vectors.t())[0]
            assert [documents[int(i)] for i in near.argsort(descending=True)] == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill": "kd", "negatives": "f"}, "distill is kl, margin_mse or empty, got 'kd'"),
        ({"distill": "kl"}, "distill='kl' needs a teacher's scores: set negatives to a folder"),
        ({"distill": "kl", "negatives": "f", "hard_negatives": 0}, "hard_negatives is 0"),
        ({"distill_temperature": 0.0}, "distill_temperature must be > 0"),
    ],
)
def test_settings_of_distillation_that_cannot_work(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_the_teacher_of_pseudo_queries(
    config: Config, collection: Collection, planted: Path
) -> None:
    """Its scores are the order that RankNet learns; nothing else is added."""
    c = resolved(replace(config, negatives=str(planted), distill="kl", dtype="float64",
                         rerank_head="pseudo_query"), "cpu")  # fmt: skip
    model, data = build(c, collection)
    lines, made = rows(planted), data.pseudo(0)
    for query, grades in zip(made.ids, made.grades.tolist(), strict=True):
        names = [lines[query]["positive"], *list(lines[query]["negatives"])[: c.group_size - 1]]
        assert grades == pytest.approx([lines[query]["teacher"][d] for d in names])
    model.eval()
    count = len(made.ids)
    vectors = torch.cat([model.embed(pack([ids]))[0] for ids in made.texts])
    queries, asked, documents = vectors.split([count, count, len(vectors) - 2 * count])
    options = made.positive, made.relevant, c.temperature, c.false_negative_margin
    expected = info_nce(queries, documents, *options) + 2 * losses.ranknet(
        10 * torch.einsum("bw,bkw->bk", asked, documents[made.group]), made.grades
    )
    found = task_loss("reranking", model, data, 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_teacher_of_lists(config: Config, collection: Collection, planted: Path) -> None:
    """Lists come in a random order, the teacher's scores in the group's: list by list."""
    c = resolved(replace(config, negatives=str(planted), distill="margin_mse", dtype="float64",
                         rerank_head="interaction", similarity_weight=0.0), "cpu")  # fmt: skip
    model, data = build(c, collection)
    plain = TrainingData(collection, model.tokenizer, replace(c, distill=""), tokens_only)
    found = task_loss("reranking", model, data, 0) - task_loss("reranking", model, plain, 0)
    lines, made, terms = rows(planted), data.lists(0), []
    assert made.teacher is not None
    for i, query in enumerate(made.ids):
        names = [lines[query]["positive"], *list(lines[query]["negatives"])[: c.group_size - 1]]
        assert made.teacher[i].tolist() == [lines[query]["teacher"][d] for d in names]
        _, *documents, asked = torch.nn.functional.normalize(
            model.marked(pack([made.texts[i]]))[0], dim=-1
        )
        student = torch.stack([asked @ documents[at] for at in made.place[i]]) / c.list_temperature
        teacher = made.teacher[i].double()
        terms += list(((student[0] - student[1:]) - (teacher[0] - teacher[1:])) ** 2)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-9, atol=1e-10)
