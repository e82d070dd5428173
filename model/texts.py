"""Many tokenized texts through a model, batch by batch, without gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from model import parallel
from model.packed import Packed
from model.prefix import TextSet
from model.transformer import Decoder

CARD_BUDGET = 32768  # tokens of a batch on a card, where small ones leave it waiting for the host


def usual_budget(device: torch.device, on_cpu: int) -> int:
    """Tokens of a batch."""
    return CARD_BUDGET if device.type == "cuda" else on_cpu


@torch.no_grad()
def in_batches(
    decoder: Decoder,
    texts: TextSet,
    step: Callable[[Packed, Tensor | None, bool], tuple[Tensor, list[Tensor]]],
    *,
    budget: int | None = None,
    base: bool = False,
    progress: bool = False,
    title: str = "",
    shared: bool = False,
    trie: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run `step`, such as `UniMoER.embed`, over texts.

    Yields the indices of each batch, sorted by length under a budget of tokens, and its result.

    Args:
        step: (batch, states before the first adapted layer or None, base) -> (a row or more for
            each text, anything).
        budget: None: 4,096 on a CPU, `CARD_BUDGET` on a card.
        base: whether `step` leaves the experts out.
        shared: only every n-th batch, where this is one of n processes that were all asked the
            same.
        trie: `step` takes batches in which common beginnings are there once (`pack_trie`), and
            gets them where that saves work.
    """
    weight = decoder.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    depth = decoder.trie_layers(base=base) / len(decoder.layers) if trie else 0.0
    batches, trie = texts.batches(budget or usual_budget(device, 4096), depth)
    rank, world = (parallel.rank(), parallel.world()) if shared else (0, 1)
    hidden = not progress or rank > 0
    options = {"unit": "token", "desc": title, "disable": hidden, "leave": False}

    def prepared(turn: int) -> tuple[list[int], Packed, Tensor | None]:
        # Where no batch is left, the last one again: shards need as many passes everywhere.
        indices = batches[min(turn + rank, len(batches) - 1)]
        return indices, *texts.batch(indices, device, dtype, trie)

    with decoder.serving(), tqdm(total=sum(texts.lengths), **options) as bar:
        following = prepared(0) if batches else None
        for turn in range(0, len(batches), world):
            assert following is not None
            indices, batch, states = following
            computed, following = step(batch, states, base)[0], None
            if turn + world < len(batches):  # packed while a card computes
                following = prepared(turn + world)
            rows = computed.cpu()
            if not rows.isfinite().all():
                raise ValueError(
                    f"{title}: the model computes values that are not finite in {dtype} for the "
                    f"texts {indices[:5]} or one after them: take bfloat16 or float32, and look at "
                    "what it was trained to"
                )
            if turn + rank < len(batches):
                yield indices, rows
            bar.update(sum(texts.lengths[i] for of in batches[turn : turn + world] for i in of))
