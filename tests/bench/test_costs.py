"""The counts of the kill gate: by hand, against published numbers, against what a model does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpretedFunction

import experiments
from bench import costs, roofline
from bench.costs import Counts, Option
from bench.shapes import HUB, SHAPES, lora_parameters, parameters, shape_of
from model import layers as layers_module
from model.config import DecoderConfig
from model.lora import LoRAConfig
from model.packed import pack
from model.transformer import Decoder
from trials import WIDTHS, Config

QWEN = DecoderConfig("qwen3", 32, 48, 2, 4, 2, 16, 40, 1e-6, 1e4)
LLAMA = DecoderConfig("llama", 32, 48, 3, 4, 2, 8, 40, 1e-6, 1e4)
COUNTS = Counts(1000, 50, 6, 10, 14, "by hand")
PLAIN, CHECKPOINTING = Option("", False), Option("", True)
SINGLE = Config(ranks=(16,), prefix=False, steps=1, embedding_batch=2, reranking_batch=2,
                group_size=3, candidates=5)  # fmt: skip
MOE = replace(SINGLE, **experiments.SPARSEGEN)


def decoder(shape: DecoderConfig, c: Config, dtype: torch.dtype, checkpointing=False) -> Decoder:
    alphas = tuple(2.0 * r for r in c.ranks)
    lora = LoRAConfig(c.experts, c.ranks, alphas, first_layer=c.adapter_layers)
    made = Decoder(shape, lora, None, dtype, checkpointing, fused=True)
    with torch.no_grad():
        for weight in made.named_weights().values():
            weight.normal_(std=0.2)
    return made.train()


def texts() -> list[list[int]]:
    """The embedding micro-batch of SINGLE at COUNTS: two queries, four documents."""
    return [[i % 40 for i in range(n)] for n in (6, 6, 10, 10, 10, 10)]


@pytest.fixture
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted does not depend on what the kernels write."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *a, **k: None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_operations_of_a_step_are_those_of_the_model(
    checkpointing: bool, frozen: int, no_kernel_runs: None
) -> None:
    """Every GEMM, forward and backward, of the model on its kernels' path.

    In fp16, as in fp32 a GEMM shrinks. Left out on both sides: attention, the kernel that shrinks
    (both by hand in test_model.py), and the gradient of what enters the first layer with experts,
    which nothing asks for.
    """
    c = replace(SINGLE, tasks=("embedding",), adapter_layers=frozen)
    option = Option("", checkpointing)
    parts = costs.training(QWEN, c, COUNTS, option)
    expected = sum(
        times
        * sum(op.flops for op in ops if "attention" not in op.name and "shrink" not in op.name)
        for times, ops in parts
    )
    tokens, out = 52, 64 + 32 + 32
    expected -= 2 * tokens * (out + 3 * 16) * 32
    model = decoder(QWEN, c, torch.float16, checkpointing)
    with FlopCounterMode(display=False) as counter:
        model(pack(texts()))[0].sum().backward()
    assert counter.get_total_flops() == expected
    assert costs.batches(c, COUNTS) == {"embedding": (tokens, 10)}


def test_operations_by_hand() -> None:
    """One layer, one expert of rank 16 on 7 linears: forward; with chunks two forwards more."""
    shape = replace(LLAMA, num_hidden_layers=1)
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    experts = 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    zeros = 16 * (16 + 16)  # k and v each meet the other's spare columns
    attention = 10 * 32
    one = costs.flops(costs.forward(shape, SINGLE, 100, 10))
    assert one == 2 * 100 * (weights + experts + zeros + attention)
    bare = costs.flops(costs.forward(shape, SINGLE, 100, 10, bare=True))
    assert bare == 2 * 100 * (weights + attention)
    assert costs.flops(costs.forward(shape, SINGLE, 10**6, 10)) == pytest.approx(10**4 * one)
    c = replace(SINGLE, tasks=("embedding",))
    steps = {o: costs.flops(costs.training(shape, c, COUNTS, o))
             for o in (PLAIN, CHECKPOINTING, Option("", True, 2))}  # fmt: skip
    once = costs.flops(costs.forward(shape, c, 52, 10))
    assert steps[CHECKPOINTING] == steps[PLAIN] + once
    assert steps[Option("", True, 2)] == steps[PLAIN] + 2 * once


def test_tokens_by_hand() -> None:
    assert costs.batches(SINGLE, COUNTS) == {
        "embedding": (2 * (6 + 2 * 10), 10), "reranking": (2 * 3 * 14, 14)
    }  # fmt: skip
    assert costs.measured(SINGLE, COUNTS) == {
        "embedding": (1000 * 10 + 50 * 6, 10), "reranking": (50 * 5 * 14, 14)
    }  # fmt: skip
    few = replace(SINGLE, reranking_queries=7)
    assert costs.measured(few, COUNTS)["reranking"][0] == 7 * 5 * 14
    assert costs.cut(COUNTS, replace(SINGLE, document_tokens=4)) == replace(
        COUNTS, document=5, pair=9
    )
    assert costs.cut(COUNTS, SINGLE) == COUNTS


def test_states_that_are_kept_are_computed_once() -> None:
    """With prefix the frozen layers leave every trial and come once; the sum without is larger."""
    kept = replace(SINGLE, adapter_layers=1, prefix=True)
    anew = replace(kept, prefix=False)

    def trial(c: Config) -> float:
        passes = [costs.forward(QWEN, c, *work) for work in costs.measured(c, COUNTS).values()]
        return sum(map(costs.flops, [costs.training(QWEN, c, COUNTS, PLAIN), *passes]))

    once = costs.flops(costs.prefix(QWEN, kept, COUNTS))
    assert once == pytest.approx(trial(anew) - trial(kept)) and once > 0
    assert costs.prefix(QWEN, anew, COUNTS) == [] == costs.prefix(QWEN, SINGLE, COUNTS)


def test_trained_values_are_those_that_were_published() -> None:
    """results/kill_gate/small: four layers of smollm2-135m with one expert, and with three."""
    shape = SHAPES["smollm2-135m"]
    found = [costs.trained(shape, experiments.config("kill_gate", arm, "small", 0))
             for arm in experiments.ARMS]  # fmt: skip
    assert found == [651_841] * 3 + [2_102_865]
    full = experiments.config("kill_gate", "joint-single", "full", 0)
    for name, unit in (("qwen3-0.6b", 630_784), ("mistral-7b", 2_621_440)):
        head = SHAPES[name].hidden_size + 1
        assert costs.trained(SHAPES[name], full) == 16 * unit + head


@pytest.mark.parametrize("c", [SINGLE, replace(MOE, adapter_layers=1, ranks=(4, 3, 2))])
def test_weights_are_those_of_a_built_model(c: Config) -> None:
    model = decoder(QWEN, c, torch.float16)
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [b for name, b in model.named_buffers() if name.endswith("bordered")]
    assert costs.weight_bytes(QWEN, c) == 2 * sum(t.numel() for t in frozen)
    untied = replace(QWEN, tie_word_embeddings=False)  # the output matrix is not loaded
    assert costs.weight_bytes(untied, c) == costs.weight_bytes(QWEN, c)


def test_weights_of_the_study() -> None:
    """The verified parameters of a base, an expert's and the blocks of zeros."""
    for name in ("qwen3-0.6b", "qwen3-8b"):
        shape, c = SHAPES[name], experiments.config("kill_gate", "joint-moe", "full", 0)
        base = parameters(shape)
        base -= 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
        assert costs.weight_bytes(shape, replace(c, adapter_layers=shape.num_hidden_layers)) == (
            2 * base
        )
        p, s = 48, shape
        q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        spare = [(3 * p, q + 2 * kv), (p, s.hidden_size), (2 * p, 2 * s.intermediate_size),
                 (p, s.hidden_size)]  # fmt: skip
        read = (s.hidden_size, q, s.hidden_size, s.intermediate_size)
        border = sum(w * (w + out) + w * k for (w, out), k in zip(spare, read, strict=True))
        assert costs.weight_bytes(shape, c) == 2 * (base + s.num_hidden_layers * border)
        assert border > 48 * lora_parameters(shape) / s.num_hidden_layers


