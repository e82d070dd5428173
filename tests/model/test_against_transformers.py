"""The decoder and its experts against `transformers` and `peft`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from model import bases
from model.layers import DecoderLayer
from model.lora import LinearGroup, LoRAConfig
from model.packed import pack
from model.router import RouterConfig
from model.tokens import Prompts, Tokenizer
from model.transformer import Decoder
from tests.model.decoders import LENGTHS, check, fill_lora, load, texts

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
    # of its eight frequencies two stay, one lies between, five are divided by 8
    "llama-3": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 100,
        },
    },
}  # fmt: skip
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# of the largest number that is compared
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
ONE = LoRAConfig(("only",), (3,), (6.0,))
TWO = LoRAConfig(("embedding", "reranking"), (2, 3), (4.0, 6.0))


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
        made: Any = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "float", x.dtype)
            frequency, _ = made(self.config)
        angle = position_ids[..., None].to(x.dtype) * frequency
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


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


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
