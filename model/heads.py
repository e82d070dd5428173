"""Hidden states -> a vector or a score."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.packed import Only, Packed, segment_mean
from model.weights import draw_into

POOLINGS = ("last", "mean", "first")


def check_pooling(pooling: str, causal: bool) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: an unknown pooling, or `first` under a causal mask.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    if pooling == "first" and causal:
        raise ValueError(
            "pooling='first' needs bidirectional attention (causal=False): under a causal mask "
            "the first token has seen nothing of the text, so every text would score the same"
        )


def pooled_tokens(batch: Packed, pooling: str) -> Tensor | None:
    """(B,) int64, the one token of each text that pooling reads; None where it reads them all."""
    if pooling == "mean":
        return None
    if pooling == "last":
        return batch.last
    return batch.last - torch.tensor(batch.lengths, device=batch.last.device) + 1


def pool(hidden: Tensor, batch: Packed, pooling: str) -> Tensor:
    """(N, D) -> (B, D) in fp32 or wider: the last, the first, or the mean over a text's tokens."""
    at = pooled_tokens(batch, pooling)
    if at is None:
        return segment_mean(hidden, batch)
    rows = hidden[at]
    return rows if rows.dtype == torch.float64 else rows.float()


def run_pooled(
    run: Callable[[Only | None], tuple[Tensor, list[Tensor]]], batch: Packed, pooling: str
) -> tuple[Tensor, list[Tensor]]:
    """`pool` of a decoder's states (B, D), and the routing weights by layer that it returned.

    run: the decoder, given as `only` the tokens that are read, or None where all of them are.
    """
    at = pooled_tokens(batch, pooling)
    only = None if at is None else Only.of(batch, at)
    hidden, routing = run(only)
    return pool(hidden, batch if only is None else only.texts, pooling), routing


def truncate(vectors: Tensor, dimensions: int | None) -> Tensor:
    """The first `dimensions` of unit vectors (n, D), at length 1 again; None or D: as they are.

    Matryoshka, arXiv 2205.13147.

    Raises:
        ValueError: fewer than 1, or more than D.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    if not 1 <= dimensions <= vectors.shape[1]:
        raise ValueError(f"dimensions must be 1 to {vectors.shape[1]}, got {dimensions}")
    return F.normalize(vectors[:, :dimensions], dim=-1)


class LinearScore(nn.Module):
    """score = w . pool(h) + b: a relevance head trained from scratch; its logit, fp32."""

    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """U(-1/sqrt(D), 1/sqrt(D)), bias 0."""
        bound = self.linear.in_features**-0.5
        draw_into(
            self.linear.weight, lambda w: nn.init.uniform_(w, -bound, bound, generator=generator)
        )
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B,) logits."""
        return self.linear(pooled).squeeze(-1)


class YesNoScore(nn.Module):
    """score = log p("yes") - log p("no"): two rows of the base's frozen output matrix.

    The sigmoid of this difference is the softmax over the two words (Qwen3-Reranker,
    arXiv 2506.05176).
    """

    def __init__(self, yes: Tensor, no: Tensor):
        super().__init__()
        wide = torch.promote_types(yes.dtype, torch.float32)
        self.difference: Tensor
        self.register_buffer("difference", (yes.to(wide) - no.to(wide)), persistent=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing here is trained."""

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B,) log-odds."""
        return pooled @ self.difference
