"""The model can learn one batch of either task, and leaves its base alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.lora import LinearGroup
from model.packed import pack
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER
from tests.model.made import LORA, make

QUERIES = ["capital", "read a file", "yes or no", "river", "the text", "path", "France", "none"]
DOCUMENTS = ["Paris is it.", "open(path)", "no", "the Seine", "a, b", "/a/b", "Lyon", "None"]


def steps_until(loss: Callable[[], torch.Tensor], model: UniMoER, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.trained().values(), lr=4e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("kind", ["sparsegen", "uniform"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_embedding_batch_can_be_learnt(tiny_base: Path, kind: str, checkpointing: bool) -> None:
    config = ModelConfig(
        base=str(tiny_base), lora=LORA, router=RouterConfig(kind), checkpointing=checkpointing
    )
    model = UniMoER(config).train()
    q = pack(model.tokenizer.queries(QUERIES))
    d = pack(model.tokenizer.documents(DOCUMENTS))

    def loss() -> torch.Tensor:
        scores = model.embed(q)[0] @ model.embed(d)[0].t() / 0.1
        return F.cross_entropy(scores, torch.arange(8))

    losses = steps_until(loss, model, 40)
    assert losses[0] > 1.5 and losses[-1] < 0.02, losses


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_one_reranking_batch_can_be_learnt(tiny_base: Path, pooling: str) -> None:
    """Which document goes with which query: the head alone, on states of the base, cannot tell."""
    config = ModelConfig(
        base=str(tiny_base), lora=LORA, router=RouterConfig(), reranking_pooling=pooling
    )
    model = UniMoER(config).train()
    pairs = [(q, d) for q in QUERIES[:4] for d in DOCUMENTS[:4]]
    batch = pack(model.tokenizer.pairs(pairs))
    labels = torch.eye(4).flatten()

    def loss() -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(model.score(batch)[0], labels)

    losses = steps_until(loss, model, 90)
    assert losses[0] > 0.5 and losses[-1] < 0.02, losses


def test_training_leaves_the_base_alone(tiny_base: Path) -> None:
    model = make(tiny_base)
    groups = [m for m in model.modules() if isinstance(m, LinearGroup)]
    before = [group.weight(name).clone() for group in groups for name in group.outs]
    table = model.decoder.embed_tokens.weight.clone()
    batch = pack(model.tokenizer.documents(DOCUMENTS))
    steps_until(lambda: model.embed(batch)[0][:, 0].sum(), model.train(), 3)
    after = [group.weight(name) for group in groups for name in group.outs]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(model.decoder.embed_tokens.weight, table)
    assert all(p.requires_grad for p in model.trained().values())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.endswith(("norm.weight", "embed_tokens.weight")) for name in frozen)
