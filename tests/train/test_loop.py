"""train/loop.py: it learns, it repeats itself, it survives being stopped, it changes what it says.

"The same" is bit for bit throughout: losses, gradient norms and parameters.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.collections import Collection, load
from experiments import MOE, Config
from model import weights
from model.prefix import TextSet, TokenIds, prefix_states
from model.unimoer import UniMoER
from tests.train.tiny import NOISY_MOE, TRAIN, build, tiny_config
from train.batches import RerankingBatch, TrainingData
from train.loop import (
    Callback,
    NonFiniteLoss,
    forget,
    owned,
    routing_line,
    train,
)
from train.step import task_loss

Parameters = dict[str, Tensor]


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def collection(tiny_data: Path) -> Collection:
    return load(str(tiny_data))


@pytest.fixture(scope="module")
def tiny(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(tiny_base, tiny_data)


@pytest.fixture
def noisy(tiny: Config) -> Config:
    return replace(tiny, **NOISY_MOE)


@pytest.fixture(scope="module")
def run(collection: Collection) -> Callable[..., tuple[list[dict], Parameters]]:
    """Train a new model; its log and its trained parameters."""

    def run(
        config: Config, place: Path, callback: Callback | None = None
    ) -> tuple[list[dict], Parameters]:
        model, data = build(config, collection)
        log = train(model, data, config, place, callback=callback)
        return log, {name: p.detach().clone() for name, p in model.trained().items()}

    return run


@pytest.fixture(scope="module")
def unbroken(run, tiny, tmp_path_factory) -> tuple[list[dict], Parameters]:
    """The noisy run that nothing has disturbed."""
    return run(replace(tiny, **NOISY_MOE), tmp_path_factory.mktemp("unbroken") / "seed0")


def assert_same(found: tuple[list[dict], Parameters], expected: tuple[list[dict], Parameters]):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    differ = [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])]
    assert differ == []


def stop_after(step: int) -> Callback:
    def callback(at: int, line: dict) -> None:
        if at == step:
            raise Stopped

    return callback


def test_one_batch_can_be_overfitted(run, tiny, tmp_path):
    """Both tasks at once, the whole training set in every step."""
    config = replace(
        tiny,
        train_queries=4,
        embedding_batch=4,
        reranking_batch=4,
        steps=30,
        learning_rate=2e-2,
        head_learning_rate=2e-2,
        ranks=(8,),
    )
    log, _ = run(config, tmp_path / "a")
    assert log[0]["loss_embedding"] > 0.5 and log[0]["loss_reranking"] > 0.5
    assert log[-1]["loss_embedding"] < 0.02
    assert log[-1]["loss_reranking"] < 0.15


@pytest.mark.parametrize("loss", ["listwise", "bce"])
def test_reranking_alone_learns_with_either_loss(run, tiny, tmp_path, loss):
    config = replace(
        tiny,
        tasks=("reranking",),
        reranking_loss=loss,
        train_queries=4,
        reranking_batch=4,
        steps=30,
        learning_rate=2e-2,
        head_learning_rate=2e-2,
    )
    log, _ = run(config, tmp_path / "a")
    losses = [line["loss_reranking"] for line in log]
    assert losses[-1] < 0.3 * losses[0]
    assert "loss_embedding" not in log[0]


def test_the_same_seed_twice(run, noisy, tmp_path, unbroken):
    torch.manual_seed(12345)  # what the process did before does not matter
    assert_same(run(noisy, tmp_path / "again"), unbroken)


def test_a_line_says_how_many_tokens_its_step_read(tiny, collection, tmp_path):
    """As the decoder counts them, in one part or in many."""
    logs = []
    for cached in (0, 32):
        model, data = build(replace(tiny, cached_tokens=cached, steps=3), collection)
        read: list[int] = []

        def count(module, args, *, read: list[int] = read):
            read.append(len(args[0].positions))

        with model.decoder.register_forward_pre_hook(count):
            logs.append(train(model, data, data.config, tmp_path / str(cached)))
        passes = sum(read) if not cached else sum(read) / 2  # each part is run again
        assert sum(line["tokens"] for line in logs[-1]) == passes
    assert [line["tokens"] for line in logs[0]] == [line["tokens"] for line in logs[1]]
    assert logs[0][0]["tokens"] > tiny.embedding_batch * 2 + tiny.reranking_batch


def test_another_seed_differs_from_the_first_step(run, noisy, tmp_path, unbroken):
    log, parameters = run(replace(noisy, seed=1), tmp_path / "a")
    assert log[0]["loss_embedding"] != unbroken[0][0]["loss_embedding"]
    name = next(name for name in parameters if "lora_A" in name)
    assert not torch.equal(parameters[name], unbroken[1][name])
    # and the A/A control is simply that seed under another name
    assert_same(run(replace(noisy, seed_offset=1), tmp_path / "b"), (log, parameters))


@pytest.mark.parametrize("step", [0, 2, 3, 6, 7])
def test_stopped_and_continued_equals_unbroken(run, noisy, tmp_path, unbroken, step):
    """Checkpoints lie after steps 2 and 5, so a stop costs up to three steps."""
    place = tmp_path / "seed0"
    with pytest.raises(Stopped):
        run(noisy, place, stop_after(step))
    with open(place.with_name("seed0.log.jsonl"), "a") as file:
        file.write('{"step": 99, "loss_')  # the line that was being written
    torch.manual_seed(999)
    redone: list[int] = []
    assert_same(run(noisy, place, lambda at, line: redone.append(at)), unbroken)
    assert redone == list(range(3 * (step // 3), 8))
    lines = place.with_name("seed0.log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == unbroken[0]


def test_stopped_again_and_again(run, noisy, tmp_path, unbroken):
    place = tmp_path / "seed0"
    for step in (1, 3, 4, 5, 7, 6):
        with pytest.raises(Stopped):
            run(noisy, place, stop_after(step))
    assert_same(run(noisy, place), unbroken)


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_stopped_while_a_checkpoint_is_written(run, noisy, tmp_path, unbroken, monkeypatch, moment):
    save, calls = weights.save, []

    def broken(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:  # the second one
            if moment == "after the rename":
                save(tensors, path, metadata)
            else:
                half = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
                save(half, path.with_name("state.safetensors.other"), metadata)
            raise Stopped
        save(tensors, path, metadata)

    monkeypatch.setattr(weights, "save", broken)
    with pytest.raises(Stopped):
        run(noisy, tmp_path / "seed0")
    monkeypatch.undo()
    assert_same(run(noisy, tmp_path / "seed0"), unbroken)


def test_a_log_without_checkpoint_is_begun_anew(run, noisy, tmp_path, unbroken):
    place = tmp_path / "seed0"
    place.with_name("seed0.log.jsonl").write_text('{"step": 0, "loss_embedding": 1e9}\n')
    assert_same(run(noisy, place), unbroken)


@pytest.mark.parametrize("lines", [None, [0, 1], [0, 0, 1, 1, 2, 2]])
def test_a_log_that_is_not_the_checkpoint_s_is_refused(run, noisy, tmp_path, lines):
    """Lost, cut, or of two processes: its curve would be none."""
    place = tmp_path / "seed0"
    with pytest.raises(Stopped):
        run(noisy, place, stop_after(4))
    log = place.with_name("seed0.log.jsonl")
    kept = log.read_text().splitlines()
    log.unlink()
    if lines is not None:
        log.write_text("".join(f"{kept[i]}\n" for i in lines))
    with pytest.raises(ValueError, match=r"log\.jsonl: expected the lines of the steps 0 to 2"):
        run(noisy, place)


def test_two_processes_at_one_trial(tmp_path):
    place = tmp_path / "arm" / "seed0"
    with owned(place):
        with (
            pytest.raises(ValueError, match="another process is at seed0: wait for it"),
            owned(place),
        ):
            pass
        with owned(place.with_name("seed1")):
            pass
    with owned(place):
        pass


def test_the_checkpoint_of_another_config_is_refused(run, noisy, tmp_path):
    place = tmp_path / "seed0"
    with pytest.raises(Stopped):
        run(noisy, place, stop_after(4))
    before = (tmp_path / "seed0.checkpoint" / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"seed0\.checkpoint.*another config \(.*remove"):
        run(replace(noisy, learning_rate=1e-4), place)
    assert (tmp_path / "seed0.checkpoint" / "state.safetensors").read_bytes() == before
    # A field of another version is another config as well, not a TypeError.
    path = tmp_path / "seed0.checkpoint" / "state.safetensors"
    later = json.dumps(noisy.to_json() | {"a later field": 1})
    weights.save(load_file(path), path, {**weights.read_metadata(path), "config": later})
    with pytest.raises(ValueError, match="another config .*remove"):
        run(noisy, place)
    forget(place)
    assert list(tmp_path.iterdir()) == []


def test_the_callback_sees_each_step_and_its_line(run, noisy, tmp_path):
    seen: list[tuple[int, dict]] = []
    log, _ = run(noisy, tmp_path / "a", lambda step, line: seen.append((step, line)))
    assert seen == list(enumerate(log))
    assert [line["step"] for line in log] == list(range(8))


def test_a_line_says_what_happened(unbroken, tiny):
    for line in unbroken[0]:
        assert line["learning_rate"] <= tiny.learning_rate
        for name in ("loss_embedding", "loss_reranking", "loss_balance", "gradient_norm"):
            assert math.isfinite(line[name])
        for task in ("embedding", "reranking"):
            assert sum(line[f"weights_{task}"]) == pytest.approx(1, abs=1e-3)
            assert 0 <= line[f"entropy_{task}"] <= math.log(3) + 1e-4
    assert [line["learning_rate"] for line in unbroken[0]] == pytest.approx(
        [tiny.learning_rate * (8 - step) / 7 if step else tiny.learning_rate for step in range(8)]
    )


def test_routing_by_task_is_in_the_line(run, tiny, tmp_path):
    log, _ = run(replace(tiny, **MOE, router="task", steps=1), tmp_path / "a")
    assert log[0]["weights_embedding"] == [1, 0, 0]
    assert log[0]["weights_reranking"] == [0, 1, 0]
    assert log[0]["entropy_embedding"] == 0
    # 6 queries and their documents against 9 pairs: P = (1 - s, s, 0) over the mixed batch
    assert 1.5 <= log[0]["loss_balance"] < 3


# What goes wrong --------------------------------------------------------------------------------


def spoil(model: UniMoER, at: int) -> Callback:
    """After step `at`, one parameter of the head is infinite."""

    def callback(step: int, line: dict) -> None:
        if step == at:
            with torch.no_grad():
                model.trained()["head.linear.weight"].fill_(math.inf)

    return callback


def test_a_loss_that_is_not_finite_stops_the_run(run, noisy, tmp_path, unbroken, collection):
    place, state = tmp_path / "seed0", tmp_path / "seed0.checkpoint" / "state.safetensors"
    model, data = build(noisy, collection)
    with pytest.raises(NonFiniteLoss) as caught:
        train(model, data, noisy, place, callback=spoil(model, 3))
    message = str(caught.value)
    assert message.startswith("step 4: loss nan")
    for name in [*data.embedding(4).ids, *data.reranking(4).ids]:
        assert f"'{name}'" in message
    assert str(state.parent) in message
    assert weights.read_metadata(state)["step"] == "3"
    lines = (tmp_path / "seed0.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]  # not the one that failed
    # What is kept is good: without the fault it ends where it would have ended.
    assert_same(run(noisy, place), unbroken)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(
    tiny, tmp_path, collection
):
    model, data = build(tiny, collection)
    parameters = model.trained()
    parameters["head.linear.bias"].register_hook(lambda grad: grad * math.inf)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(NonFiniteLoss, match=r"^step 0: loss \d.*norm (nan|inf).*no checkpoint"):
        train(model, data, tiny, tmp_path / "a")
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


# Who changes what -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "untouched"),
    [
        ({"tasks": ("embedding",)}, "head."),
        ({"tasks": ("reranking",)}, "-"),
        ({}, "-"),
        ({**NOISY_MOE, "expert_dropout": 0.0}, "-"),
        ({**MOE, "router": "uniform"}, "-"),
    ],
)
def test_only_what_is_declared_changes(tiny, tmp_path, collection, changes, untouched):
    """The base stays bit for bit; every expert, router and (when it is used) the head moves."""
    config = replace(tiny, reranking_loss="bce", **changes)  # listwise leaves the head's bias alone
    model, data = build(config, collection)
    frozen = {name: t.clone() for name, t in model.decoder.named_weights().items()}
    assert not any(t.requires_grad for t in model.decoder.named_weights().values())
    start = {name: p.detach().clone() for name, p in model.trained().items()}
    train(model, data, config, tmp_path / "a")
    for name, tensor in model.decoder.named_weights().items():
        assert torch.equal(tensor, frozen[name]), name
    same = {name for name, p in model.trained().items() if torch.equal(p, start[name])}
    assert same == {name for name in start if name.startswith(untouched)}
    adapted = {int(name.split(".")[2]) for name in start if "lora_" in name}
    assert adapted == {2, 3}  # adapter_layers = 2 of 4


def test_before_training_the_loss_is_the_base_s(tiny, collection):
    model, data = build(replace(tiny, **MOE, router="sparsegen", dtype="float64"), collection)
    start = [task_loss(task, model, data, 0) for task in ("embedding", "reranking")]
    for b in (p for name, p in model.trained().items() if "lora_B" in name):
        assert b.abs().max() == 0
    bare, _ = build(replace(tiny, dtype="float64"), collection)
    bare.head.load_state_dict(model.head.state_dict())
    for layer in bare.decoder.layers:
        layer.lora = None  # type: ignore[assignment]  # no expert at all
    for task, loss in zip(("embedding", "reranking"), start, strict=True):
        bare_loss = task_loss(task, bare, data, 0)
        torch.testing.assert_close(bare_loss, loss, rtol=1e-13, atol=0)


def test_no_gradient_is_added_up_in_random_order(tiny, collection):
    """With several threads the backward of indexing with repeats adds atomically, in any order:
    a few runs in a hundred would then differ from the others with their seed."""
    model, data = build(replace(tiny, **NOISY_MOE), collection)
    batch, _ = data.embedding_texts.batch([0, 1, 2, 30, 31], model.device, model.dtype)
    hidden, weights = model.train().hidden(batch, "embedding")
    todo, seen = [t.grad_fn for t in (hidden, *weights)], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert {name for name in names if "BorderedLinear" in name} and len(seen) > 50
    unordered = ("Index", "Gather", "Scatter", "Embedding", "Put", "Take")
    assert {name for name in names if name.startswith(unordered)} == set()


def gradients(config: Config, collection: Collection, place: Path) -> Parameters:
    model, data = build(config, collection)
    train(model, data, config, place)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.trained().items()
    }


def test_a_joint_step_is_the_weighted_sum_of_both_tasks(tiny, collection, tmp_path):
    tiny = replace(tiny, dtype="float64", clip=1e9, steps=1, balance_weight=0.0)
    joint = replace(tiny, embedding_weight=0.5, reranking_weight=3.0)
    total = gradients(joint, collection, tmp_path / "joint")
    parts = {
        task: gradients(replace(tiny, tasks=(task,)), collection, tmp_path / task)
        for task in ("embedding", "reranking")
    }
    for name, found in total.items():
        expected = 0.5 * parts["embedding"][name] + 3 * parts["reranking"][name]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    moving = [name for name in total if "lora_B" in name]
    assert all(parts[task][name].norm() > 1e-6 for task in parts for name in moving)


def test_the_gradient_is_clipped_and_its_norm_logged(tiny, collection, tmp_path):
    seen: list[float] = []
    config = replace(tiny, clip=0.01, steps=2)
    model, data = build(config, collection)

    def callback(step: int, line: dict) -> None:
        grads = [p.grad for p in model.trained().values() if p.grad is not None]
        seen.append(float(torch.stack([g.norm() for g in grads]).norm()))

    log = train(model, data, config, tmp_path / "a", callback=callback)
    assert seen == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(line["gradient_norm"] > 0.02 for line in log)


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_a_loss_does_not_depend_on_how_its_batch_is_packed(tiny, collection, task):
    """The loop sorts texts by length; the loss is that of the texts one at a time."""
    config = replace(tiny, dtype="float64", hard_negatives=2, document_tokens=99)
    model, data = build(config, collection)
    with torch.no_grad():
        for name, p in model.trained().items():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    if task == "embedding":
        rows, texts = data.embedding(1), data.embedding_texts
        one = [model.embed(texts.batch([i], model.device, model.dtype)[0])[0]
               for i in rows.queries + rows.documents]  # fmt: skip
        vectors = torch.cat(one)
        queries, documents = vectors[: len(rows.queries)], vectors[len(rows.queries) :]
        terms = []
        for i, (q, own) in enumerate(zip(queries, rows.positive, strict=True)):
            scores = documents @ q
            known = rows.relevant[rows.relevant[:, 0] == i, 1]
            kept = ~torch.isin(torch.arange(len(documents)), known) & (scores <= scores[own] + 0.1)
            kept[own] = True
            terms.append((scores[kept] / 0.02).logsumexp(0) - scores[own] / 0.02)
        found = task_loss("embedding", model, data, 1)
    else:
        rows, texts = data.reranking(1), data.reranking_texts
        one = [model.score(texts.batch([i], model.device, model.dtype)[0])[0] for i in rows.pairs]
        groups = torch.cat(one).view(-1, 3)
        terms = [group.logsumexp(0) - group[0] for group in groups]
        found = task_loss("reranking", model, data, 1)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-10, atol=1e-12)
    used = rows.pairs if isinstance(rows, RerankingBatch) else rows.queries + rows.documents
    lengths = [texts.lengths[i] for i in used]
    assert lengths != sorted(lengths)  # the loop did have to sort


def test_prefix_states_change_the_losses_by_their_rounding_alone(tiny, collection, tmp_path):
    """fp16 keeps eleven bits of what enters the first adapted layer."""
    logs = []
    for with_states in (False, True):
        model, data = build(replace(tiny, steps=4), collection)
        if with_states:

            def states(ids: TokenIds, title: str, model: UniMoER = model) -> TextSet:
                return TextSet(ids, prefix_states(model.decoder, ids, "test", None))

            data = TrainingData(collection, model.tokenizer, data.config, states)
        log = train(model, data, data.config, tmp_path / str(with_states))
        logs.append([line[f"loss_{task}"] for line in log for task in ("embedding", "reranking")])
    assert logs[0] != logs[1]
    assert logs[0] == pytest.approx(logs[1], rel=0.02)


# The alarm --------------------------------------------------------------------------------------

EXPERTS = ("embedding", "reranking", "shared")


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


def test_a_place_in_a_new_folder(run, tiny, tmp_path):
    place = tmp_path / "new" / "arm" / "seed0"
    log, _ = run(replace(tiny, steps=4), place)
    assert len(log) == 4 and TRAIN // tiny.embedding_batch == 4
    assert (place.parent / "seed0.checkpoint" / "state.safetensors").exists()
    forget(place)
    forget(place)  # nothing is left, and nothing to complain about
    assert list(place.parent.iterdir()) == []
