"""The decoder against `transformers` and `peft`, and what must hold of any packed decoder."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from model import bases, weights
from model.config import DecoderConfig
from model.layers import DecoderLayer
from model.lora import LinearGroup, LoRAConfig
from model.packed import pack, segment_mean
from model.router import RouterConfig
from model.tokens import Prompts, Tokenizer
from model.transformer import Decoder

transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict] = {
    # the width of q, 4 x 24, is not the hidden size
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "mistral": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
    # a window of 5 is shorter than most of the texts below
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 1e5},
}
LENGTHS = (1, 4, 9, 9, 17)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# of the largest number that is compared
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
ONE = LoRAConfig(("only",), (3,), (6.0,))
TWO = LoRAConfig(("embedding", "reranking"), (2, 3), (4.0, 6.0))
THREE = LoRAConfig(("embedding", "reranking", "shared"), (2, 3, 1), (4.0, 6.0, 2.0))


@pytest.fixture(params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model, written by `transformers` itself."""
    raw = {**SHAPE, **MODELS[request.param]}
    config = AutoConfig.for_model(**raw)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the usual start has norms of 1 and weights so small that they hide bugs
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def no_islands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lift the two places where `transformers` computes in float32 whatever the model's dtype."""

    def norm(self: Any, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        half = torch.arange(0, config.head_dim, 2, dtype=x.dtype) / config.head_dim
        angle = position_ids[..., None].to(x.dtype) / config.rope_parameters["rope_theta"] ** half
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    for family, module in (
        ("Llama", modeling_llama),
        ("Mistral", modeling_mistral),
        ("Qwen3", modeling_qwen3),
    ):
        monkeypatch.setattr(getattr(module, f"{family}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{family}RotaryEmbedding"), "forward", rotary)
    yield


def texts(vocabulary: int = 120, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def load(folder: Path, *args, layers: int | None = None, causal: bool = True, **kwargs) -> Decoder:
    config = DecoderConfig.read(folder, layers, causal)
    decoder = Decoder(config, *args, **kwargs)
    kept = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers))
    weights.load_into(
        folder,
        decoder.named_weights(),
        ignore=lambda name: name == "lm_head.weight" or not name.startswith(kept),
    )
    return decoder


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def fill_lora(decoder: Decoder, seed: int = 0) -> None:
    """Give B values too: with B = 0 the experts would do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in decoder.modules():
            if isinstance(group, LinearGroup):
                for name in group.adapted_names:
                    a, b = group.lora_A[name], group.lora_B[name]
                    a.copy_(torch.randn(a.shape, generator=generator) * a.shape[1] ** -0.5)
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.3)


def check(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale)


# Against transformers and peft ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_hidden_states_and_input_gradients(
    checkpoint: Path, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """A packed batch of five texts against one-by-one runs of transformers."""
    if dtype == torch.float64:
        request.getfixturevalue("no_islands")
    decoder, model = load(checkpoint, dtype=dtype), theirs(checkpoint, dtype)
    batch = pack(texts())
    embedded = decoder.embed_tokens(batch.input_ids).clone().requires_grad_()
    hidden, routing = decoder(batch, hidden=embedded)
    assert routing == []
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (hidden * weight).sum().backward()

    rows = zip(texts(), weight.split(LENGTHS), strict=True)
    expected, gradients = [], []
    for text, w in rows:
        inputs = model.get_input_embeddings()(torch.tensor([text])).requires_grad_()
        output = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
        expected.append(output)
        gradients.append(torch.autograd.grad((output * w).sum(), inputs)[0][0])
    assert hidden.std() > 0.5
    check(hidden, torch.cat(expected), TOLERANCE[dtype])
    assert embedded.grad is not None
    check(embedded.grad, torch.cat(gradients), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_expert_is_peft_lora(
    checkpoint: Path, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Outputs and the gradients of all A and B, on all seven projections."""
    if dtype == torch.float64:
        request.getfixturevalue("no_islands")
    decoder = load(checkpoint, ONE, dtype=dtype)
    fill_lora(decoder)
    config = PeftConfig(r=3, lora_alpha=6, target_modules=list(ONE.targets), lora_dropout=0.0)
    peft: Any = get_peft_model(theirs(checkpoint, dtype), config).to(dtype)

    def pairs() -> Iterator[tuple[Tensor, Any]]:
        """Our master and their parameter, for each A and B of the model."""
        for group, name, linear in linears(decoder, peft):
            yield group.lora_A[name], linear.lora_A["default"].weight
            yield group.lora_B[name], linear.lora_B["default"].weight

    assert len(list(pairs())) == SHAPE["num_hidden_layers"] * 7 * 2
    with torch.no_grad():
        for master, parameter in pairs():
            parameter.copy_(master)
    hidden, _ = decoder(pack(texts()))
    expected = torch.cat(
        [
            peft.get_base_model().model(torch.tensor([t]), use_cache=False).last_hidden_state[0]
            for t in texts()
        ]
    )
    base, _ = decoder(pack(texts()), base=True)
    assert (hidden - base).abs().max() > 0.1, "the experts must matter here"
    check(hidden, expected, TOLERANCE[dtype])
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (hidden * weight).sum().backward()
    (expected * weight).sum().backward()
    largest = max(parameter.grad.abs().max().item() for _, parameter in pairs())
    for master, parameter in pairs():
        assert master.grad is not None
        torch.testing.assert_close(
            master.grad, parameter.grad, rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest)
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_switch_by_task_is_pefts_set_adapter(
    checkpoint: Path, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """The hard switch of jina-embeddings-v3: an adapter a task. Texts of both in one batch here,
    an adapter set for each text there."""
    if dtype == torch.float64:
        request.getfixturevalue("no_islands")
    decoder = load(checkpoint, TWO, RouterConfig("task"), dtype=dtype)
    fill_lora(decoder)
    configs = {
        name: PeftConfig(r=r, lora_alpha=int(alpha), target_modules=list(TWO.targets))
        for name, r, alpha in zip(TWO.experts, TWO.ranks, TWO.alphas, strict=True)
    }
    peft: Any = get_peft_model(theirs(checkpoint, dtype), configs["embedding"], "embedding")
    peft.add_adapter("reranking", configs["reranking"])
    peft = peft.to(dtype).eval()
    with torch.no_grad():
        for group, name, linear in linears(decoder, peft):
            for expert, at in TWO.slices().items():
                linear.lora_A[expert].weight.copy_(group.lora_A[name][at])
                linear.lora_B[expert].weight.copy_(group.lora_B[name][:, at])
        tasks = [0, 1, 0, 1, 1]
        hidden, _ = decoder(pack(texts()), torch.tensor(tasks))
        expected = []
        for text, task in zip(texts(), tasks, strict=True):
            peft.set_adapter(TWO.experts[task])
            output = peft.get_base_model().model(torch.tensor([text]), use_cache=False)
            expected.append(output.last_hidden_state[0])
    check(hidden, torch.cat(expected), TOLERANCE[dtype])
    other, _ = decoder(pack(texts()), 1 - torch.tensor(tasks))
    assert (hidden - other).abs().max() > 0.1, "the task must matter here"


def linears(decoder: Decoder, peft: Any) -> Iterator[tuple[LinearGroup, str, Any]]:
    """Each adapted linear: our group and its name there, and peft's module."""
    for ours, layer in zip(decoder.layers, peft.get_base_model().model.layers, strict=True):
        assert isinstance(ours, DecoderLayer)
        attn, mlp = ours.self_attn, ours.mlp
        for part, groups in (
            ("self_attn", (attn.qkv, attn.o)),
            ("mlp", (mlp.gate_up, mlp.down)),
        ):
            for group in groups:
                for name in group.outs:
                    yield group, name, getattr(getattr(layer, part), name)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, Decoder]:
    folder = bases.resolve(bases.DEFAULT)
    return folder, load(folder)


