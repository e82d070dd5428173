"""What must hold of any packed decoder: company, masks and positions, layers, the bare base."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import DecoderConfig
from model.lora import LinearGroup, LoRAConfig
from model.packed import pack
from model.router import RouterConfig
from model.transformer import Decoder
from tests.model.decoders import LENGTHS, THREE, check, fill_lora, load, texts


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
