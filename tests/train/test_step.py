"""train/step.py: in parts (GradCache) the losses, gradients and noise are those of one piece.

In float64, so that rounding is no excuse.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import MOE, Config
from model.unimoer import UniMoER
from tests.train.tiny import NOISY_MOE, build, tiny_config
from train import loop, step
from train.batches import TrainingData

BUDGET = 40  # tokens: two or three texts
ROUTED = {
    "no router": {},
    "sparsegen by text": {**NOISY_MOE},
    "sparsegen by token": {**NOISY_MOE, "per_token": True},
    "tsallis": {**NOISY_MOE, "router": "tsallis"},
    "task": {**MOE, "ranks": (4, 4, 4), "router": "task"},
    "matryoshka": {"matryoshka": (4, 16)},
    "lists as one text": {**NOISY_MOE, "rerank_head": "interaction"},
    "last tokens": {
        **NOISY_MOE,
        "embedding_pooling": "last",
        "reranking_pooling": "last",
    },
    "last tokens, routed by token": {
        **NOISY_MOE,
        "per_token": True,
        "reranking_pooling": "last",
    },
    "checkpointing": {**NOISY_MOE, "checkpointing": True, "reranking_pooling": "last"},
    "pseudo-queries": {**NOISY_MOE, "rerank_head": "pseudo_query"},
}


@pytest.fixture(scope="module")
def tiny(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(tiny_base, tiny_data, dtype="float64")


def shaken(config: Config) -> tuple[UniMoER, TrainingData]:
    """A model in training whose experts are not zero any more."""
    model, data = build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.trained().items():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.train(), data


def gradients(
    model: UniMoER, data: TrainingData, task: str, budget: int, forwards: list[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step with the balance loss and penalties of `loop.train`."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    count = 0

    def counted(module, inputs, output) -> None:
        nonlocal count
        count += 1

    hook = model.decoder.register_forward_hook(counted)
    work = step.WORK[task](data, 0)
    made = step.run(model, work, budget)
    loss = work.loss(made.rows)
    if made.routing:
        loss = loss + sum(w.mean(0).square().sum() for w in made.routing)
    if made.penalties:
        loss = loss + torch.stack([p.mean() for p in made.penalties]).mean()
    loss.backward()
    made.carry()
    hook.remove()
    if forwards is not None:
        forwards.append(count)
    return loss.detach(), {n: p.grad for n, p in model.trained().items() if p.grad is not None}


@pytest.mark.parametrize("task", ["embedding", "reranking"])
@pytest.mark.parametrize("kind", ROUTED)
def test_gradients_in_parts_are_those_of_one_piece(tiny, kind, task):
    model, data = shaken(replace(tiny, **ROUTED[kind]))
    forwards: list[int] = []
    loss, whole = gradients(model, data, task, 0, forwards)
    again, parts = gradients(model, data, task, BUDGET, forwards)
    assert forwards[0] == 1 and forwards[1] >= 6  # at least three parts, each twice
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert max(g.abs().max().item() for g in whole.values()) > 1e-3


def test_noise_is_drawn_anew_by_the_next_micro_batch(tiny):
    """After the parts the generator stands where one piece would have left it."""
    model, data = shaken(replace(tiny, **ROUTED["sparsegen by text"]))
    after = []
    for budget in (0, BUDGET):
        gradients(model, data, "embedding", budget)
        after.append(torch.rand(3))
    assert torch.equal(after[0], after[1])


def test_dropout_acts_in_parts(tiny):
    """That the parts agree with one piece would be true without any, too."""
    model, data = shaken(replace(tiny, **{**NOISY_MOE, "router_noise": 0.0, "expert_dropout": 0.0}))
    losses = [gradients(model.train(on), data, "embedding", BUDGET)[0] for on in (True, False)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("changes", [{}, {"pcgrad": True}, {"tasks": ("embedding",)}])
def test_training_in_parts_ends_alike(tiny, tmp_path, changes):
    config = replace(tiny, **ROUTED["sparsegen by text"], steps=4, **changes)
    logs, parameters = [], []
    for budget in (0, BUDGET):
        model, data = build(config)
        place = tmp_path / str(budget)
        logs.append(loop.train(model, data, replace(config, cached_tokens=budget), place))
        parameters.append(model.trained())
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss_embedding", "gradient_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-9)
    for name, p in parameters[0].items():
        torch.testing.assert_close(parameters[1][name], p, rtol=1e-6, atol=1e-9, msg=name)


def test_parts_keep_to_the_budget():
    sizes = [3, 4, 5, 9, 30]
    assert step._parts([0, 1, 2, 3, 4], sizes, 0) == [[0, 1, 2, 3, 4]]
    assert step._parts([0, 1, 2, 3, 4], sizes, 12) == [[0, 1, 2], [3], [4]]
    assert step._parts([0, 2, 4], sizes, 8) == [[0, 2], [4]]


def test_every_process_has_as_many_parts():
    """Four against two against one of a single text, which gets empty ones."""
    parts = step._alike([[[0, 3], [6], [9], [12]], [[1, 4, 7], [10]], [[2]]])
    assert parts[0] == [[0, 3], [6], [9], [12]]
    assert [len(of) for of in parts] == [4, 4, 4]
    assert [sum(of, []) for of in parts[1:]] == [[1, 4, 7, 10], [2]]
    assert parts[2].count([]) == 3