def test_real_base_equals_transformers(smollm2: tuple[Path, Decoder]) -> None:
    folder, decoder = smollm2
    tokenizer = Tokenizer(folder, Prompts(), 512)
    ids = tokenizer.documents(
        ["Paris is the capital of France.", "def mean(x):\n    return sum(x) / len(x)\n# naïve"]
    )
    with torch.inference_mode():
        model = theirs(folder, torch.float32)
        expected = torch.cat([model.model(torch.tensor([t])).last_hidden_state[0] for t in ids])
        hidden, _ = decoder(pack(ids))
    assert expected.abs().max() > 1
    check(hidden, expected, 1e-4)


def test_real_base_knows_the_capital_of_france(smollm2: tuple[Path, Decoder]) -> None:
    """Its greedy continuation, through our tokenizer, decoder and tied output matrix alone."""
    folder, decoder = smollm2
    tokenizer = Tokenizer(folder, Prompts(), 512)
    ids = tokenizer.fast.encode("The capital of France is").ids
    with torch.inference_mode():
        hidden, _ = decoder(pack([ids]))
        token = (hidden[-1] @ decoder.embed_tokens.weight.t()).argmax()
    assert tokenizer.fast.decode([int(token)]) == " Paris"


# Packing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(make_base: Callable[..., Path]) -> dict[str, Path]:
    """One tiny base of each family, for the properties below."""
    return {
        "llama": make_base(),
        "qwen3": make_base(model_type="qwen3", head_dim=16),
        "mistral": make_base(model_type="mistral", sliding_window=4, tie_word_embeddings=False),
    }