class Varlen(torch.autograd.Function):
    """Attention as a card's variable-length kernel keeps it: q, k, v, the result, a log-sum."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sum = torch.zeros_like(q), torch.zeros(q.shape[:2])
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out


@pytest.mark.parametrize("shape", [QWEN, LLAMA])
@pytest.mark.parametrize("c", [SINGLE, replace(MOE, ranks=(16, 16, 8))])
def test_what_a_layer_keeps_is_what_autograd_keeps(
    shape: DecoderConfig, c: Config, monkeypatch: pytest.MonkeyPatch, no_kernel_runs: None
) -> None:
    """On the kernels' path, to the byte: what two layers keep beyond one."""
    monkeypatch.setattr(
        layers_module, "packed_attention", lambda q, k, v, segments, **_: Varlen.apply(q, k, v)
    )
    kept = []
    for layers in (1, 2):
        model = decoder(replace(shape, num_hidden_layers=layers), c, torch.float16)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        found: dict[int, int] = {}

        def keep(tensor: Tensor, own=own, found=found) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden, _ = model(pack(texts()))
        kept.append(sum(found.values()))
        del hidden
    assert kept[1] - kept[0] == 52 * costs.kept_per_token(shape, c)


def test_memory_by_hand() -> None:
    """Both graphs of a joint step at once; with checkpointing two rows a layer and one whole layer;
    in chunks one of them; on two cards half of the tokens."""
    tokens, kept = 52 + 84, costs.kept_per_token(LLAMA, SINGLE)
    plain = costs.memory(LLAMA, SINGLE, COUNTS, PLAIN)
    assert plain["kept for the backward pass"] == 3 * tokens * kept
    assert plain["experts' masters and gradients"] == 8 * costs.trained(LLAMA, SINGLE)
    assert plain["Adam's states"] == 12 * costs.trained(LLAMA, SINGLE)
    beside = 3 * 2 * (48 + 32 + 16)
    assert plain["gradients of a layer"] == 84 * beside
    assert plain["a batch of the evaluation"] == 32768 * beside
    entering = 2 * (2 * 32 + 16)
    less = costs.memory(LLAMA, SINGLE, COUNTS, CHECKPOINTING)
    assert less["kept for the backward pass"] == 3 * tokens * entering + 84 * kept
    chunks = costs.memory(LLAMA, SINGLE, COUNTS, Option("", True, 4))
    assert chunks["kept for the backward pass"] == 3 * 21 * entering + 21 * kept
    two = costs.memory(LLAMA, SINGLE, COUNTS, PLAIN, cards=2)
    assert two["kept for the backward pass"] == plain["kept for the backward pass"] / 2
    assert costs.needed(plain) == sum(plain.values()) - min(
        plain["a batch of the evaluation"],
        plain["Adam's states"]
        + plain["kept for the backward pass"]
        + plain["gradients of a layer"],
    )


