"""The whole model through the kernels, against the PyTorch path: hidden states, routing, gradients.

On a CPU Triton's interpreter runs them; `make test-gpu` runs the same on a card.
"""

from typing import Any

import pytest
import torch

from kernels.choice import use_triton
from model.config import ModelConfig
from model.lora import LoRAConfig
from model.packed import Packed, pack
from model.prefix import prefix_states
from model.router import RouterConfig
from model.transformer import Decoder
from model.unimoer import UniMoER
from tests.kernels.compare import FLOOR, PLACES, error, undefined_memory_is_nan
from tests.model.decoders import decoder

undefined = pytest.fixture(autouse=True)(undefined_memory_is_nan)
places = pytest.mark.parametrize(("device", "dtype"), PLACES)
EXPERTS = ("embedding", "reranking", "shared")
LORA = LoRAConfig(EXPERTS, (4, 3, 9), (8.0, 3.0, 18.0))
SOME = LoRAConfig(EXPERTS, (4, 3, 9), (8.0, 3.0, 18.0), targets=("o_proj", "up_proj"))
UPPER = LoRAConfig(EXPERTS, (4, 3, 9), (8.0, 3.0, 18.0), first_layer=1)
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9] * 4, [3] * 17]
TASKS = [0, 1, 1, 0]


def run(made: Decoder, batch: Packed, base: bool = False, train: bool = False) -> dict:
    """Hidden states, routing, and the gradient of everything trainable."""
    made.train(train)
    torch.manual_seed(3)
    device = batch.last.device
    hidden, routing = made(batch, torch.tensor(TASKS, device=device), base=base)
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for y in (hidden, *routing):
        g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        total = total + (y * g.to(device, y.dtype)).double().sum()
    found = {"hidden": hidden, **{f"routing {i}": w for i, w in enumerate(routing)}}
    named = {n: p for n, p in made.named_parameters() if p.requires_grad}
    if named and total.requires_grad:
        gradients = torch.autograd.grad(
            total, list(named.values()), allow_unused=True, materialize_grads=True
        )
        found |= {f"d {name}": g for name, g in zip(named, gradients, strict=True)}
    return {name: t.detach() for name, t in found.items()}


CASES = {
    "qwen3-sparsegen": ("qwen3", LORA, RouterConfig(hidden=8)),
    "qwen3-tokens": ("qwen3", LORA, RouterConfig(hidden=8, per_token=True)),
    "mistral-window": ("mistral", LORA, RouterConfig("softmax", hidden=8)),
    "llama-task": ("llama", LORA, RouterConfig("task")),
    "llama-task-tokens": ("llama", LORA, RouterConfig("task", per_token=True)),
    "llama-single": ("llama", LORA, None),
    "always-on": ("llama", LORA, RouterConfig(hidden=8, always_on="shared")),
    "always-on-tokens": ("llama", LORA, RouterConfig(hidden=8, always_on="shared", per_token=True)),
    "some-projections": ("llama", SOME, RouterConfig(hidden=8)),
    "some-projections-tokens": ("qwen3", SOME, RouterConfig(hidden=8, per_token=True)),
    "upper-layers": ("llama", UPPER, RouterConfig(hidden=8)),
    "bare": ("qwen3", None, None),
}


@places
@pytest.mark.parametrize("case", CASES)
def test_fused_model(case: str, device: str, dtype: torch.dtype) -> None:
    family, lora, router = CASES[case]
    window = 5 if case == "mistral-window" else None
    batch = pack(TEXTS, device)
    args = (family, lora, router)
    truth = run(decoder(*args, torch.float64, "cpu", False, window), pack(TEXTS))
    same = run(decoder(*args, dtype, device, False, window), batch)
    found = run(decoder(*args, dtype, device, True, window), batch)
    assert found.keys() == truth.keys()
    # Of one scalar the error is chance, so tensors of a kind are taken together.
    for kind in ("hidden", "routing", "lora_A", "lora_B", "router"):
        names = [name for name in truth if kind in name]
        a, b, c = (
            torch.cat([t[name].double().cpu().flatten() for name in names] or [torch.zeros(0)])
            for t in (found, same, truth)
        )
        # Errors of a whole model's gradients go together, so their ratio is still half chance: 0.8
        # to 1.6 for the experts over 6 draws of the weights. All router gradients follow from two
        # numbers a text and layer: 1.2 in the mean and 2.1 at most over 12.
        factor = {"hidden": 1.5, "routing": 1.5, "router": 4.0}.get(kind, 2.0)
        limit = factor * error(b, c) + FLOOR[dtype]
        assert error(a, c) <= limit, f"{kind}: {error(a, c):.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("router", [RouterConfig(hidden=8, noise=0.3, expert_dropout=0.3),
                                    RouterConfig(hidden=8, noise=0.3, per_token=True)])  # fmt: skip
