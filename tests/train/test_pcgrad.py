"""PCGrad against its closed form, and in the training loop."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.train.tiny import build, tiny_config
from train import pcgrad
from train.loop import train


def test_conflict_is_removed_against_the_unmodified_other() -> None:
    """(1, 0) and (-1, 1): each loses its part along the other, whichever comes first."""
    g, h = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    assert pcgrad.project(g, h)[0].tolist() == [0.5, 0.5]
    assert pcgrad.project(h, g)[0].tolist() == [0.0, 1.0]


def test_agreement_and_a_gradient_of_zero_stay_as_they_are() -> None:
    g, h = [torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])]
    assert pcgrad.project(g, h)[0].tolist() == [1, 0]
    assert pcgrad.project(g, [torch.zeros(2)])[0].tolist() == [1, 0]


def test_all_tensors_are_one_vector() -> None:
    """Of two tensors one agrees and one conflicts; together they agree, so nothing is removed."""
    g = [torch.tensor([2.0]), torch.tensor([1.0])]
    h = [torch.tensor([2.0]), torch.tensor([-1.0])]
    assert [t.item() for t in pcgrad.project(g, h)] == [2, 1]


def test_backward() -> None:
    x, y = nn.Parameter(torch.tensor([0.0, 0.0])), nn.Parameter(torch.tensor(1.0))
    losses = {"a": x[0] * y, "b": x[1] - x[0]}
    pcgrad.backward(losses, 3 * y, [x, y], partial(Tensor.backward, retain_graph=True))
    # a: (1, 0 | 0), b: (-1, 1 | 0); projected and summed (0.5, 1.5); the rest reaches y as it is
    assert x.grad is not None and x.grad.tolist() == [0.5, 1.5]
    assert y.grad is not None and y.grad.item() == 3


def test_what_is_held_takes_no_part(tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch):
    """Its gradients, which no step uses, are not what the others are projected by."""
    experts = {"experts": ("embedding", "shared"), "ranks": (2, 2), "router": "uniform"}
    config = tiny_config(tiny_base, tiny_data, pcgrad=True, frozen=("shared",), **experts)
    model, data = build(config)
    lora = model.config.lora
    assert lora is not None
    rows, seen = lora.slices()["shared"], []
    at = [i for i, name in enumerate(model.trained()) if "lora_A" in name]
    right = pcgrad.project

    def look(grads: list, against: list) -> list:
        seen.append([(grads[i][rows].abs().max(), grads[i].abs().max()) for i in at])
        return right(grads, against)

    monkeypatch.setattr(pcgrad, "project", look)
    train(model, data, replace(config, steps=2), tmp_path / "seed0")
    assert len(seen) == 4
    for held, both in (pair for step in seen[2:] for pair in step):
        assert held == 0 < both


@pytest.mark.parametrize("tasks", [("embedding",), ("embedding", "reranking")])
def test_in_the_loop(tasks: tuple[str, ...], tiny_base: Path, tiny_data: Path, tmp_path: Path):
    """With one task it is plain training; with two the curves part once gradients conflict."""
    config = tiny_config(tiny_base, tiny_data, tasks=tasks, learning_rate=2e-2)
    logs = []
    for on in (False, True):
        made = replace(config, pcgrad=on)
        model, data = build(made)
        logs.append(train(model, data, made, tmp_path / f"{on}"))
    losses = [[line["loss_embedding"] for line in log] for log in logs]
    assert losses[0][0] == losses[1][0]
    if len(tasks) == 1:
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    else:
        assert losses[0] != losses[1] and losses[1][-1] < losses[1][0]
