"""train/loop.py: it learns, it repeats itself, it says what it did, it changes what it says.

"The same" is bit for bit throughout: losses, gradient norms and parameters.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.collections import Collection
from experiments import MOE, Config
from model.prefix import TextSet, TokenIds, prefix_states
from model.unimoer import UniMoER
from tests.train.same import Parameters, assert_same
from tests.train.tiny import NOISY_MOE, build
from train.batches import RerankingBatch, TrainingData
from train.loop import train
from train.step import task_loss


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
