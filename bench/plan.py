"""`make plan`: what the kill gate takes before it is run: hours, memory and dollars on five cards.

`bench.costs` counts, `bench.roofline` says how fast a card is taken to be, and `bench.probe` holds
both against a minute of the real step on the card at hand, by which the estimate for it is scaled.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import experiments
from analysis.figures import table
from bench import costs, probe
from bench.costs import COLLECTIONS, MARGIN, Counts, Option
from bench.model import RESULTS
from bench.roofline import BANDWIDTH, CARDS, GEMM, LAUNCH, Card
from bench.shapes import parameters, shape_of
from eval import hub
from eval.collections import KEPT_FROM, load, require_split
from eval.protocol import SCORES, WINDOW
from model import bases
from model.config import DecoderConfig
from model.files import write_text
from scales import SCALES
from train.trial import repeatable
from trials import WIDTHS, Config, parts

SCALE, DATA = "full", "msmarco"  # what bench/results/plan.md is about
LINK = 300e9  # bytes/s of gradients between two cards, each way (NVLink of an A100), assumed
TOKEN, STORED_TOKEN = 40, 4  # bytes of a token id in a list (a pointer and an int), and on disk
# Bytes of BM25's index a document of 56 words, at its peak, on disk, and of a process that maps it:
# the growth from 100,000 to 300,000 made-up texts, which `make bench` measures (bench/index.py).
BM25_PEAK, BM25_KEPT, BM25_OWN = 2690, 440, 370
WORD, SAMPLE = 1.4, 1000  # tokens of a word, and texts counted, where COLLECTIONS says nothing
HERE = "here"  # the price's key of the machine that is probed


@dataclass(frozen=True)
class Offer:
    """One card, or `count` of them that share each batch. key: names it for PRICES."""

    key: str
    card: Card
    count: int = 1

    @property
    def name(self) -> str:
        return self.card.name if self.count == 1 else f"{self.count} x {self.card.name}"


T4, A100, H100 = CARDS
OFFERS = (
    Offer("t4", T4),
    Offer("4090", Card("RTX 4090 24 GB", 165e12, 1008e9, 24e9)),
    Offer("a100", A100),
    Offer("a100x2", Card("A100 80 GB", 312e12, 2039e9, 80e9), count=2),
    Offer("h100", H100),
)
# Dollars an hour, of both cards where there are two. Nobody's offer: round numbers between the
# market places and the large clouds, on demand, end of 2026.
PRICES = {"t4": 0.35, "4090": 0.5, "a100": 1.3, "a100x2": 3.6, "h100": 3.0}


@dataclass(frozen=True)
class Plan:
    """What is estimated: a base at a scale on a collection, all arms and seeds of the kill gate."""

    base: str
    shape: DecoderConfig
    configs: dict[str, Config]
    counts: Counts
    seeds: int

    @property
    def name(self) -> str:
        return Path(self.base).name

    @property
    def joint(self) -> Config:
        """The arm that needs most."""
        return self.configs["joint-moe"]


def make_plan(base: str, scale: str, data: str, counts: Counts, seeds: int) -> Plan:
    """Raises ValueError for a base whose shape is not known, or with too few layers."""
    shape, configs = shape_of(base), costs.arms(scale, base, data)
    joint = configs["joint-moe"]
    if joint.layers is not None:
        shape.first(joint.layers, base)
    return Plan(base, shape, configs, costs.cut(counts, joint), seeds)


def estimate(plan: Plan, offer: Offer, ratios: dict[str, float] | None = None) -> dict:
    """How it fits a card, and how long all trials take.

    Args:
        ratios: probed over predicted time of training and encoding, where there was a probe.
    Returns:
        option: the first that fits, None if none does. bytes: what that one needs, or the smallest
        one. seconds: of training, retrieval and reranking; {} where nothing fits.
    """
    shape, counts, found = plan.shape, plan.counts, {}
    option, need = costs.fitting(shape, plan.joint, counts, offer.card.memory, offer.count)
    if option is None:
        return {"option": None, "bytes": need, "seconds": {}}
    for what, work in costs.kill_gate(shape, plan.configs, counts, option, plan.seeds).items():
        ratio = (ratios or {}).get("training" if what == "training" else "encoding", 1.0)
        found[what] = ratio * costs.duration(work, offer.card) / offer.count
    if offer.count > 1:  # a ring of fp32 gradients after each step
        share = 2 * (offer.count - 1) / offer.count
        sent = sum(4 * c.steps * costs.trained(shape, c) for c in plan.configs.values())
        found["training"] += plan.seeds * share * sent / LINK
    return {"option": option, "bytes": need, "seconds": found}


def _row(
    plan: Plan, offer: Offer, price: float | None, ratios: dict[str, float] | None = None
) -> list[str]:
    found = estimate(plan, offer, ratios)
    name = f"{offer.name}, probed" if ratios else offer.name
    memory = f"{found['bytes'] / 1e9:.1f}"
    if found["option"] is None:
        return [name, "no", memory, *["-"] * 5]
    hours = [seconds / 3600 for seconds in found["seconds"].values()]
    shown = [_short(h) for h in (*hours, sum(hours))]
    dollars = "-" if price is None else _short(sum(hours) * price)
    return [name, found["option"].name, memory, *shown, dollars]


def _short(value: float) -> str:
    """Two digits at least, as an estimate has."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def section(plan: Plan, prices: dict[str, float], probed: dict | None = None) -> str:
    """The table of one base; with a probe a row of the machine at hand, and what the probe said."""
    rows, below = [_row(plan, offer, prices[offer.key]) for offer in OFFERS], ""
    if probed is not None:
        ratios = {what: probed[what]["ratio"] for what in ("training", "encoding")}
        rows.append(_row(plan, Offer(HERE, probed["card"]), prices.get(HERE), ratios))
        below = _probe(probed)
    head = ["card", "fits", "memory (GB)", "training (h)", "retrieval (h)", "reranking (h)",
            "total (h)", "cost ($)"]  # fmt: skip
    return f"## {plan.name}\n\n{table(head, rows)}{below}"