def test_the_whole_kill_gate() -> None:
    """Three seeds of four arms and the untrained base; a quarter of an hour on a large card."""
    shape, counts = SHAPES["smollm2-135m"], costs.COLLECTIONS["stdlib"]
    configs = costs.arms("full", "smollm2-135m", "stdlib")
    found = costs.kill_gate(shape, configs, counts, PLAIN, 3)
    joint = configs["joint-moe"]
    for what, task, specialist in (
        ("retrieval", "embedding", "emb-only"),
        ("reranking", "reranking", "rank-only"),
    ):
        work = costs.measured(joint, counts)[task]
        single = costs.flops(costs.forward(shape, configs[specialist], *work))
        moe = costs.flops(costs.forward(shape, joint, *work))
        bare = costs.flops(costs.forward(shape, joint, *work, bare=True))
        assert costs.flops(found[what]) == pytest.approx(6 * single + 3 * moe + bare)
    for card in roofline.CARDS:
        minutes = sum(costs.duration(work, card) for work in found.values()) / 60
        assert 1 < minutes < (15 if card.memory > 20e9 else 60)


def test_a_pass_takes_the_longer_of_bytes_and_operations() -> None:
    card = roofline.Card("round", 1e12, 1e9, 1e9)
    parts = [(2.0, [roofline.Op("gemm", flops=0.7e12)]), (3.0, [roofline.Op("copy", bytes=0.85e9)])]
    assert costs.duration(parts, card) == pytest.approx(5)
    assert (costs.flops(parts), costs.moved(parts)) == (1.4e12, pytest.approx(2.55e9))


def test_the_shape_of_a_base(tiny_base, tmp_path) -> None:
    for hub_id in WIDTHS:
        assert shape_of(hub_id).hidden_size == WIDTHS[hub_id]
    assert set(HUB.values()) | {"smollm2-135m"} == set(SHAPES)
    assert shape_of(str(tiny_base)) == DecoderConfig.read(tiny_base)
    assert shape_of("qwen3-4b") == SHAPES["qwen3-4b"]
    with pytest.raises(ValueError, match="base 'Qwen/Qwen3-99B': its shape is not known"):
        shape_of("Qwen/Qwen3-99B")
    with pytest.raises(ValueError, match="its shape is not known"):
        shape_of(str(tmp_path))
