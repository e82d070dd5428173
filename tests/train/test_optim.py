"""train/optim.py: who is in which group, and the ends of the schedule."""

import pytest
import torch
from torch import nn

from train.optim import adamw, schedule


def parameters() -> dict[str, nn.Parameter]:
    shapes = {
        "layer.lora_A.q_proj": (2, 3),
        "layer.router.up.bias": (4,),
        "layer.router.v": (),
        "head.linear.weight": (1, 3),
        "head.linear.bias": (1,),
        "overhead.weight": (2, 2),  # not the head, in spite of its name
    }
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def test_every_parameter_is_in_exactly_one_group():
    named = parameters()
    optimizer = adamw(named, 0.1, 0.2, 0.3)
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in named.values())


def test_the_head_has_its_rate_and_vectors_do_not_decay():
    named = parameters()
    optimizer = adamw(named, 0.1, 0.2, 0.3)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {n: (of[id(p)]["lr"], of[id(p)]["weight_decay"]) for n, p in named.items()}
    assert found == {
        "layer.lora_A.q_proj": (0.1, 0.3),
        "layer.router.up.bias": (0.1, 0.0),
        "layer.router.v": (0.1, 0.0),
        "head.linear.weight": (0.2, 0.3),
        "head.linear.bias": (0.2, 0.0),
        "overhead.weight": (0.1, 0.3),
    }
    assert all(group["peak"] == group["lr"] for group in optimizer.param_groups)


def test_a_step_decays_matrices_alone():
    named = parameters()
    optimizer = adamw(named, 0.1, 0.2, 0.3)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {n: p.flatten()[0].item() for n, p in named.items() if p.flatten()[0].item() != 1}
    assert changed == {
        "layer.lora_A.q_proj": pytest.approx(1 - 0.1 * 0.3),
        "head.linear.weight": pytest.approx(1 - 0.2 * 0.3),
        "overhead.weight": pytest.approx(1 - 0.1 * 0.3),
    }


def test_schedule_at_its_ends():
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(1 / 90)
    assert all(a > b for a, b in zip(shares[10:], shares[11:], strict=False))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.0), (2, 0.5), (7, 0.0), (7, 1.0)])
def test_schedule_never_stands_still_nor_exceeds_the_peak(steps, warmup):
    shares = [schedule(step, steps, warmup) for step in range(steps)]
    assert 0 < min(shares) and max(shares) == 1