def _probe(probed: dict) -> str:
    cells = []
    for what, title in (("training", "a step"), ("encoding", "an encoding batch")):
        row = probed[what]
        cells.append([f"{title} of {row['tokens']:,} tokens (s)", f"{row['predicted']:.3f}",
                      f"{row['probed']:.3f}", f"{row['ratio']:.2f}"])  # fmt: skip
    if row := probed["memory"]:
        ratio = row["probed"] / row["predicted"]
        cells.append(["memory at its peak (GB)", f"{row['predicted'] / 1e9:.2f}",
                      f"{row['probed'] / 1e9:.2f}", f"{ratio:.2f}"])  # fmt: skip
    card: Card = probed["card"]
    return (
        f"Probe on {card.name}: random weights in {probed['dtype']}, {probed['option']}. Its peaks "
        f"are taken from a GEMM and a copy ({card.flops / 1e12:.2f} TFLOP/s, "
        f"{card.bandwidth / 1e9:.0f} GB/s); the row above is scaled by the ratios.\n\n"
        + table(["probe", "predicted", "probed", "probed / predicted"], cells)
    )


def operations(plans: list[Plan]) -> str:
    """Of all trials at once, without recomputation."""
    cells = []
    for plan in plans:
        shape, counts, plain = plan.shape, plan.counts, Option("", False)
        row = [plan.name, f"{parameters(shape) / 1e6:,.0f}",
               f"{costs.trained(shape, plan.joint) / 1e6:.1f}"]  # fmt: skip
        for work in costs.kill_gate(shape, plan.configs, counts, plain, plan.seeds).values():
            row += [f"{costs.flops(work) / 1e15:,.1f}", f"{costs.moved(work) / 1e12:,.1f}"]
        search = 2.0 * counts.queries * counts.documents * shape.hidden_size
        cells.append([*row, f"{search / 1e12:,.1f}"])
    head = ["base", "parameters (M)", "trained in Joint-MoE (M)"]
    for what in ("training", "retrieval", "reranking"):
        head += [f"{what} (PFLOP)", f"{what} (TB)"]
    head.append("one exact search (TFLOP)")
    return "## Operations and bytes\n\nOf all trials together.\n\n" + table(head, cells)


def memories(plans: list[Plan]) -> str:
    """Of the arm that needs most, on one card."""
    columns = []
    for plan in plans:
        shape, joint, counts = plan.shape, plan.joint, plan.counts
        first, checkpointing, *_ = costs.options(joint)
        column = costs.memory(shape, joint, counts, first)
        less = costs.memory(shape, joint, counts, checkpointing)
        column["at its peak"] = costs.needed(column)
        column["kept, with checkpointing"] = less["kept for the backward pass"]
        column["at its peak, with checkpointing"] = costs.needed(less)
        columns.append(column)
    cells = [[what, *(f"{column[what] / 1e9:,.2f}" for column in columns)] for what in columns[0]]
    text = "Of Joint-MoE on one card.\n\n"
    return "## Memory\n\n" + text + table(["GB", *(plan.name for plan in plans)], cells)


