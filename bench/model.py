"""`make bench-model`: what the shapes say before anything is measured, for cards that need not be
here. `bench.roofline` is the model; `make bench` measures the same rows on a card."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import experiments
from analysis.figures import table
from bench import analyses, costs
from bench.roofline import (
    BANDWIDTH,
    BYTES,
    CARDS,
    DESIGNS,
    GEMM,
    LAUNCH,
    LENGTH,
    TOKENS,
    Card,
    Layer,
    Op,
    gemm,
    memory,
    operations_alone,
    ours,
    predict,
    seconds,
)
from bench.serving import RANKS
from bench.shapes import SHAPES
from model import bases
from model.files import write_text

RESULTS = Path(__file__).parent / "results"
TRIALS = Path(__file__).parent.parent / "results"  # published
SEEDS = experiments.EXPERIMENTS["kill_gate"].seeds
# A part of what the driver calls each of the cards.
DRIVER_NAMES = {"T4": r"\bT4\b", "A100 40 GB": r"\bA100\b.*\b40GB", "H100 SXM": r"\bH100 80GB HBM3"}
SHOWN = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "mistral-7b")


def is_card(card: Card, device: object) -> bool:
    """Whether a record's device is the card: an A100 of 80 GB is none of 40, a PCIe one no SXM."""
    return re.search(DRIVER_NAMES[card.name], str(device)) is not None


def measured(card: Card) -> dict[tuple[str, str, str], float]:
    """(shape, design, mode) -> tokens/s that `make bench` measured on such a card."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return {
        (row["shape"], row["design"], row["mode"]): row["rate"]["median"]
        for record in records
        if is_card(card, record.get("device"))
        for row in record.get("designs", [])
        if "rate" in row and row["tokens"] == TOKENS and row["lengths"] == "mixed"
    }


def kill_gate_measured(card: Card) -> float | None:
    """Minutes of the published kill gate at full scale, if all its trials ran on such a card."""
    folder = TRIALS / "kill_gate" / "full"
    paths = [folder / arm / f"seed{seed}.json" for arm in experiments.ARMS for seed in range(SEEDS)]
    trials = [json.loads(path.read_text()) for path in paths if path.exists()]
    base = folder / "baselines.json"  # the untrained base, whose evaluation the prediction has too
    trials += [json.loads(base.read_text())] if base.exists() else []
    if len(trials) <= len(paths) or not all(is_card(card, trial["device"]) for trial in trials):
        return None
    return sum(of["seconds"].get("train", 0) + of["seconds"]["test"] for of in trials) / 60


def predictions() -> list[dict]:
    """A row for each card, shape, design and mode."""
    rows = []
    for card in CARDS:
        found = measured(card)
        for name in SHOWN:
            for mode in ("forward", "train"):
                for design in DESIGNS:
                    if design == "base" and mode == "train":
                        continue
                    made = predict(SHAPES[name], design, card, mode == "train")
                    key = {"card": card.name, "shape": name, "design": design, "mode": mode}
                    real = found.get((name, design, mode))
                    rows.append(key | {"tokens": TOKENS} | made | {"measured": real})
    return rows


def render(rows: list[dict]) -> str:
    """The page, bench/results/model.md."""
    at = {(r["card"], r["shape"], r["design"], r["mode"]): r for r in rows}
    text = (
        "# Bytes and operations\n\n"
        f"By `make bench-model`. {TOKENS:,} tokens in texts of {LENGTH}, ranks 16 x 3 on seven "
        f"projections, 16 bit. Assumed: {GEMM:.0%} of the data sheet's FLOP/s and {BANDWIDTH:.0%} "
        f"of its bandwidth are attained, a launch takes the host {LAUNCH * 1e6:.0f} us. Designs as "
        "in `bench/designs.py`: base alone, loop over experts (unfused), addmm of concatenated "
        "experts (elementwise work fused), ours.\n\n## Forward\n\nTime over that of the base "
        "alone.\n\n"
    )
    cells = []
    for card in CARDS:
        for name in SHOWN:
            row = {d: at[card.name, name, d, "forward"] for d in DESIGNS}
            alone = row["base"]["seconds"]
            cells.append([f"{card.name}, {name}", f"{1000 * alone:,.1f}"]
                         + [f"{row[d]['seconds'] / alone:.2f}" for d in ("loop", "addmm", "ours")]
                         + [f"{operations_alone(SHAPES[name]):.2f}", f"{row['ours']['rate']:,.0f}",
                            f"{row['ours']['utilisation']:.0%}", _real(row["ours"])])  # fmt: skip
    head = ["card, shape", "base (ms)", "loop", "addmm", "ours", "operations alone",
            "ours (tokens/s)", "FLOP utilisation", "measured (tokens/s)"]  # fmt: skip
    text += table(head, cells) + "## Training step\n\nThroughput of ours over the others'.\n\n"
    cells = []
    for card in CARDS:
        for name in SHOWN:
            row = {d: at[card.name, name, d, "train"] for d in ("loop", "addmm", "ours")}
            mine = row["ours"]["seconds"]
            cells.append([f"{card.name}, {name}", f"{1000 * mine:,.1f}",
                          f"{row['addmm']['seconds'] / mine:.2f}",
                          f"{row['loop']['seconds'] / mine:.2f}", f"{row['ours']['rate']:,.0f}",
                          f"{row['ours']['utilisation']:.0%}", _real(row["ours"])])  # fmt: skip
    head = ["card, shape", "ours (ms)", "over addmm", "over loop", "ours (tokens/s)",
            "FLOP utilisation", "measured (tokens/s)"]  # fmt: skip
    text += table(head, cells) + _choices() + _memory() + analyses.section() + _kill_gate()
    return text.rstrip() + "\n"


def _real(row: dict) -> str:
    return "not measured" if row["measured"] is None else f"{row['measured']:,.0f}"


def _choices() -> str:
    """The design's small decisions, in microseconds of one layer on an A100."""
    card, cells = CARDS[1], []
    for name in SHOWN:
        layer = Layer(SHAPES[name], TOKENS, LENGTH, 48, 3)
        n, e = TOKENS, BYTES

        def us(*ops: Op) -> float:
            return 1e6 * sum(
                max(o.flops / GEMM / card.flops, o.bytes / BANDWIDTH / card.bandwidth) for o in ops
            )

        made = {op.name: op for op in ours(layer, True)}
        groups = [(k, len(outs), sum(outs)) for _, k, outs in layer.groups]
        shrink = us(*(made[f"{name}, shrink"] for name, _, _ in layer.groups))
        # One expert of three alone: x is read all the same.
        third = us(
            *(
                Op("", 2.0 * n * k * c * 16, made[f"{name}, shrink"].bytes - 4 * n * c * 16 * e)
                for (name, _, _), (k, c, _) in zip(layer.groups, groups, strict=True)
            )
        )
        copy = us(*(Op("", bytes=2 * n * out * e) for _, _, out in groups))
        second = us(
            *(Op("", 2.0 * n * 48 * c * k, e * (2 * n * k + n * 48 * c)) for k, c, _ in groups)
        )
        tight, wide = (
            us(*(gemm("", n, k + pad * min(c, 2), out) for k, c, out in groups)) for pad in (48, 64)
        )
        whole = 1e6 * seconds(ours(layer, True), card)
        cells.append([name, f"{whole:,.0f}", f"{shrink:,.0f}", f"{third:,.0f}", f"{copy:,.0f}",
                      f"{second:,.0f}", f"{wide - tight:,.0f}"])  # fmt: skip
    head = ["shape", "training step of a layer", "shrink, all experts", "shrink, one of three",
            "copying dY beside dS", "a second GEMM into dX", "columns padded to 64"]  # fmt: skip
    return (
        f"## Small decisions\n\nMicroseconds of one layer on an {card.name}.\n\n"
        + table(head, cells)
        + "An expert of weight 0 that is skipped saves at most the difference of the two "
        "shrinks, and nothing of dA and dB, which read x and dY whole for the others: so nothing "
        "is skipped. A gradient that arrives beside its spare columns spares both of the next "
        "two. Ranks of 16 x 3 fill 48 columns without padding, and padding them to 64 costs the "
        "last column.\n\n"
    )


