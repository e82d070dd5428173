"""Frozen-prefix states: the same numbers with and without them, and with those of a lower layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.packed import pack
from model.prefix import TextSet, token_batches
from model.transformer import Decoder
from model.unimoer import UniMoER
from tests.model.prefixes import FIRST, TEXTS, all_rows, build, make_model


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make_model(tiny_base)


@pytest.fixture(scope="module")
def ids(model: UniMoER) -> list[list[int]]:
    return model.tokenizer.documents(TEXTS)


# The same numbers ----------------------------------------------------------------------------


def test_no_cold_and_warm_cache_give_the_same_bits(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, computed: list[int]
) -> None:
    without = all_rows(build(model, ids, None))
    cold = all_rows(build(model, ids, tmp_path / "cache"))
    warm = all_rows(build(model, ids, tmp_path / "cache"))
    assert len(computed) == 2, "the third is read"
    assert without.abs().max() > 1
    assert torch.equal(without, cold) and torch.equal(cold, warm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_what_enters_the_first_adapted_layer(tiny_base: Path, dtype: str) -> None:
    """Up to fp16's rounding for a float32 model; a 16-bit model keeps its own numbers."""
    model = make_model(tiny_base, dtype)
    ids = model.tokenizer.documents(TEXTS)
    states = build(model, ids, None, budget=16)
    with torch.no_grad():
        for i, text in enumerate(ids):
            entering, _ = model.decoder(pack([text]), last_layer=FIRST, base=True)
            rows = states.rows([i], model.dtype)
            assert rows.shape == entering.shape and rows.dtype == model.dtype
            # Alone and in a batch the products may add up in another order
            eps = {"float32": 2**-11, "bfloat16": 2**-7, "float16": 2**-9}[dtype]
            torch.testing.assert_close(rows, entering, rtol=eps, atol=eps)
    order = [4, 0, 4]
    expected = torch.cat([states.rows([i], model.dtype) for i in order])
    assert torch.equal(states.rows(order, model.dtype), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.02)])
def test_results_equal_those_without_states(tiny_base: Path, dtype: str, tolerance: float) -> None:
    """Vectors, scores, and the gradients of the experts."""
    model = make_model(tiny_base, dtype)
    ids = model.tokenizer.documents(TEXTS)
    plain, cached = TextSet(ids), TextSet(ids, build(model, ids, None))
    for f in (model.embed_all, model.score_all):
        torch.testing.assert_close(
            f(cached, budget=30), f(plain, budget=30), rtol=0, atol=tolerance
        )
    gradients = []
    for texts in (plain, cached):
        batch, states = texts.batch([0, 2, 4], model.device, model.dtype)
        model.zero_grad()
        vectors, _ = model.embed(batch, states)
        vectors.square()[:, :8].sum().backward()
        grads = [p.grad for p in model.trained().values() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in grads]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 10 * tolerance


def test_a_base_without_frozen_layers(tiny_base: Path) -> None:
    """Experts from layer 0 up: the states are the embedded tokens."""
    model = make_model(tiny_base, first=0)
    ids = model.tokenizer.documents(TEXTS)
    tokens = torch.tensor([i for text in ids for i in text])
    rows = all_rows(build(model, ids, None))
    assert torch.equal(rows, model.decoder.embed_tokens(tokens).half().float())


def test_states_that_fp16_cannot_hold(make_base: Callable[..., Path]) -> None:
    model = make_model(make_base())
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(1e5)
    with pytest.raises(ValueError, match="exceed torch.float16.*dtype bfloat16"):
        build(model, model.tokenizer.documents(TEXTS), None)


def test_advance_counts_every_token_once(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    total = sum(map(len, ids))
    for steps in (2, 1):  # cold in several batches, warm at once
        told: list[int] = []
        build(model, ids, tmp_path, budget=total // 2 + 1, advance=told.append)
        assert sum(told) == total and len(told) >= steps


# From a lower layer --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_go_on_from_those_of_the_highest_lower_layer(
    tiny_base: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as from the first layer on, and only the layers between are run."""
    ran: list[tuple[int, int]] = []
    forward = Decoder.forward

    def watched(self, *args, **kwargs):
        ran.append((kwargs["first_layer"], kwargs["last_layer"]))
        return forward(self, *args, **kwargs)

    models = {first: make_model(tiny_base, dtype, first) for first in (1, 2, 3)}
    ids = models[1].tokenizer.documents(TEXTS)
    for first in (1, 2):
        build(models[first], ids, tmp_path, budget=16)
    monkeypatch.setattr(Decoder, "forward", watched)
    onwards = all_rows(build(models[3], ids, tmp_path, budget=16), models[3].dtype)
    assert set(ran) == {(2, 3)}
    scratch = all_rows(build(models[3], ids, None, budget=16), models[3].dtype)
    assert set(ran) == {(2, 3), (0, 3)}
    assert torch.equal(onwards, scratch)


def test_rounded_states_are_not_gone_on_from(
    tiny_base: Path, tmp_path: Path, computed: list[int]
) -> None:
    """A float32 model's are stored in fp16: the cache would change the numbers."""
    low, high = (make_model(tiny_base, "float32", first) for first in (1, 3))
    ids = low.tokenizer.documents(TEXTS)
    build(low, ids, tmp_path)
    with_cache, without = (all_rows(build(high, ids, at)) for at in (tmp_path, None))
    assert torch.equal(with_cache, without)


# Batches -------------------------------------------------------------------------------------


def test_token_batches_by_hand() -> None:
    assert token_batches([5, 1, 9, 2, 2], 6) == [[1, 3, 4], [0], [2]]
    assert token_batches([], 6) == []
    assert token_batches([7], 6) == [[0]], "a text longer than the budget goes alone"


def test_token_batches_hold_everything_once() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (200,), generator=generator).tolist()
    batches = token_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(sum(lengths[i] for i in batch) <= 100 for batch in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat), "neighbours are equally long, so attention runs in few calls"
    following = zip(batches[:-1], batches[1:], strict=True)
    full = [sum(lengths[i] for i in batch) + lengths[after[0]] for batch, after in following]
    assert min(full) > 100, "no batch could have taken the next text"
