"""`make plan`: what fits, hours and dollars by hand, the page that is kept, and the probe."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import costs, plan, probe
from bench.costs import Counts, Option
from bench.plan import OFFERS, PRICES, Offer
from bench.roofline import Card
from tests.train.tiny import write_collection
from trials import WIDTHS

COUNTS = Counts(100_000, 100, 10, 80, 92, "by hand")
BIG = Card("big", 1e15, 1e12, 1e15)


def made(base: str = "qwen3-0.6b", seeds: int = 3) -> plan.Plan:
    return plan.make_plan(base, "full", "msmarco", COUNTS, seeds)


def test_seconds_by_hand() -> None:
    """Those of the counts on one card, half of them on two and the gradients' way between them."""
    one = plan.estimate(made(), Offer("x", BIG))
    parts = costs.kill_gate(made().shape, made().configs, COUNTS, Option("", False), 3)
    assert one["seconds"] == {what: costs.duration(part, BIG) for what, part in parts.items()}
    two = plan.estimate(made(), Offer("x", BIG, count=2))
    sent = sum(4 * 300 * costs.trained(made().shape, c) for c in made().configs.values())
    assert two["seconds"]["retrieval"] == one["seconds"]["retrieval"] / 2
    assert two["seconds"]["training"] == pytest.approx(
        one["seconds"]["training"] / 2 + 3 * sent / plan.LINK
    )
    probed = plan.estimate(made(), Offer("x", BIG), {"training": 3.0, "encoding": 0.5})
    for what, ratio in (("training", 3), ("retrieval", 0.5), ("reranking", 0.5)):
        assert probed["seconds"][what] == pytest.approx(ratio * one["seconds"][what])


def test_what_fits() -> None:
    """The first option whose need is within 85 % of the card; none where the weights alone are
    more."""
    shape, joint = made().shape, made().joint
    needs = {
        o.name: costs.needed(costs.memory(shape, joint, COUNTS, o)) for o in costs.options(joint)
    }
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for option in ("as it is", "checkpointing", "checkpointing, 2 chunks"):
        fits = plan.estimate(made(), Offer("x", replace(BIG, memory=needs[option] / 0.85 + 1)))
        assert (fits["option"].name, fits["bytes"]) == (option, needs[option])
    small = plan.estimate(made(), Offer("x", replace(BIG, memory=1e9)))
    assert small == {"option": None, "bytes": min(needs.values()), "seconds": {}}
    text = plan.section(plan.make_plan("mistral-7b", "full", "msmarco", COUNTS, 1), PRICES)
    assert "| T4 | no | " in text and text.count("| - | - | - | - | - |") == 1


def test_dollars() -> None:
    """Hours times the price, and the price that is given instead."""
    prices = plan.priced(["h100=2", "here=0.1"])
    assert prices == {**PRICES, "h100": 2.0, "here": 0.1} and plan.priced([]) == PRICES
    text = plan.section(made(), prices)
    for offer in OFFERS:
        [cells] = re.findall(rf"^\| {offer.name} \|(.*)\|$", text, re.MULTILINE)
        *_, hours, dollars = cells.split("|")
        seconds = sum(plan.estimate(made(), offer)["seconds"].values())
        assert float(hours) == pytest.approx(seconds / 3600, rel=0.05)
        assert float(dollars) == pytest.approx(seconds / 3600 * prices[offer.key], rel=0.05)
    for wrong in ("h200=1", "h100", "h100=-1", "h100=cheap"):
        with pytest.raises(ValueError, match=f"price '{wrong}': expected KEY=DOLLARS"):
            plan.priced([wrong])


