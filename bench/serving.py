"""The practical claim: two models, an embedder and a reranker, against one UniMoER.

Both sides run the same kernels on random weights of a real shape. What differs is what is resident:
two whole bases, or one base with three experts and routers (ranks 32, 32 and 64, the fp32 masters
dropped). A request encodes a query, searches an index of vectors exactly and reranks the best
candidates.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import timing
from bench.designs import Ours, lengths, randomise, resident
from bench.shapes import SHAPES
from model.config import DecoderConfig
from model.heads import run_pooled
from model.packed import Packed, pack
from model.transformer import Decoder

RANKS = (32, 32, 64)
INDEX = 100_000  # documents
CANDIDATES = 100
QUERY, PAIR, DOCUMENT = 16, 144, 128  # tokens


def _batch(sizes: Sequence[int], device: str) -> Packed:
    return pack([[1 + i % 99 for i in range(n)] for n in sizes], device)


class Side:
    """One side of the comparison: who embeds, who scores."""

    def __init__(self, embedder: Decoder, reranker: Decoder, head: nn.Linear):
        self.embedder, self.reranker, self.head = embedder, reranker, head
        self.models = nn.ModuleList(dict.fromkeys((embedder, reranker)))

    def encode(self, batch: Packed) -> Tensor:
        return F.normalize(self._pooled(self.embedder, batch, 0), dim=-1)

    def score(self, batch: Packed) -> Tensor:
        return self.head(self._pooled(self.reranker, batch, 1))

    @staticmethod
    def _pooled(decoder: Decoder, batch: Packed, task: int) -> Tensor:
        tasks = torch.full((len(batch.lengths),), task, device=batch.last.device)
        return run_pooled(lambda only: decoder(batch, tasks, only=only), batch, "last")[0]


def sides(
    shape: DecoderConfig, device: str, dtype: torch.dtype, fused: bool
) -> dict[str, Callable[[], Side]]:
    """two: a base for each task. one: UniMoER."""

    def model(ranks: Sequence[int] | None) -> Decoder:
        made = Ours(shape, ranks, device, dtype, fused).eval()
        randomise(made)
        made.decoder.drop_masters()
        return made.decoder

    def head() -> nn.Linear:
        return nn.Linear(shape.hidden_size, 1, device=device)

    def one() -> Side:
        both = model(RANKS)
        return Side(both, both, head())

    return {"two": lambda: Side(model(None), model(None), head()), "one": one}


@torch.no_grad()
def measure(
    shape_name: str,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    shape: DecoderConfig | None = None,
    index: int = INDEX,
    tokens: int = 16384,
    reranked: int = CANDIDATES,
) -> list[dict]:
    """One row: bytes, rates and latency of both sides, and their ratios, from one run in which they
    take turns. Where memory does not hold both at a time, a row for each, without ratios: what fits
    is measured, what does not says so. fused kernels on a card, the PyTorch path on a CPU."""
    shape = shape or SHAPES[shape_name]
    makers = sides(shape, device, dtype, device != "cpu")
    documents = _batch(lengths(tokens, DOCUMENT, mixed=True), device)
    pairs = _batch([PAIR] * (tokens // PAIR), device)
    query, candidates = _batch([QUERY], device), _batch([PAIR] * reranked, device)
    vectors = torch.randn(index, shape.hidden_size, device=device, dtype=dtype)

    def request(side: Side) -> Tensor:
        scores = side.encode(query).to(dtype) @ vectors.t()
        scores.topk(min(reranked, index))
        return side.score(candidates).argsort(0, descending=True)

    work = {
        "encode": (lambda side: side.encode(documents), float(sum(documents.lengths))),
        "rerank": (lambda side: side.score(pairs), float(len(pairs.lengths))),
        "request": (request, 1.0),
    }
    about: dict = {"shape": shape_name, "dtype": str(dtype)[6:], "ranks": list(RANKS)}
    about |= {"index": index, "reranked": reranked, "rounds": rounds}

    def row(*names: str) -> dict:
        try:
            made = {name: makers[name]() for name in names}
            found = {
                "resident_bytes": {name: resident(side.models) for name, side in made.items()},
                "peak_bytes": {n: _peak(s, work["rerank"][0], device) for n, s in made.items()},
            }
            for what, (run, amount) in work.items():
                turns = {name: partial(_turn, side, run) for name, side in made.items()}
                times = timing.seconds(turns, rounds)
                found[what] = timing.rates(times, [amount] * rounds)
                if len(names) > 1:
                    found[what]["ratio"] = timing.ratio(times, "one", "two")
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        return about | {"sides": list(names)} | found

    both = row(*makers)
    if "failed" not in both:
        return [both]
    rows = []
    for name in makers:
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(row(name))
    return rows


def _turn(side: Side, run: Callable[[Side], object], turn: int) -> None:
    run(side)


def _peak(side: Side, run: Callable[[Side], object], device: str) -> int | None:
    above = timing.peak(partial(_turn, side, run), device)
    return None if above is None else above + resident(side.models)