def _memory() -> str:
    cells = []
    for name, shape in SHAPES.items():
        m = memory(shape)
        fits = [
            next((side for side in ("two", "one") if m[side] < 0.85 * card.memory), "none")
            for card in CARDS[:2]
        ]
        cells.append(
            [name, f"{m['two'] / 1e9:.2f}", f"{m['one'] / 1e9:.2f}", f"{m['saved']:.1%}", *fits]
        )
    head = ["shape", "two models (GB)", "one UniMoER (GB)", "saved", "fits a T4 (16 GB)",
            "fits an A100 (40 GB)"]  # fmt: skip
    return (
        f"## Memory\n\nWeights in 16 bit, ranks {', '.join(map(str, RANKS))}, no fp32 masters. "
        "15 % of a card is left for activations. The saving is the shared base: hard switching "
        "between adapters saves as much.\n\n" + table(head, cells)
    )


def _kill_gate() -> str:
    shape, counts = SHAPES[bases.DEFAULT], costs.COLLECTIONS["stdlib"]
    configs = costs.arms("full", bases.DEFAULT, "stdlib")
    c, cells = configs["joint-moe"], []
    for card in CARDS:
        option, _ = costs.fitting(shape, c, counts, card.memory)
        assert option is not None, card
        works = costs.kill_gate(shape, configs, counts, option, SEEDS)
        minutes = [costs.duration(work, card) / 60 for work in works.values()]
        real = kill_gate_measured(card)
        cells.append([card.name, option.name, *(f"{m:.1f}" for m in (*minutes, sum(minutes))),
                      "not measured" if real is None else f"{real:.1f}"])  # fmt: skip
    head = ["card", "fits", "training (min)", "retrieval (min)", "reranking (min)", "total (min)",
            "measured (min)"]  # fmt: skip
    return (
        "## The kill gate at full scale\n\nsmollm2-135m, all 30 layers adapted, four arms, three "
        f"seeds, {c.steps} steps of {c.embedding_batch} queries and {c.reranking_batch} groups of "
        f"{c.group_size}, the stdlib collection, as `make plan DATA=stdlib` has it. Without "
        "loading, BM25 and the host's Python.\n\n" + table(head, cells)
    )


def main() -> None:
    rows = predictions()
    text = render(rows)
    print(text)
    record = {"cards": [asdict(card) for card in CARDS], "predictions": rows}
    write_text(RESULTS / "model.json", json.dumps(record, indent=1) + "\n")
    write_text(RESULTS / "model.md", text)


if __name__ == "__main__":
    main()
