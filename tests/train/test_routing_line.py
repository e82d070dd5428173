"""train/loop.py: what a line of the log says of the routing, and when it raises the alarm."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments import MOE
from tests.train.tiny import NOISY_MOE, build
from train.loop import routing_line, train

EXPERTS = ("embedding", "reranking", "shared")


def test_routing_by_task_is_in_the_line(run, tiny, tmp_path):
    log, _ = run(replace(tiny, **MOE, router="task", steps=1), tmp_path / "a")
    assert log[0]["weights_embedding"] == [1, 0, 0]
    assert log[0]["weights_reranking"] == [0, 1, 0]
    assert log[0]["entropy_embedding"] == 0
    # 6 queries and their documents against 9 pairs: P = (1 - s, s, 0) over the mixed batch
    assert 1.5 <= log[0]["loss_balance"] < 3


def test_routed_by_task_an_idle_expert_is_no_alarm():
    only_first, only_second = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    routing = {"embedding": [only_first], "reranking": [only_second]}
    assert "alarm" in routing_line(routing, NOISY_MOE["experts"])
    assert "alarm" not in routing_line(routing, NOISY_MOE["experts"], alarm=False)


def test_balance_leaves_the_always_on_expert_out(tiny, tmp_path, collection):
    """Two routed experts in balance give 1; counted in, the third would give 4.5."""
    fields = {**NOISY_MOE, "router": "uniform", "always_on": "shared", "router_noise": 0.0}
    config = replace(tiny, **{**fields, "expert_dropout": 0.0}, steps=1)
    model, data = build(config, collection)
    [line] = train(model, data, config, tmp_path / "a")
    assert line["loss_balance"] == pytest.approx(1)


def test_the_alarm_counts_layers_over_the_mixed_batch():
    ok = torch.tensor([[0.2, 0.3, 0.5]] * 4)
    no_shared = torch.tensor([[0.5, 0.495, 0.005]] * 4)
    only_first, only_second = torch.tensor([[1.0, 0, 0]] * 4), torch.tensor([[0.0, 1, 0]] * 4)

    def alarm(embedding: list[Tensor], reranking: list[Tensor]) -> str | None:
        line = routing_line({"embedding": embedding, "reranking": reranking}, EXPERTS)
        return line.get("alarm")

    assert alarm([ok, ok, ok], [ok, ok, ok]) is None
    assert alarm([ok, no_shared], [ok, no_shared]) is None  # half of the layers is not more
    assert alarm([no_shared] * 2 + [ok], [no_shared] * 2 + [ok]) == (
        "collapse: shared carry no weight"
    )
    assert alarm([no_shared] * 2, [ok] * 2) is None  # the other task uses it
    assert alarm([only_first], [only_second]) == "collapse: shared carry no weight"
    assert alarm([only_first], [only_first]) == "collapse: reranking, shared carry no weight"


def test_the_line_averages_weights_and_entropy():
    layers = [torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]), torch.tensor([[0.5, 0.5, 0]] * 2)]
    line = routing_line({"embedding": layers}, EXPERTS)
    assert line["weights_embedding"] == [0.625, 0.375, 0]
    assert line["entropy_embedding"] == round(0.75 * math.log(2), 4)


@pytest.mark.parametrize("fields", [{}, {"expert_dropout": 0.5, "cached_tokens": 64}])
def test_training_raises_the_alarm_for_a_dead_expert_and_not_otherwise(
    tiny, collection, tmp_path, fields
):
    """Also where dropping the others gives it all of many a text's weight."""
    config = replace(tiny, **MOE, router="softmax", steps=2, **fields)
    model, data = build(config, collection)
    assert not any("alarm" in line for line in train(model, data, config, tmp_path / "alive"))
    model, data = build(config, collection)
    with torch.no_grad():
        for router in model.routers().values():
            router.down.bias[2] = -20.0
    log = train(model, data, config, tmp_path / "dead")
    assert [line.get("alarm") for line in log] == ["collapse: shared carry no weight"] * 2
    assert {line["weights_embedding"][2] for line in log} == {0}


def test_noise_and_prior_anneal_to_nothing(tiny, collection, tmp_path):
    config = replace(tiny, **NOISY_MOE, task_prior=2.0)
    model, data = build(config, collection)
    seen: list[float] = []
    router = next(iter(model.routers().values()))
    log = train(model, data, config, tmp_path / "a", callback=lambda *_: seen.append(router.anneal))
    assert seen == [1 - step / 8 for step in range(8)]
    # the prior starts by sending each task to its own expert
    assert log[0]["weights_embedding"][0] > log[0]["weights_embedding"][1]
    assert log[0]["weights_reranking"][1] > log[0]["weights_reranking"][0]
    assert not model.training
