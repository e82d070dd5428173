"""What the kill gate computes, moves and keeps, counted before it is run.

The arms and seeds of `experiments.py`, the batches of `scales.py`, a base's shape and the size of a
collection give tokens; `bench.roofline` gives the operations and bytes of a layer for them.
"""

from dataclasses import dataclass, replace

import experiments
from bench.roofline import BYTES, Card, Layer, Op
from bench.roofline import base as base_ops
from bench.roofline import ours as our_ops
from bench.roofline import seconds as layer_seconds
from bench.shapes import lora_parameters
from kernels.moe_lora import make_layout
from model.config import DecoderConfig
from model.router import NOT_LEARNED
from model.texts import CARD_BUDGET
from trials import Config

Parts = list[tuple[float, list[Op]]]  # how many times, and the ops of one layer or of one step

# Bytes that clipping, AdamW and the copy into M move for a trained value: the gradient is read
# three times and written once, weight and two moments are read and written, and so is the copy.
UPDATE = 4 * 4 + 3 * 2 * 4 + 4 + BYTES
UPDATES = 20  # launches of it, over lists of tensors
# Bytes of a trained value: master and gradient, and while there is an optimizer two moments and
# the denominator
MASTERS, ADAM = 2 * 4, 3 * 4


@dataclass(frozen=True)
class Counts:
    """The size of a collection.

    documents: that are searched. queries: that are measured. query, document, pair: mean tokens of
    such texts, templates and end tokens included. source: where the numbers come from.
    """

    documents: int
    queries: int
    query: int
    document: int
    pair: int
    source: str


COLLECTIONS = {
    "stdlib": Counts(
        1731, 1657, 13, 96, 120,
        "the test split of Python's standard library, counted with the default base's tokenizer",
    ),
    # Words of BEIR's table times the tokens of a word on 1,500 passages and 2,330 queries of MS
    # MARCO with the default base's tokenizer, 1.40 and 1.22; then template and end token.
    "msmarco": Counts(
        8_841_823, 6_980, 10, 80, 92,
        "passages and queries of MS MARCO dev.small, as published (arXiv 2104.08663, table 1). "
        "Assumed: 80 tokens a passage and 7 a query, from that table's 55.98 and 5.96 words and "
        "the tokens of a word in a sample",
    ),
}  # fmt: skip


MARGIN = 0.85  # of a card's memory; the rest is for the allocator and batches above the mean


@dataclass(frozen=True)
class Option:
    """How a step is made to fit a card.

    checkpointing: each layer runs again in the backward pass. chunks: a batch goes through in as
    many parts, one after the other; the vectors of all are made first, without gradients
    (GradCache, arXiv 2101.06983), which costs one more forward pass of the embedding batch.
    """

    name: str
    checkpointing: bool
    chunks: int = 1


def options(c: Config) -> list[Option]:
    """From the fastest to the smallest."""
    chunked = [Option(f"checkpointing, {n} chunks", True, n) for n in (2, 4, 8, 16, 32)]
    return [Option("as it is", c.checkpointing), Option("checkpointing", True), *chunked]


def cut(counts: Counts, c: Config) -> Counts:
    """Means are never above what a document is cut to, its end token beside it."""
    document = min(counts.document, c.document_tokens + 1)
    return replace(counts, document=document, pair=counts.pair - counts.document + document)


def depth(shape: DecoderConfig, c: Config) -> tuple[int, int]:
    """Layers with experts, and the frozen ones below them."""
    return (c.layers or shape.num_hidden_layers) - c.adapter_layers, c.adapter_layers


def batches(c: Config, counts: Counts) -> dict[str, tuple[int, int]]:
    """task -> tokens of a micro-batch, and of one of its texts (most of them)."""
    texts = c.embedding_batch * (counts.query + (1 + c.hard_negatives) * counts.document)
    pairs = c.reranking_batch * c.group_size * counts.pair
    made = {"embedding": (texts, counts.document), "reranking": (pairs, counts.pair)}
    return {task: made[task] for task in c.tasks}


def _layer(shape: DecoderConfig, c: Config, tokens: float, length: int) -> Layer:
    return Layer(shape, max(1, round(tokens)), length, sum(c.ranks), len(c.ranks))


def _adapted(layer: Layer, c: Config, train: bool) -> list[Op]:
    """`roofline.ours`, without a router where the arm has none."""
    ops = our_ops(layer, train)
    return ops if c.router else [op for op in ops if not op.name.startswith(("pooled", "route"))]


