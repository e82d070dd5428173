"""What is measured on random weights: real shapes, rivals that do the same work, whole tables."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import designs, ops, serving, tables
from bench.shapes import SHAPES, lora_parameters, parameters
from model.config import DecoderConfig
from model.packed import pack
from model.transformer import Decoder

TINY = DecoderConfig("qwen3", 32, 48, 2, 4, 2, 16, 128, 1e-6, 1e4)
RANKS = (4, 3, 9)
ONE = replace(TINY, num_hidden_layers=1)
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9] * 3]


@pytest.mark.parametrize(
    ("name", "base", "unit"),
    [
        ("smollm2-135m", 134_515_008, None),
        ("qwen3-0.6b", 596_049_920, 630_784),
        ("qwen3-1.7b", 1_720_574_976, 1_089_536),
        ("qwen3-4b", 4_022_468_096, 2_064_384),
        ("qwen3-8b", 8_190_735_360, 2_727_936),
        ("mistral-7b", 7_248_023_552, 2_621_440),
    ],
)
def test_parameters_of_the_shapes(name: str, base: int, unit: int | None) -> None:
    assert parameters(SHAPES[name]) == base
    assert unit is None or lora_parameters(SHAPES[name]) == unit


def test_the_formulas_count_what_a_model_has() -> None:
    ours = designs.Ours(TINY, RANKS, "cpu", torch.float32, fused=False).decoder
    base = sum(t.numel() for t in ours.named_weights().values())
    assert base == parameters(TINY)
    experts = [p for name, p in ours.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in experts) == sum(RANKS) * lora_parameters(TINY)


def test_mixed_lengths_add_up() -> None:
    for tokens in (1000, 16384):
        sizes = designs.lengths(tokens, 128, mixed=True)
        assert sum(sizes) == tokens and sizes == sorted(sizes) and len(set(sizes)) > 3
    assert abs(sum(sizes) / len(sizes) - 128) < 20
    assert designs.lengths(1024, 128, mixed=False) == [128] * 8


@torch.no_grad()
def test_rivals_do_the_same_work() -> None:
    """The same weights give the same hidden states in every design."""
    torch.manual_seed(0)
    ours = designs.Ours(TINY, RANKS, "cpu", torch.float32, fused=False).eval()
    designs.randomise(ours)
    loop = designs.Loop(TINY, RANKS, "cpu", torch.float32).eval()
    addmm = designs.Concatenated(TINY, RANKS, "cpu", torch.float32).eval()
    weights = ours.decoder.named_weights()
    for name, t in loop.model.named_parameters():
        if not (".a." in name or ".b." in name):
            t.copy_(weights["model." + name.replace(".base.", ".")])
    addmm.embed.weight.copy_(weights["model.embed_tokens.weight"])
    layer: Any
    own: Any
    for i, (layer, own) in enumerate(zip(ours.decoder.layers, addmm.layers, strict=True)):
        own.router_up, own.router_down = layer.router.up, layer.router.down
        own.c.copy_(layer.router.c)
        own.qkv, own.o, own.gate_up, own.down = (
            designs.ConcatGroup.of(group)
            for group in (layer.self_attn.qkv, layer.self_attn.o, layer.mlp.gate_up, layer.mlp.down)
        )
        theirs = loop.model.layers[i]
        for part, group in (
            (theirs.self_attn, layer.self_attn.qkv), (theirs.self_attn, layer.self_attn.o),
            (theirs.mlp, layer.mlp.gate_up), (theirs.mlp, layer.mlp.down),
        ):  # fmt: skip
            for name in group.outs:
                a, b = group.lora_A[name], group.lora_B[name]
                linear = getattr(part, name)
                for one, two, x, y in zip(
                    linear.a, linear.b, a.split(RANKS), b.split(RANKS, 1), strict=True
                ):
                    one.weight.copy_(x)
                    two.weight.copy_(y)
    batch = pack(TEXTS)
    torch.testing.assert_close(addmm(batch), ours(batch), rtol=1e-4, atol=1e-4)
    thirds = torch.full((len(TEXTS), 3), 1 / 3)
    expected = ours.decoder(batch, weights=thirds)[0]
    torch.testing.assert_close(loop(batch), expected, rtol=1e-4, atol=1e-4)


def test_flops_by_hand() -> None:
    # A layer: q, o 32 x 64, k, v 32 x 32, three of 32 x 48; texts of 2 and 3 tokens, causal
    weights = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48
    attention = 2 * 64 * (2 * 3 + 3 * 4)
    assert designs.flops(TINY, [2, 3], False) == 2 * (2 * weights * 5 + attention)
    assert designs.flops(TINY, [2, 3], True) == 2 * (4 * weights * 5 + 3.5 * attention)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours without its kernels, which Triton's interpreter would run: here it is the table."""
    monkeypatch.setattr(designs, "Decoder", lambda *a, fused, **k: Decoder(*a, fused=False, **k))