def test_training_mode_draws_the_same_noise(router: RouterConfig) -> None:
    args = ("llama", LORA, router, torch.float32, "cpu")
    plain = run(decoder(*args, False), pack(TEXTS), train=True)
    fused = run(decoder(*args, True), pack(TEXTS), train=True)
    for name, value in fused.items():
        assert error(value, plain[name].double()) < 1e-4, name


def test_a_weight_renewed_before_the_backward_pass_is_noticed() -> None:
    """As on the PyTorch path: an error, not the gradient of other experts."""
    for fused in (False, True):
        made = decoder("llama", LORA, RouterConfig(hidden=8), torch.float32, "cpu", fused)
        first = made(pack(TEXTS))[0].sum()
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        made(pack(TEXTS))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward()


@torch.no_grad()
def test_tokens_are_routed_one_by_one() -> None:
    """Each by its own normalised state, whatever text it is part of."""
    args = ("llama", LORA, RouterConfig(hidden=8, per_token=True), torch.float32, "cpu")
    for fused in (False, True):
        made = decoder(*args, fused)
        routing = made(pack(TEXTS), torch.tensor(TASKS))[1][0]
        layer: Any = made.layers[0]
        ids = torch.tensor([i for text in TEXTS for i in text])
        normed = layer.input_layernorm(made.embed_tokens(ids))
        for row, state in zip(routing, normed, strict=True):
            expected = layer.router(state[None], torch.tensor([0]))[0]
            torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    args = ("qwen3", LORA, RouterConfig(hidden=8), torch.float32, "cpu", True)
    whole, pieces = decoder(*args), decoder(*args)
    pieces.checkpointing = True
    first, second = run(whole, pack(TEXTS)), run(pieces, pack(TEXTS))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_text_does_not_see_its_batch() -> None:
    made = decoder("qwen3", LORA, RouterConfig(hidden=8), torch.float32, "cpu", True)
    with torch.no_grad():
        together = made(pack(TEXTS))[0].split([len(text) for text in TEXTS])
        for text, hidden in zip(TEXTS, together, strict=True):
            torch.testing.assert_close(made(pack([text]))[0], hidden, atol=2e-6, rtol=1e-5)


def test_base_leaves_experts_out() -> None:
    args = ("qwen3", LORA, RouterConfig(hidden=8), torch.float32, "cpu")
    plain = run(decoder(*args, False), pack(TEXTS), base=True)["hidden"]
    fused = run(decoder(*args, True), pack(TEXTS), base=True)["hidden"]
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_prefix_states_are_the_same_model(tiny_base) -> None:
    """States of the layers below, then the layers above, give what one pass gives."""
    config = ModelConfig(base=str(tiny_base), lora=UPPER, router=RouterConfig(hidden=8))
    model = UniMoER(config, kernels="triton")
    states = prefix_states(model.decoder, TEXTS, "tiny", None).rows(range(4), torch.float32)
    with torch.no_grad():
        whole, _ = model.embed(pack(TEXTS))
        above, _ = model.embed(pack(TEXTS), states)
    assert error(above, whole.double()) < 1e-2  # states are kept in fp16


def test_unimoer_runs_either_path(tiny_base) -> None:
    config = ModelConfig(base=str(tiny_base), lora=LORA, router=RouterConfig(hidden=8))
    fused, plain = UniMoER(config, kernels="triton"), UniMoER(config)
    assert fused.decoder.fused and not plain.decoder.fused
    texts = ["what is the capital of France?", "no", "yes, Paris on the Seine"]
    torch.testing.assert_close(fused.encode(texts), plain.encode(texts), atol=1e-5, rtol=1e-5)
    pairs = [(texts[0], text) for text in texts]
    torch.testing.assert_close(fused.predict(pairs), plain.predict(pairs), atol=1e-5, rtol=1e-5)


def test_choice(monkeypatch: pytest.MonkeyPatch, tiny_base) -> None:
    assert not use_triton("torch", "cpu", torch.float64)
    assert not use_triton("auto", "cpu", torch.float64)
    assert use_triton("triton", "cpu", torch.float16)
    with pytest.raises(ValueError, match="auto.*triton.*torch.*'fast'"):
        use_triton("fast", "cpu", torch.float32)
    with pytest.raises(ValueError, match="float64.*kernels='torch'"):
        use_triton("triton", "cpu", torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="CUDA device, got cpu.*kernels='torch'"):
        UniMoER(ModelConfig(base=str(tiny_base)), kernels="triton")


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((7, 5), torch.float16, None),
        ((7, 5), torch.bfloat16, "sm_80 for torch.bfloat16, T4 is sm_75; use float16"),
        ((7, 0), torch.float16, "sm_75 for torch.float16, T4 is sm_70; kernels='torch'"),
        ((8, 0), torch.bfloat16, None),
        ((8, 0), torch.float64, "got torch.float64"),
    ],
)
def test_choice_by_card(monkeypatch, capability, dtype, message: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    if message is None:
        assert use_triton("auto", "cuda", dtype)
    else:
        with pytest.raises(ValueError, match=message):
            use_triton("auto", "cuda", dtype)