def forward(shape: DecoderConfig, c: Config, tokens: int, length: int, bare: bool = False) -> Parts:
    """A pass over texts without gradients, in batches of `CARD_BUDGET` tokens.

    bare: the base alone. Where the states below the experts are kept, those layers are not in it:
    see `prefix`.
    """
    batch = min(tokens, CARD_BUDGET)
    layer, (adapted, frozen) = _layer(shape, c, batch, length), depth(shape, c)
    upper = base_ops(layer, False) if bare else _adapted(layer, c, False)
    parts = [(tokens / batch * adapted, upper)]
    if frozen and not c.prefix:
        parts.append((tokens / batch * frozen, base_ops(layer, False)))
    return parts


def training(shape: DecoderConfig, c: Config, counts: Counts, option: Option) -> Parts:
    """All steps of a trial: forward and backward of its tasks' batches, and the update."""
    adapted, frozen = depth(shape, c)
    parts: Parts = []
    for task, (tokens, length) in batches(c, counts).items():
        layer = _layer(shape, c, tokens / option.chunks, length)
        twice = option.chunks > 1 and task == "embedding"
        again = option.checkpointing + twice
        ops = _adapted(layer, c, True) + again * _adapted(layer, c, False)
        passes = c.steps * option.chunks
        parts.append((passes * adapted, ops))
        if frozen and not c.prefix:
            parts.append((passes * frozen * (1 + twice), base_ops(layer, False)))
    update = Op("update", bytes=UPDATE * trained(shape, c), launches=UPDATES)
    return [*parts, (c.steps, [update])]


def measured(c: Config, counts: Counts) -> dict[str, tuple[int, int]]:
    """task -> tokens of what a trained model is measured on at most, and of one of its texts: pairs
    of queries without a relevant candidate are not scored (`EvaluationSet`), which is not known
    beforehand."""
    queries = min(c.reranking_queries or counts.queries, counts.queries)
    texts = counts.documents * counts.document + counts.queries * counts.query
    pairs = queries * min(c.candidates, counts.documents) * counts.pair
    return {"embedding": (texts, counts.document), "reranking": (pairs, counts.pair)}


def prefix(shape: DecoderConfig, c: Config, counts: Counts) -> Parts:
    """The frozen layers below the experts, once for all trials, where their states are kept."""
    _, frozen = depth(shape, c)
    if not (frozen and c.prefix):
        return []
    every = [(c.steps * tokens, length) for tokens, length in batches(c, counts).values()]
    every += measured(c, counts).values()
    return [
        (tokens / CARD_BUDGET * frozen, base_ops(_layer(shape, c, CARD_BUDGET, length), False))
        for tokens, length in every
    ]


def arms(scale: str, base: str, data: str) -> dict[str, Config]:
    """The Config of each arm of the kill gate."""
    names = experiments.arms("kill_gate", scale=scale)
    return {
        arm: experiments.config("kill_gate", arm, scale, 0, base=base, data=data) for arm in names
    }


def kill_gate(
    shape: DecoderConfig, configs: dict[str, Config], counts: Counts, option: Option, seeds: int
) -> dict[str, Parts]:
    """What all trials and the untrained base compute, by what it is for.

    Returns:
        training; retrieval and reranking, in which the trained models and the untrained base are
        measured.
    """
    found: dict[str, Parts] = {"training": [], "retrieval": [], "reranking": []}
    joint = configs["joint-moe"]
    texts = measured(joint, counts)
    names = {"embedding": "retrieval", "reranking": "reranking"}
    for c in configs.values():
        found["training"] += _times(seeds, training(shape, c, counts, option))
        for task in c.scored or c.tasks:
            found[names[task]] += _times(seeds, forward(shape, c, *texts[task]))
    for task, (tokens, length) in texts.items():
        found[names[task]] += forward(shape, joint, tokens, length, bare=True)
    found["training"] += prefix(shape, joint, counts)
    return found


def _times(count: int, parts: Parts) -> Parts:
    return [(count * times, ops) for times, ops in parts]


def flops(parts: Parts) -> float:
    return sum(times * sum(op.flops for op in ops) for times, ops in parts)


def moved(parts: Parts) -> float:
    """Bytes."""
    return sum(times * sum(op.bytes for op in ops) for times, ops in parts)


def duration(parts: Parts, card: Card) -> float:
    """Seconds: every op the longer of its operations and its bytes, or the host's launches."""
    return sum(times * layer_seconds(ops, card) for times, ops in parts)


# Memory ------------------------------------------------------------------------------------------