def test_designs(plain: None) -> None:
    rows = designs.measure("tiny", 24, True, "cpu", torch.float32, RANKS, 2, shape=ONE)
    found = {(row["design"], row["mode"]) for row in rows}
    names = {design.name for design in designs.DESIGNS}
    assert found == {(n, "forward") for n in names} | {(n, "train") for n in names - {"base"}}
    assert len(rows) == len(found) and all(row["rate"]["median"] > 0 for row in rows)
    assert tables.designs_table(rows).count("| tiny |") == len(rows)


def test_a_design_that_does_not_fit_beside_ours(monkeypatch, plain: None) -> None:
    """A row says so, and the others are measured."""

    def refuse(*about) -> None:
        raise torch.OutOfMemoryError

    changed = tuple(replace(d, make=refuse) if d.name == "loop" else d for d in designs.DESIGNS)
    monkeypatch.setattr(designs, "DESIGNS", changed)
    size = ("tiny", 24, True, "cpu", torch.float32, RANKS, 2, ("forward",), ONE)
    rows = designs.measure(*size)
    assert [r["design"] for r in rows if "failed" in r] == ["loop"]
    assert {r["design"] for r in rows if "rate" in r} == {"base", "addmm", "ours"}
    assert tables.designs_table(rows).count("| out of memory, ours resident too |") == 1
    mine = tuple(replace(d, make=refuse) if d.name == "ours" else d for d in designs.DESIGNS)
    monkeypatch.setattr(designs, "DESIGNS", mine)
    with pytest.raises(torch.OutOfMemoryError):
        designs.measure(*size)


def test_ops() -> None:
    """Every kernel's twin gives the same number; every row has its times."""
    for case in ops.cases(TINY, 24, "cpu", torch.float32):
        assert case.ours().item() == pytest.approx(case.twin().item(), rel=1e-3, abs=1e-2)
    rows = ops.measure("tiny", TINY, 24, "cpu", torch.float32, budget=1)
    assert len(rows) == 16 and all(row["ours"]["median"] > 0 for row in rows)
    assert tables.ops_table(rows).count("| tiny |") == 16


def test_the_cpu_rival_does_the_same_work() -> None:
    group = designs.LinearGroup(24, {"q_proj": 16, "k_proj": 8}, designs.lora_config(RANKS),
                                torch.float32)  # fmt: skip
    designs.randomise(group)
    x, gates = torch.randn(7, 24), torch.rand(7, sum(RANKS))
    rival = designs.ConcatGroup.of(group)
    for y, theirs in zip(group(x, gates), rival(x, gates), strict=True):
        torch.testing.assert_close(y, theirs)


@pytest.mark.parametrize("of", [ops.bordered_rows, ops.elementwise_rows])
def test_the_cpu_rows_of_ops(of) -> None:
    rows = of("tiny", TINY, 16, ("float32", "bfloat16"), 2)
    assert [row["dtype"] for row in rows] == ["float32"] * 2 + ["bfloat16"] * 2
    assert all(row["ratio"]["median"] > 0 for row in rows)


def test_serving() -> None:
    size = {"shape": TINY, "index": 50, "tokens": 300}
    [row] = serving.measure("tiny", "cpu", torch.float32, 2, **size)
    json.dumps(row)
    assert 2 * 4 * parameters(TINY) <= row["resident_bytes"]["two"] < 2.1 * 4 * parameters(TINY)
    text = tables.serving_table([row])
    saved = 1 - row["resident_bytes"]["one"] / row["resident_bytes"]["two"]
    assert text.count("| tiny, float32 |") == 2 and f"| {100 * saved:.1f} % |" in text


def test_serving_where_both_sides_do_not_fit(monkeypatch) -> None:
    """Each alone, and two models not even then: what fits is measured, without ratios."""
    right = serving.sides

    def sides(*about) -> dict:
        def two() -> serving.Side:
            raise torch.OutOfMemoryError

        return right(*about) | {"two": two}

    monkeypatch.setattr(serving, "sides", sides)
    two, one = serving.measure("tiny", "cpu", torch.float32, 2, shape=TINY, index=50, tokens=300)
    assert (two["sides"], two["failed"]) == (["two"], "out of memory")
    assert one["sides"] == ["one"] and one["encode"]["one"]["median"] > 0
    assert "ratio" not in one["encode"]
    text = tables.serving_table([two, one])
    assert "| tiny, float32 | two models | out of memory |" in text
    assert f"| one model | {one['resident_bytes']['one'] / 1e9:.3f} | - | - |" in text