FAMILIES = ["llama", "qwen3", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("router", [None, "sparsegen"])
def test_a_text_does_not_see_its_company(
    folders: dict[str, Path], family: str, causal: bool, router: str | None
) -> None:
    """Alone, in a batch, and in the batch reversed: the same states, the same routing."""
    routed = RouterConfig(router) if router else None
    decoder = load(folders[family], THREE, routed, dtype=torch.float64, causal=causal).eval()
    fill_lora(decoder)
    ids = texts(250)
    tasks = torch.tensor([0, 1, 0, 1, 1])
    with torch.no_grad():
        hidden, routing = decoder(pack(ids), tasks)
        reverse, reverse_routing = decoder(pack(ids[::-1]), tasks.flip(0))
        alone = [decoder(pack([t]), tasks[i : i + 1]) for i, t in enumerate(ids)]
    together = hidden.split(LENGTHS)
    back = reverse.split(LENGTHS[::-1])[::-1]
    for i in range(len(ids)):
        torch.testing.assert_close(together[i], alone[i][0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(together[i], back[i], rtol=1e-10, atol=1e-11)
    assert len(routing) == (4 if router else 0)
    for layer, (batched, reversed_) in enumerate(zip(routing, reverse_routing, strict=True)):
        single = torch.cat([routes[layer] for _, routes in alone])
        torch.testing.assert_close(batched, single, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(batched, reversed_.flip(0), rtol=1e-9, atol=1e-10)


def test_packed_fields() -> None:
    batch = pack([[7, 8], [5, 6], [4], [1, 2, 3]])
    assert batch.input_ids.tolist() == [7, 8, 5, 6, 4, 1, 2, 3]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 0, 1, 2]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert batch.last.tolist() == [1, 3, 4, 7]
    assert batch.segments.starts.tolist() == [0, 2, 4, 5, 8]
    assert batch.groups == [(2, 2), (1, 1), (1, 3)]
    x = torch.arange(8.0)[:, None]
    assert segment_mean(x, batch).flatten().tolist() == [0.5, 2.5, 4.0, 6.0]


def test_segment_mean_of_half_precision_is_taken_in_fp32() -> None:
    x = torch.full((5000, 1), 0.1, dtype=torch.bfloat16)
    mean = segment_mean(x, pack([[0] * 5000]))
    torch.testing.assert_close(mean, x[:1].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ids", [[], [[1, 2], []]])
def test_pack_refuses_nothing(ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        pack(ids)


# Masks and positions -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_at_fixed_weights(folders: dict[str, Path], family: str) -> None:
    """What follows a token cannot change its state; what precedes it does."""
    decoder = load(folders[family], THREE, RouterConfig(), dtype=torch.float64)
    fill_lora(decoder)
    fixed = torch.tensor([[0.5, 0.3, 0.2]]).double()
    one, other = [[3, 1, 4, 1, 5, 9]], [[3, 1, 4, 8, 5, 9]]
    with torch.no_grad():
        a, b = (decoder(pack(ids), weights=fixed)[0] for ids in (one, other))
    torch.testing.assert_close(a[:3], b[:3], rtol=0, atol=1e-12)
    assert (a[3:] - b[3:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_sees_what_follows(folders: dict[str, Path], family: str) -> None:
    decoder = load(folders[family], dtype=torch.float64, causal=False)
    one, other = [[3, 1, 4, 1, 5, 9]], [[3, 1, 4, 8, 5, 9]]
    with torch.no_grad():
        a, b = (decoder(pack(ids))[0] for ids in (one, other))
    assert (a - b).abs().amax(1).min() > 1e-4


def test_bidirectional_attention_alone_ignores_the_side() -> None:
    """Without positions a bidirectional decoder cannot tell a text from its mirror image."""
    config = DecoderConfig("llama", 16, 24, 2, 2, 1, 8, 50, 1e-5, 1e30, causal=False)
    decoder = Decoder(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in decoder.named_weights().items():
        if not name.endswith("norm.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.4)
    batch, mirror = pack([[1, 2, 3, 4]]), pack([[4, 3, 2, 1]])
    still = replace(batch, positions=torch.zeros(4, dtype=torch.int64))
    still_mirror = replace(mirror, positions=torch.zeros(4, dtype=torch.int64))
    a, b = decoder(still)[0], decoder(still_mirror)[0]
    torch.testing.assert_close(a, b.flip(0))
    assert (decoder(batch)[0] - decoder(mirror)[0].flip(0)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_depends_on_distance_alone(folders: dict[str, Path], family: str) -> None:
    decoder = load(folders[family], dtype=torch.float64)
    batch = pack(texts(250))
    moved = replace(batch, positions=batch.positions + 1000)
    stretched = replace(batch, positions=batch.positions * 2)
    with torch.no_grad():
        here, there, far = (decoder(b)[0] for b in (batch, moved, stretched))
    torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-9)
    assert (here - far).abs().max() > 1e-2, "otherwise positions do nothing at all"


def test_window_hides_what_is_far(make_base: Callable[..., Path]) -> None:
    """One layer with a window of 3: a change four tokens back is out of sight, two back is not."""
    folder = make_base(model_type="mistral", sliding_window=3, num_hidden_layers=1)
    decoder = load(folder, dtype=torch.float64)
    text = [10, 11, 12, 13, 14, 15, 16]
    with torch.no_grad():
        before = decoder(pack([text]))[0]
        text[2] = 99
        after = decoder(pack([text]))[0]
    changed = (before - after).abs().amax(1) > 1e-9
    assert changed.tolist() == [False, False, True, True, True, False, False]


# Layers, checkpointing, the bare base --------------------------------------------------------


def test_first_layers_then_the_final_norm(tiny_base: Path) -> None:
    """`layers=2` is the whole model stopped after two layers, then normalised."""
    whole, cut = load(tiny_base), load(tiny_base, layers=2)
    batch = pack(texts(250))
    with torch.no_grad():
        inner, _ = whole(batch, last_layer=2)
        assert torch.equal(cut(batch)[0], whole.norm(inner))
        # The same two halves one after the other are the whole.
        resumed, _ = whole(batch, hidden=inner, first_layer=2)
        assert torch.equal(resumed, whole(batch)[0])
    assert len(cut.layers) == 2
    assert not torch.equal(cut(batch)[0], whole(batch)[0])


def test_checkpointing_changes_nothing(tiny_base: Path) -> None:
    """Outputs and all gradients, with dropout, router noise and expert dropout drawn once."""
    lora = replace(THREE, dropout=0.2)
    router = RouterConfig(noise=0.5, expert_dropout=0.3)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)  # the routers draw their start from the global generator
        decoder = load(tiny_base, lora, router, dtype=torch.float64, checkpointing=checkpointing)
        fill_lora(decoder)
        decoder.train()
        torch.manual_seed(0)
        hidden, routing = decoder(pack(texts(250)), torch.tensor([0, 1, 0, 1, 1]))
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).double()
        ((hidden * weight).sum() + torch.stack(routing).square().sum()).backward()
        gradients = {n: p.grad for n, p in decoder.named_parameters() if p.requires_grad}
        assert all(g is not None for g in gradients.values())
        results.append((hidden, routing, gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_b_of_zero_is_the_base(folders: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    """Whatever the routing, B = 0 adds exactly nothing.

    The product with spare columns may add up x's columns in another order than the one without
    (the sums themselves are held bit for bit in tests/kernels/test_moe_lora.py), so the bare base
    is equal up to rounding, and every routing of the experts is equal to every other bit for bit.
    """
    bare = load(folders[family], dtype=dtype)
    routed = load(folders[family], THREE, RouterConfig(), dtype=dtype)
    plain = load(folders[family], THREE, dtype=dtype)
    batch = pack(texts(250))
    any_weights = torch.randn(len(LENGTHS), 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, adapted = bare(batch)[0], routed(batch)[0]
        assert expected.dtype == dtype and expected.isfinite().all()
        check(adapted, expected, 16 * torch.finfo(dtype).eps)
        assert torch.equal(routed(batch, weights=any_weights)[0], adapted)
        assert torch.equal(plain(batch)[0], adapted)
        assert torch.equal(routed(batch, base=True)[0], expected)
        fill_lora(routed)
        assert (routed(batch)[0] - expected).abs().max() > 0.1
        assert torch.equal(routed(batch, base=True)[0], expected)


def test_layers_below_the_first_adapted_one_stay_bare(tiny_base: Path) -> None:
    lora = replace(THREE, first_layer=2)
    decoder = load(tiny_base, lora, RouterConfig())
    fill_lora(decoder)
    batch = pack(texts(250))
    with torch.no_grad():
        entering, routing = decoder(batch, last_layer=2)
        assert torch.equal(entering, decoder(batch, last_layer=2, base=True)[0])
        assert routing == []
        assert not torch.equal(decoder(batch)[0], decoder(batch, base=True)[0])
    trained = {n.split(".")[1] for n, p in decoder.named_parameters() if p.requires_grad}
    assert trained == {"2", "3"}


def test_expert_weights_are_used_per_text(tiny_base: Path) -> None:
    """Weight 1 on one expert and 0 on the others is that expert alone, text by text."""
    decoder = load(tiny_base, THREE, dtype=torch.float64)
    fill_lora(decoder)
    ids = texts(250)[1:4]
    with torch.no_grad():
        mixed = decoder(pack(ids), weights=torch.eye(3).double())[0].split(LENGTHS[1:4])
        for i, part in enumerate(THREE.slices().values()):
            alone = load(
                tiny_base,
                LoRAConfig(("x",), (THREE.ranks[i],), (THREE.alphas[i],)),
                dtype=torch.float64,
            )
            for mine, single in zip(decoder.modules(), alone.modules(), strict=True):
                if isinstance(mine, LinearGroup) and isinstance(single, LinearGroup):
                    for name in mine.adapted_names:
                        single.lora_A[name].copy_(mine.lora_A[name][part])
                        single.lora_B[name].copy_(mine.lora_B[name][:, part])
            torch.testing.assert_close(mixed[i], alone(pack(ids))[0].split(LENGTHS[1:4])[i])


# Configs that cannot work --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type is 'yarn'"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
        ({"intermediate_size": None}, "intermediate_size"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is .'quant_method",
        ),
    ],
)
def test_configs_that_are_not_implemented(
    tiny_base: Path, tmp_path: Path, change: dict, message: str
) -> None:
    raw = json.loads((tiny_base / "config.json").read_text()) | change
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as error:
        DecoderConfig.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_more_layers_than_there_are(tiny_base: Path, layers: int) -> None:
    with pytest.raises(ValueError, match="ask for 1 to 4"):
        DecoderConfig.read(tiny_base, layers)


@pytest.mark.parametrize("first", [-1, 4])
def test_experts_above_the_last_layer(tiny_base: Path, first: int) -> None:
    with pytest.raises(ValueError, match="layers 0 to 3"):
        Decoder(DecoderConfig.read(tiny_base), replace(THREE, first_layer=first))


@pytest.mark.parametrize(
    ("family", "change"), [("mistral", {}), ("mistral", {"sliding_window": None}),
                           ("mistral", {"sliding_window": 7}), ("llama", {"sliding_window": 7})]
)  # fmt: skip
def test_windows_as_transformers_has_them(
    make_base: Callable[..., Path], family: str, change: dict
) -> None:
    from transformers import AutoConfig

    folder = make_base(model_type=family)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("sliding_window", None)
    (folder / "config.json").write_text(json.dumps(raw | change))
    read = DecoderConfig.read(folder).sliding_window
    expected = getattr(AutoConfig.from_pretrained(folder), "sliding_window", None)
    assert read == (expected if family == "mistral" else None)


def test_qwen3_window_counts_only_when_switched_on(make_base: Callable[..., Path]) -> None:
    """Qwen's config.json names a window that is not in use."""
    folder = make_base(model_type="qwen3", sliding_window=3, use_sliding_window=False)
    assert DecoderConfig.read(folder).sliding_window is None