def test_the_page_that_is_kept(tmp_path, monkeypatch, capsys) -> None:
    """bench/results/plan.md follows from the counts as they are; other questions leave it alone."""
    kept = (plan.RESULTS / "plan.md").read_text()
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    assert plan.main(["--scale", "full", "--data", "msmarco"]) == 0
    assert (tmp_path / "plan.md").read_text() == kept
    assert capsys.readouterr().out == kept
    for base in WIDTHS:
        assert f"## {Path(base).name}\n" in kept
    (tmp_path / "plan.md").unlink()
    assert plan.main(["--base", "qwen3-0.6b", "--documents", "50", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "50 documents and 6,980 queries" in shown and "1 seeds" in shown
    assert list(tmp_path.iterdir()) == []


def test_collections_of_all_kinds(tmp_path, capsys) -> None:
    """A folder is read, numbers are taken as they are, and what is no base or number is said."""
    data = write_collection(tmp_path / "tiny")
    found = plan.counted(str(data))
    lines = (data / "corpus.jsonl").read_text().splitlines()
    words = [len(json.loads(line)["text"].split()) for line in lines]
    assert (found.documents, found.queries) == (42, 10)
    assert found.document == round(1.4 * sum(words) / len(words)) + 1
    (data / "qrels" / "test.tsv").unlink()  # two collections are measured on the first
    with pytest.raises(ValueError, match="tiny has no test split"):
        plan.counted(f"{data}+{write_collection(tmp_path / 'other')}")
    given = ["--documents", "7", "--queries", "3", "--lengths", "5", "6", "9"]
    assert plan.main(["--base", "qwen3-0.6b", "--data", "no-such-data", *given]) == 0
    assert "7 documents and 3 queries, 5 tokens a query, 6 a document, 9 a pair" in (
        capsys.readouterr().out
    )
    for arguments, message in (
        (["--base", "no/base"], "base 'no/base': its shape is not known"),
        (["--data", "no-such-data"], "neither a collection nor a folder"),
        (["--documents", "0"], "expected at least 1 of each, got {'documents': 0}"),
        (["--price", "h100=x"], "price 'h100=x'"),
        (["--probe", "1"], "--probe is of one base"),
    ):
        assert plan.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_base_with_too_few_layers(tiny_base) -> None:
    with pytest.raises(ValueError, match="layers=16, but this base has 4"):
        plan.make_plan(str(tiny_base), "small", "stdlib", COUNTS, 1)


def test_the_probe_on_a_cpu(tiny_base, capsys) -> None:
    """A few real steps at the shape of a folder; the row of the machine is scaled by the ratios."""
    arguments = ["--base", str(tiny_base), "--scale", "smoke", "--data", "stdlib"]
    assert plan.main([*arguments, "--probe", "0.2", "--price", "here=0.5"]) == 0
    shown = capsys.readouterr().out
    [row] = re.findall(r"^\| .*, probed \|.*\|$", shown, re.MULTILINE)
    assert "| as it is |" in row and row.count("-") <= 1
    for what in ("a step", "an encoding batch"):
        [cells] = re.findall(rf"^\| {what} of .* tokens \(s\) \|(.*)\|$", shown, re.MULTILINE)
        predicted, probed, ratio = map(float, cells.split("|"))
        assert predicted >= 0 and probed > 0 and ratio > 0
    plan.main(arguments)
    assert "probed" not in capsys.readouterr().out.split("## ", 1)[1]


def test_the_probe_measures_what_it_predicts(tiny_base) -> None:
    """The ratio is of seconds at the same tokens, and of the batches that it says."""
    tiny = plan.make_plan(str(tiny_base), "smoke", "stdlib", costs.COLLECTIONS["stdlib"], 1)
    card = probe.card_here("cpu")
    assert card.flops > 1e9 and card.bandwidth > 1e8 and card.memory > 1e9
    option = costs.options(tiny.joint)[1]
    found = probe.run(tiny.shape, tiny.joint, tiny.counts, option, card, "cpu", 0.1)
    assert found["option"] == "checkpointing" and found["memory"] is None
    small = probe.part(tiny.joint, option, "cpu")
    assert (small.embedding_batch, small.reranking_batch) == (2, 1) and small.checkpointing
    tokens = sum(n for n, _ in costs.batches(small, tiny.counts).values())
    assert found["training"]["tokens"] == pytest.approx(tokens, abs=8)
    expected = costs.training(tiny.shape, small, tiny.counts, Option("", True))
    assert found["training"]["predicted"] == costs.duration(expected, card)
    for row in (found["training"], found["encoding"]):
        assert row["ratio"] == row["probed"] / row["predicted"]


def test_the_step_of_the_probe_trains(tiny_base) -> None:
    """Kernels and plain PyTorch give the same loss; a step changes all that is trained."""
    tiny = plan.make_plan(str(tiny_base), "smoke", "stdlib", costs.COLLECTIONS["stdlib"], 1)
    c = probe.part(tiny.joint, Option("", False), "cpu")
    c = replace(c, dtype="float32", router_noise=0.0, expert_dropout=0.0)
    losses, steps = [], []
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        step = probe.Step(tiny.shape, c, tiny.counts, "cpu", kernels)
        losses.append(step.loss().item())
        steps.append(step)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = steps[0]
    before = {name: p.detach().clone() for name, p in plain.parameters.items()}
    plain.step()
    assert [name for name, p in plain.parameters.items() if torch.equal(p, before[name])] == []
    for _ in range(20):
        plain.step()
    assert plain.loss().item() < losses[0]
    assert sum(p.numel() for p in before.values()) == costs.trained(tiny.shape, c)
    texts = plain.texts["embedding"]
    sizes = [texts.batch.lengths[i] for i in texts.back.tolist()]
    queries = tiny.counts.query * c.embedding_batch
    assert sum(sizes[: c.embedding_batch]) == pytest.approx(queries, abs=2)