def render(
    plans: list[Plan], title: str, prices: dict[str, float], probed: dict | None = None
) -> str:
    """The page: what is assumed, a table for each base, the counts behind it, what is left out."""
    plan = plans[0]
    c, counts, trials = plan.joint, plan.counts, plan.configs.values()
    rankings = plan.seeds * sum("embedding" in arm.tasks for arm in trials) + 1
    step = " and ".join(f"{n:,} ({task})" for task, (n, _) in costs.batches(c, counts).items())
    taken = " ".join(f"{key}={price:g}" for key, price in prices.items())
    top = (
        f"# What the kill gate takes: {title}\n\n"
        f"By `make plan`. {counts.documents:,} documents and {counts.queries:,} queries, "
        f"{counts.query} tokens a query, {counts.document} a document, {counts.pair} a pair on the "
        f"mean: {counts.source}. {len(plan.configs)} arms, {plan.seeds} seeds, {c.steps} steps of "
        f"{step} tokens. The documents are encoded {rankings} times, for every trained model that "
        f"retrieves and for the untrained base; {c.candidates} candidates a query are reranked.\n\n"
        "**Predicted, not measured**, but for rows that say probed. Assumed: a card attains "
        f"{GEMM:.0%} of its data sheet's dense 16-bit FLOP/s and {BANDWIDTH:.0%} of its bandwidth, "
        f"and lends {MARGIN:.0%} of its memory; a launch takes the host {LAUNCH * 1e6:.0f} us; two "
        "cards halve each batch. It fits as it is, or with `--set checkpointing=true`, or with its "
        "batches in chunks besides (GradCache); where none is enough, `no` and the smallest need. "
        "Dollars an hour are assumed too, `PRICES` in `bench/plan.py` says how: "
        f'`PRICE="{taken}"`.\n\n'
    )
    window, widest = min(WINDOW, counts.documents), max(p.shape.hidden_size for p in plans)
    ids, vectors = TOKEN * window * counts.document, 4 * window * widest
    by_window = counts.documents > WINDOW  # searched where the model is
    scores = 16 * min(SCORES, window * counts.queries)  # fp32, their bits, the keys
    held = ids + vectors + (0 if by_window else scores)
    what = "token ids and vectors" if by_window else "token ids, vectors and scores"
    texts = c.embedding_batch * (counts.query + (1 + c.hard_negatives) * counts.document)
    trained = STORED_TOKEN * c.steps * (texts + c.reranking_batch * c.group_size * counts.pair)
    peak, kept, own = (n * counts.documents / 1e9 for n in (BM25_PEAK, BM25_KEPT, BM25_OWN))
    then = f", once, then {kept:,.1f} GB on disk, mapped, and {own:,.1f} GB of each process's own"
    left = (
        "## Not in it\n\n"
        "- Loading, tokenization, BM25 (its index, the candidates and negatives) and disk.\n"
        f"- The exact search, {'on the card' if by_window else 'on the host'}: the last column of "
        f"the operations for each of the {rankings} rankings.\n"
        f"- The host's memory. The documents are encoded and searched in windows of {window:,}: at "
        f"most {held / 1e9:,.2f} GB of {what} in each process, so twice on two cards. Token ids of "
        "what is trained on lie on disk "
        f"({trained / 1e9:,.2f} GB). "
        f"BM25's index: about {peak:,.1f} GB while it is made"
        f"{then if counts.documents > KEPT_FROM else ', in each process'}.\n"
        "- Batches above the mean, attention over texts of unequal length, a card that is slower "
        "when hot, other work on the machine.\n"
        "- A T4 multiplies fp16 alone (`dtype=auto` takes it there) and pads in attention.\n"
    )
    sections = "".join(section(plan, prices, probed) for plan in plans)
    return top + sections + operations(plans) + memories(plans) + left