def trained(shape: DecoderConfig, c: Config) -> int:
    """Values that an optimizer steps: experts, routers, head."""
    adapted, _ = depth(shape, c)
    d, hidden = shape.hidden_size, c.router_hidden
    experts = sum(c.ranks) * lora_parameters(shape) // shape.num_hidden_layers
    router = 0
    if c.router and c.router not in NOT_LEARNED:
        routed = len(c.experts) - bool(c.always_on)
        router = (d + 1) * hidden + (hidden + 1) * routed + (c.router == "sparsegen")
    return adapted * (experts + router) + d + 1


def weight_bytes(shape: DecoderConfig, c: Config) -> int:
    """Of the base without an output matrix of its own, its linears bordered by the experts."""
    d, (adapted, frozen) = shape.hidden_size, depth(shape, c)

    def bordered(rank: int) -> int:
        layouts = (
            make_layout(k, list(outs), [rank > 0] * len(outs), rank)
            for _, k, outs in _layer(shape, c, 1, 1).groups
        )
        return sum(rows * columns for rows, columns in (layout.shape for layout in layouts))

    norms = 2 * d + (2 * shape.head_dim if shape.model_type == "qwen3" else 0)
    layers = adapted * bordered(sum(c.ranks)) + frozen * bordered(0) + (adapted + frozen) * norms
    return BYTES * (shape.vocab_size * d + layers + d)


def _padded(c: Config) -> int:
    return -(-sum(c.ranks) // 16) * 16


def kept_per_token(shape: DecoderConfig, c: Config) -> int:
    """Bytes that autograd keeps of one token in one layer with experts, on the kernels' path.

    In 16 bit: two residual streams, what each group of linears reads with its spare columns, the
    experts' S, the outputs of qkv and gate_up, the turned q and k, and what attention returns; in
    fp32 two norms' factors and attention's log-sum.
    """
    layer, p = _layer(shape, c, 1, 1), _padded(c)
    d, f, q, kv = shape.hidden_size, shape.intermediate_size, layer.q, layer.kv
    read = (d + 3 * p) + (q + p) + (d + 2 * p) + (f + p)
    written = (q + 2 * kv + 3 * p) + (2 * f + 2 * p)
    inside = 7 * p + (q + kv) + q
    return BYTES * (2 * d + read + written + inside) + 4 * (2 + shape.num_attention_heads)


def memory(
    shape: DecoderConfig, c: Config, counts: Counts, option: Option, cards: int = 1
) -> dict[str, float]:
    """Bytes on each card by what they are for; a batch is split evenly over `cards`.

    A joint step keeps the graphs of both tasks, in chunks that of one chunk. Backward and
    evaluation need a few tensors of a layer beside what is kept.
    """
    adapted, _ = depth(shape, c)
    d, f, p = shape.hidden_size, shape.intermediate_size, _padded(c)
    tokens = [tokens / cards for tokens, _ in batches(c, counts).values()]
    largest = max(tokens) / option.chunks
    alive = sum(tokens) if option.chunks == 1 else largest
    kept, beside = kept_per_token(shape, c), 3 * BYTES * (f + d + p)
    if option.checkpointing:  # x and delta of each layer, and the layer that runs again
        graph = alive * BYTES * (2 * d + p) * adapted + largest * kept
    else:
        graph = alive * kept * adapted
    return {
        "weights, 16 bit, with experts": weight_bytes(shape, c),
        "experts' masters and gradients": MASTERS * trained(shape, c),
        "Adam's states": ADAM * trained(shape, c),
        "kept for the backward pass": graph,
        "gradients of a layer": largest * beside,
        "a batch of the evaluation": CARD_BUDGET * beside,
    }


def needed(parts: dict[str, float]) -> float:
    """The larger of what training and evaluation need at once; the optimizer is gone by then."""
    weights, masters, adam, graph, gradients, evaluation = parts.values()
    return weights + masters + max(adam + graph + gradients, evaluation)


def fitting(
    shape: DecoderConfig, c: Config, counts: Counts, memory_of_card: float, cards: int = 1
) -> tuple[Option | None, float]:
    """The fastest way in which an arm fits cards of so many bytes, and the bytes that it needs;
    None and the smallest need if there is none."""
    needs = {option: needed(memory(shape, c, counts, option, cards)) for option in options(c)}
    within = MARGIN * memory_of_card
    found = next((option for option, need in needs.items() if need <= within), None)
    return found, min(needs.values()) if found is None else needs[found]
