"""Matryoshka: InfoNCE of the whole vectors and of their first values, and what it is good for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import Config
from model.unimoer import UniMoER
from tests.train.tiny import build, tiny_config
from train import loop, step
from train.batches import EmbeddingBatch, TrainingData


@pytest.fixture(scope="module")
def tiny(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(tiny_base, tiny_data, tasks=("embedding",), embedding_batch=4)


def info_nce(vectors: Tensor, rows: EmbeddingBatch, config: Config, width: int) -> Tensor:
    """Query by query and document by document, on unit vectors cut to `width`."""
    if width < vectors.shape[1]:
        vectors = torch.stack([v[:width] / v[:width].square().sum().sqrt() for v in vectors])
    q, d = vectors[: len(rows.queries)], vectors[len(rows.queries) :]
    relevant = {(i, j) for i, j in rows.relevant.tolist()}
    terms = []
    for i, right in enumerate(rows.positive.tolist()):
        own = q[i] @ d[right]
        rivals = [
            q[i] @ d[j]
            for j in range(len(d))
            if j != right
            and (i, j) not in relevant
            and q[i] @ d[j] <= own + config.false_negative_margin
        ]
        scores = torch.stack([own, *rivals]) / config.temperature
        terms.append(scores.logsumexp(0) - scores[0])
    return torch.stack(terms).mean()


def random_vectors(rows: EmbeddingBatch, width: int) -> Tensor:
    """Whose first values are small, so that cutting without normalising would show."""
    count = len(rows.queries) + len(rows.documents)
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(count, width, dtype=torch.float64, generator=generator)
    return F.normalize(made * torch.linspace(0.2, 2, width), dim=-1)


@pytest.mark.parametrize("widths", [(), (3,), (2, 5, 12)])
def test_the_loss_and_its_gradient(tiny, widths):
    config = replace(tiny, matryoshka=widths, temperature=0.2, false_negative_margin=0.5)
    _, data = build(config)
    rows = data.embedding(0)
    vectors = random_vectors(rows, 16).requires_grad_()
    found = step.embedding(data, 0).loss(vectors)
    each = [info_nce(vectors, rows, config, width) for width in (16, *widths)]
    expected = sum(each[1:], start=each[0]) / len(each)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (got,), (wanted,) = (torch.autograd.grad(loss, vectors) for loss in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert len({round(loss.item(), 3) for loss in each}) == len(each)  # no width stands for another


def test_none_is_the_loss_without_it_bit_for_bit(tiny):
    _, data = build(tiny)
    rows = data.embedding(0)
    vectors = random_vectors(rows, 16).float()
    asked, found = vectors.split([len(rows.queries), len(rows.documents)])
    c = tiny
    options = rows.positive, rows.relevant, c.temperature, c.false_negative_margin
    assert torch.equal(step.embedding(data, 0).loss(vectors), step.info_nce(asked, found, *options))


@torch.no_grad()
def narrow(model: UniMoER, data: TrainingData, width: int) -> float:
    """InfoNCE of the first `width` values over the six batches of an epoch."""
    losses = []
    for at in range(6):
        rows, c = data.embedding(at, seed=0), data.config
        work = step.embedding(data, at, seed=0)
        losses.append(info_nce(step.run(model.eval(), work).rows.double(), rows, c, width))
    return torch.stack(losses).mean().item()


def test_a_narrow_width_learns_more_with_it_than_without(tiny, tmp_path):
    before, after = {}, {}
    for widths in ((), (4,)):
        # With a margin of 2 no document is left out for its score, so the losses can be compared.
        fields = {"steps": 60, "temperature": 0.1, "false_negative_margin": 2.0}
        config = replace(tiny, matryoshka=widths, **fields)
        model, data = build(config)
        before[widths] = narrow(model, data, 4)
        loop.train(model, data, config, tmp_path / f"{len(widths)}")
        after[widths] = narrow(model, data, 4)
    assert before[()] == before[(4,)]
    assert after[(4,)] < 0.5 * min(after[()], before[()])
