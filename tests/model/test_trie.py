"""Common beginnings computed once, and the last layer for the tokens that are read: both exact."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.layers import MLP
from model.lora import LinearGroup, LoRAConfig
from model.packed import Only, Packed, Part, pack, pack_trie
from model.prefix import TextSet, token_batches
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER
from tests.model.decoders import decoder

LORA = LoRAConfig(("embedding", "reranking", "shared"), (4, 3, 2), (8.0, 6.0, 4.0))
UPPER = replace(LORA, first_layer=1)
# A text that is the beginning of another, one that is there twice, one that has nothing in common.
TEXTS = [[1, 2, 3, 4, 5], [1, 2, 9], [7, 7], [1, 2, 3], [1, 2, 9], [1, 2, 3, 4, 8, 8, 8]]
CASES = {  # family, experts, router, window, and how many of the two layers run on the trie
    "bare": ("qwen3", None, None, None, 2),
    "single": ("llama", LORA, None, None, 2),
    "window": ("mistral", LORA, RouterConfig("task"), 3, 2),
    "uniform": ("llama", LORA, RouterConfig("uniform", always_on="shared"), None, 2),
    "sparsegen": ("llama", LORA, RouterConfig(hidden=8), None, 0),
    "upper": ("qwen3", UPPER, RouterConfig(hidden=8), None, 1),
    "tokens": ("qwen3", UPPER, RouterConfig(hidden=8, per_token=True), None, 2),
    "tokens-entmax": ("llama", LORA, RouterConfig("entmax15", per_token=True), None, 2),
    "similarity": ("llama", replace(UPPER, experts=("embedding", "reranking", "x")),
                   RouterConfig("similarity-mean", always_on="x"), None, 1),
}  # fmt: skip
each = pytest.mark.parametrize("case", CASES)
fused = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def make(case: str, fused: bool):
    family, lora, router, window, _ = CASES[case]
    dtype = torch.float32 if fused else torch.float64
    made = decoder(family, lora, router, dtype, "cpu", fused, window).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("pilots"):
            generator = torch.Generator().manual_seed(4)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def reranked(batch: Packed) -> Tensor:
    return torch.ones(len(batch.whole.lengths), dtype=torch.int64)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-11 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_the_nodes_are_the_distinct_beginnings(seed: int) -> None:
    draw = random.Random(seed)
    texts = [[draw.randrange(2) for _ in range(draw.randint(1, 6))] for _ in range(20)]
    texts = TEXTS if seed == 0 else texts
    batch, whole = pack_trie(texts), pack(texts)
    beginnings = [tuple(text[: n + 1]) for text in texts for n in range(len(text))]
    assert sum(batch.lengths) == len(batch.input_ids) == len(set(beginnings))
    assert batch.trie is not None
    # Every place of a text has the node of its own beginning.
    nodes = batch.trie.rows.tolist()
    assert len(set(zip(nodes, beginnings, strict=True))) == len(set(beginnings))
    for name in ("input_ids", "positions"):
        assert torch.equal(batch.spread(getattr(batch, name)), getattr(whole, name)), name
    assert torch.equal(batch.gather(batch.spread(batch.input_ids)), batch.input_ids)
    assert batch.whole.lengths == whole.lengths and torch.equal(batch.whole.last, whole.last)
    runs = [length for count, length in batch.groups for _ in range(count)]
    assert tuple(runs) == batch.lengths
    assert whole.whole is whole and whole.spread(whole.last) is whole.last


@each
@fused
@pytest.mark.parametrize("only", [False, True], ids=["all", "last"])
@torch.no_grad()
def test_a_trie_gives_what_the_whole_texts_give(case: str, fused: bool, only: bool) -> None:
    made, whole, batch = make(case, fused), pack(TEXTS), pack_trie(TEXTS)
    tokens = []
    for layer in made.layers:
        layer.register_forward_pre_hook(lambda layer, given: tokens.append(len(given[0])))
    expected, routing = made(whole, reranked(whole))
    tokens.clear()
    found, weights = made(batch, reranked(batch), only=Only.of(whole, whole.last) if only else None)
    close(found, expected[whole.last] if only else expected)
    assert len(weights) == len(routing)
    for a, b in zip(weights, routing, strict=True):
        close(a, b)
    # What it is for: so many layers see only the nodes, the last one not where a token is read.
    layers = CASES[case][-1]
    assert made.trie_layers() == layers
    layers = min(layers, 1) if only else layers
    few, many = len(batch.input_ids), len(whole.input_ids)
    assert tokens == [few] * layers + [many] * (2 - layers)


@each
@torch.no_grad()
def test_the_base_and_given_weights(case: str) -> None:
    made, whole, batch = make(case, False), pack(TEXTS), pack_trie(TEXTS)
    close(made(batch, base=True)[0], made(whole, base=True)[0])
    assert made.trie_layers(base=True) == 2
    lora = CASES[case][1]
    if lora is not None:
        given = torch.rand(len(TEXTS), 3, dtype=torch.float64)
        assert made.trie_layers(given) == lora.first_layer
        close(made(batch, weights=given)[0], made(whole, weights=given)[0])


@torch.no_grad()
def test_without_a_causal_mask_nothing_is_shared() -> None:
    made = decoder("llama", LORA, None, torch.float64, "cpu", False, causal=False).eval()
    assert made.trie_layers() == 0
    close(made(pack_trie(TEXTS))[0], made(pack(TEXTS))[0])


@each
@fused
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_the_tokens_that_are_read(case: str, fused: bool, dropout: float) -> None:
    """Their states, the routing and all gradients are those of the whole last layer, and so is what
    is dropped, also where the batch is part of another."""
    made, batch = make(case, fused), pack(TEXTS)
    if dropout:
        for module in made.train().modules():
            if isinstance(module, LinearGroup):
                module.dropout = dropout
        lengths = [4, *batch.lengths, 9]
        part = Part.of(lengths, range(1, len(lengths) - 1), torch.device("cpu"))
        batch = replace(batch, part=part)
    first = batch.last - torch.tensor(batch.lengths) + 1
    mixed = torch.where(torch.arange(len(TEXTS)) % 2 == 0, batch.last, first)
    trained = [p for p in made.parameters() if p.requires_grad]
    results = []
    for only in (None, Only.of(batch, mixed)):
        torch.manual_seed(6)
        hidden, routing = made(batch, reranked(batch), only=only)
        rows = hidden[mixed] if only is None else hidden
        generator = torch.Generator().manual_seed(2)
        total = torch.zeros((), dtype=rows.dtype)
        for y in (rows, *routing):
            total = total + (y * torch.randn(y.shape, generator=generator)).sum()
        gradients = []
        if trained:
            gradients = torch.autograd.grad(
                total, trained, allow_unused=True, materialize_grads=True
            )
        results.append([rows, *routing, *gradients])
    for a, b in zip(*results, strict=True):
        scale = b.abs().max().clamp(min=1)
        close(a / scale, b / scale)


def count(seen: list[int]):
    """A hook that notes how many rows come in."""
    return lambda module, given: seen.append(len(given[0]))


def test_the_last_layer_has_no_more_to_do(tiny_base: Path) -> None:
    """By last-token pooling its MLP gets one row a text; by the mean all tokens."""
    for pooling, rows in (("last", 3), ("mean", 9)):
        config = ModelConfig(base=str(tiny_base), lora=LORA, reranking_pooling=pooling)
        model, seen = UniMoER(config), []
        for module in model.modules():
            if isinstance(module, MLP):
                module.register_forward_pre_hook(count(seen))
        model.score(pack([[1, 2, 3, 4], [5, 6], [7, 8, 9]]))
        assert seen == [9, 9, 9, rows]


QUERIES = ("what is the capital of France, and where is it?", "who?")
DOCUMENTS = ("Paris", "the Seine", "Paris, on the Seine", "a path", "Paris")
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]


@pytest.mark.parametrize("budget", [60, 4096])
@pytest.mark.parametrize("kind", ["none", "task", "sparsegen"])
def test_reranking_computes_a_query_once(tiny_base: Path, kind: str, budget: int) -> None:
    """Through the model: fewer tokens enter, the same scores come out, in the order asked for."""
    router = None if kind == "none" else RouterConfig(kind)
    lora = replace(LORA, first_layer=2)
    config = ModelConfig(base=str(tiny_base), lora=lora, router=router, dtype="float64")
    model, tokens = UniMoER(config), []
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ids = model.tokenizer.pairs(PAIRS)
    expected = [model.score(pack([text]))[0].item() for text in ids]
    first = model.decoder.layers[0]
    first.register_forward_pre_hook(lambda layer, given: tokens.append(len(given[0])))
    found = model.score_pairs(PAIRS, budget=budget)
    close(found, torch.tensor(expected, dtype=torch.float64))
    assert sum(tokens) < 0.9 * sum(map(len, ids))
    if budget == 4096:
        beginnings = {tuple(text[: n + 1]) for text in ids for n in range(len(text))}
        assert tokens == [len(beginnings)]


def test_when_a_trie_is_made() -> None:
    """Where enough is saved; within the budget, each batch by length, every text in one."""
    ids = [[1, 2, 3, 4, 5, 6, i, *range(i % 3)] for i in range(40)]
    batches, trie = TextSet(ids).batches(30, 1.0)
    assert trie and sorted(i for batch in batches for i in batch) == list(range(40))
    for batch in batches:
        lengths = [len(ids[i]) for i in batch]
        assert lengths == sorted(lengths) and sum(lengths) <= 30
    apart = [[i, *range(9)] for i in range(40)]
    by_length = token_batches([10] * 40, 30)
    assert TextSet(apart).batches(30, 1.0) == (by_length, False), "nothing in common"
    assert TextSet(ids).batches(30, 0.0) == (token_batches(list(map(len, ids)), 30), False)
    assert not TextSet(ids).batches(30, 0.02)[1], "too few layers would gain"
    assert TextSet([]).batches(30, 1.0) == ([], False)
