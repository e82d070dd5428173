"""The model of bytes and operations: by hand, against the claims it must reproduce, as shown."""

import json

import pytest

from bench import model, roofline
from bench.roofline import CARDS, Card, Layer, Op, gemm, memory, predict, seconds
from bench.shapes import SHAPES
from model.config import DecoderConfig

TINY = DecoderConfig("llama", 8, 16, 2, 2, 1, 4, 32, 1e-6, 1e4)
T4, A100, H100 = CARDS


def test_an_op_takes_the_longer_of_its_bytes_and_operations() -> None:
    card = Card("round", 1e12, 1e9, 1e9)
    assert gemm("g", 3, 5, 7) == Op("g", 2 * 3 * 5 * 7, 2 * (15 + 35 + 21))
    slow = Op("copy", bytes=0.85e9)
    fast = Op("gemm", flops=0.7e12)
    assert seconds([slow, fast], card) == pytest.approx(2)
    assert seconds([Op("tiny", launches=10**6)], card) == pytest.approx(10**6 * roofline.LAUNCH)


def test_operations_of_a_layer_by_hand() -> None:
    """Qs 8, K 4, F 16: q and o 8 x 8, k and v 8 x 4, three of 8 x 16; rank 6 in all."""
    layer = Layer(TINY, n=100, length=10, rank=6, experts=3)
    weights = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16
    attention = 2 * 100 * 10 * 8
    assert sum(op.flops for op in roofline.base(layer, False)) == 2 * 100 * weights + attention
    extra = sum(op.flops for op in roofline.ours(layer, False)) - 2 * 100 * weights - attention
    experts = 2 * 100 * 6 * (16 + 2 * 12 + 16 + 3 * 24)
    zero_block = 2 * 100 * 6 * (4 + 4)  # k and v each meet the other's spare columns
    router = 2 * 10 * 8 * roofline.HIDDEN
    assert extra == experts + zero_block + router
    plain = sum(op.flops for op in roofline.addmm(layer, False))
    assert plain == 2 * 100 * weights + attention + experts + router
    assert sum(op.flops for op in roofline.loop(layer, False)) == pytest.approx(plain - router)


def test_claims() -> None:
    """The operations alone, and what is asked of a card at 16k tokens."""
    assert roofline.operations_alone(SHAPES["qwen3-0.6b"]) == pytest.approx(1.07, abs=0.005)
    assert roofline.operations_alone(SHAPES["mistral-7b"]) == pytest.approx(1.02, abs=0.005)

    def times(name: str, design: str, train: bool) -> float:
        return predict(SHAPES[name], design, H100, train)["seconds"]

    assert times("qwen3-0.6b", "ours", False) <= 1.15 * times("qwen3-0.6b", "base", False)
    assert times("mistral-7b", "ours", False) <= 1.06 * times("mistral-7b", "base", False)
    assert times("qwen3-0.6b", "loop", True) >= 2.5 * times("qwen3-0.6b", "ours", True)
    found = memory(SHAPES["qwen3-0.6b"])
    assert found["saved"] == pytest.approx(0.43, abs=0.01)  # adapters and routers counted
    assert found["one"] - found["two"] / 2 == pytest.approx(161.5e6, rel=0.06)


def test_every_design_is_slower_on_a_slower_card_and_with_more_tokens() -> None:
    for design in roofline.DESIGNS:
        rates = [predict(SHAPES["qwen3-1.7b"], design, card, False)["seconds"] for card in CARDS]
        assert rates == sorted(rates, reverse=True)
        one, two = (
            predict(SHAPES["qwen3-1.7b"], design, H100, True, tokens)["seconds"]
            for tokens in (16384, 32768)
        )
        assert 1.8 < two / one < 2.01


def test_the_page(tmp_path, monkeypatch, capsys) -> None:
    """Nothing measured is said to be; what lies in a record of the card stands beside it."""
    monkeypatch.setattr(model, "RESULTS", tmp_path)
    monkeypatch.setattr(model, "TRIALS", tmp_path / "trials")
    model.main()
    text = (tmp_path / "model.md").read_text()
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    for card in CARDS:
        for name in model.SHOWN:
            assert text.count(f"| {card.name}, {name} |") == 2
    shown = 2 * len(CARDS) * len(model.SHOWN) + len(CARDS)
    assert text.count("| not measured |") == shown
    row = {"shape": "qwen3-0.6b", "design": "ours", "mode": "forward", "tokens": 16384,
           "lengths": "mixed", "rate": {"median": 123456.0}}  # fmt: skip
    record = {"device": "NVIDIA H100 80GB HBM3", "designs": [row, row | {"tokens": 1024}]}
    (tmp_path / "card.json").write_text(json.dumps(record))
    model.main()
    text = (tmp_path / "model.md").read_text()
    assert text.count("| 123,456 |") == 1 and text.count("| not measured |") == shown - 1
    found = json.loads((tmp_path / "model.json").read_text())["predictions"]
    assert [r["card"] for r in found if r["measured"]] == ["H100 SXM"]


def test_a_card_is_told_by_all_of_its_name() -> None:
    def cards(device: str) -> list[str]:
        return [card.name for card in CARDS if model.is_card(card, device)]

    assert cards("Tesla T4") == ["T4"]
    assert cards("NVIDIA A100-SXM4-40GB") == cards("NVIDIA A100-PCIE-40GB") == ["A100 40 GB"]
    assert cards("NVIDIA H100 80GB HBM3") == ["H100 SXM"]
    others = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA H200", "Xeon, 4 threads")
    assert not any(map(cards, others))


def test_minutes_of_the_published_kill_gate(tmp_path, monkeypatch) -> None:
    """Of all its trials, on the card alone."""
    monkeypatch.setattr(model, "TRIALS", tmp_path)
    paths = [
        tmp_path / "kill_gate" / "full" / arm / f"seed{seed}.json"
        for arm in ("emb-only", "rank-only", "joint-single", "joint-moe") for seed in range(3)
    ]  # fmt: skip
    for path in paths:
        assert model.kill_gate_measured(H100) is None
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = {"prepare": 900, "train": 20, "test": 10}
        path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "seconds": seconds}))
    assert model.kill_gate_measured(H100) is None  # the untrained base is in the prediction too
    base = {"device": "NVIDIA H100 80GB HBM3", "seconds": {"test": 60}}
    (tmp_path / "kill_gate" / "full" / "baselines.json").write_text(json.dumps(base))
    assert model.kill_gate_measured(H100) == pytest.approx(12 * 30 / 60 + 1)
    assert model.kill_gate_measured(A100) is None


def test_the_committed_page_follows_from_the_code() -> None:
    committed = (model.RESULTS / "model.md").read_text()
    assert committed == model.render(model.predictions()), "run `make bench-model`"