def counted(data: str) -> Counts:
    """Of a collection that is not in COLLECTIONS: what the kill gate measures of it is read, and
    words are counted for tokens.

    Raises:
        ValueError: what `eval.collections.load` raises; there is no such split.
    """
    data = parts(data)[0]
    collection, split = load(data, bases.cache_folder() / "data"), hub.own_split(data)
    queries, pool = list(require_split(collection, split)), collection.pools[split]

    def mean(ids: Sequence[str], texts: Mapping[str, str]) -> float:
        some = ids[:: max(1, len(ids) // SAMPLE)]
        return WORD * sum(len(texts[i].split()) for i in some) / len(some)

    query, document = mean(queries, collection.queries), mean(pool, collection.corpus)
    # The templates' tokens ("Query: ", "\nDocument: ") and the end token
    lengths = (round(query) + 3, round(document) + 1, round(query + document) + 6)
    source = f"counted in {collection.name}, {WORD} tokens a word"
    return Counts(len(pool), len(queries), *lengths, source)


def priced(given: list[str]) -> dict[str, float]:
    """PRICES with those of `KEY=DOLLARS` in their place.

    Raises:
        ValueError: an unknown key, or what is no price.
    """
    prices, keys = dict(PRICES), (*PRICES, HERE)
    for text in given:
        key, _, price = text.partition("=")
        if key not in keys or not re.fullmatch(r"\d+(\.\d+)?", price):
            raise ValueError(f"price {text!r}: expected KEY=DOLLARS, KEY one of {', '.join(keys)}")
        prices[key] = float(price)
    return prices


def probe_here(plan: Plan, seconds: float) -> dict:
    """`bench.probe` on the machine at hand, as its step fits there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        repeatable()  # as a run has it, and before the card is first used
    card = probe.card_here(device)
    option = estimate(plan, Offer(HERE, card))["option"]
    if option is None:
        raise ValueError(f"{plan.base} does not fit {card.name}, so there is nothing to probe")
    try:
        return probe.run(plan.shape, plan.joint, plan.counts, option, card, device, seconds)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{plan.base} ({option.name}) was predicted to fit {card.name} and does not: {error}; "
            "estimate without a probe (--probe 0)"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--base", default="", help="hub id or folder; none: all of the study")
    parser.add_argument("--scale", choices=list(SCALES), default=SCALE)
    parser.add_argument("--data", default=DATA, help="stdlib, msmarco, a BEIR name or folder")
    parser.add_argument("--documents", type=int, help="how many, whatever DATA has")
    parser.add_argument("--queries", type=int, help="how many, whatever DATA has")
    lengths = ("QUERY", "DOCUMENT", "PAIR")
    parser.add_argument("--lengths", type=int, nargs=3, metavar=lengths, help="mean tokens of each")
    parser.add_argument("--seeds", type=int, default=0, help="how many; 0: the kill gate's own")
    parser.add_argument("--price", nargs="*", default=[], metavar="KEY=DOLLARS", help="an hour")
    parser.add_argument(
        "--probe", type=float, help="seconds, 0 for none; if not given, 60 on a card with --base"
    )
    given = parser.parse_args(arguments)
    own = {"documents": given.documents, "queries": given.queries}
    own |= dict(zip(("query", "document", "pair"), given.lengths or (), strict=False))
    own = {name: value for name, value in own.items() if value is not None}
    seconds = given.probe
    if seconds is None:
        seconds = 60.0 if given.base and torch.cuda.is_available() else 0.0
    try:
        if seconds and not given.base:
            raise ValueError("--probe is of one base: name it with --base")
        if odd := {name: value for name, value in own.items() if value < 1}:
            raise ValueError(f"expected at least 1 of each, got {odd}")
        if given.seeds < 0 or seconds < 0:
            raise ValueError(f"--seeds {given.seeds}, --probe {seconds:g}: expected 0 or more")
        prices = priced(given.price)
        if len(own) == 5:  # nothing of DATA is used
            counts = Counts(**own, source="as given")
        else:
            counts = COLLECTIONS.get(parts(given.data)[0]) or counted(given.data)
            counts = replace(counts, **own)
        seeds = given.seeds or experiments.seeds("kill_gate", given.scale)
        chosen = [given.base] if given.base else list(WIDTHS)
        plans = [make_plan(base, given.scale, given.data, counts, seeds) for base in chosen]
        probed = probe_here(plans[0], seconds) if seconds else None
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    title = f"`SCALE={given.scale} DATA={given.data}`"
    text = render(plans, title, prices, probed)
    print(text, end="")
    if given == parser.parse_args([]):  # the question of the page that is kept
        write_text(RESULTS / "plan.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
