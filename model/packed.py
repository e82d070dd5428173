"""A batch as one row of tokens: no pad token exists, so none enters a linear layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from kernels.segments import Segments


@dataclass(frozen=True)
class Part:
    """Which texts of a larger batch a Packed holds: how many texts and tokens there are in all, and
    (int64) where its own stand among them."""

    texts: tuple[int, Tensor]
    tokens: tuple[int, Tensor]

    @classmethod
    def of(cls, lengths: Sequence[int], chosen: Sequence[int], device: torch.device) -> "Part":
        """The `chosen` of texts with these lengths."""
        ends = torch.tensor(lengths).cumsum(0).tolist()
        tokens = torch.cat([torch.arange(ends[i] - lengths[i], ends[i]) for i in chosen])
        texts = torch.tensor(chosen)
        return cls((len(lengths), texts.to(device)), (ends[-1], tokens.to(device)))


@dataclass(frozen=True)
class Packed:
    """A batch as one row of N tokens.

    input_ids, positions, sequence: (N,) int64: token, place in its text, and which text.
    lengths: tokens of each text. last: (B,) where each text's last token is.
    groups: (count, length) of each run of equally long texts.
    part: of what larger batch, if it is a part of one.
    """

    input_ids: Tensor
    positions: Tensor
    sequence: Tensor
    last: Tensor
    lengths: tuple[int, ...]
    groups: list[tuple[int, int]]
    part: Part | None = None

    @cached_property
    def segments(self) -> Segments:
        """Where the texts lie, for kernels."""
        return Segments.of(self.lengths, self.last.device)


def pack(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packed:
    """Token ids of B texts -> Packed. Sort the texts by length first where speed matters.

    Raises:
        ValueError: for no text at all, or a text without tokens (its pooling is undefined).
    """
    lengths = tuple(len(text) for text in texts)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"need at least one text and one token in each, got lengths {lengths}")
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    starts = (ends - sizes).repeat_interleave(sizes)
    return Packed(
        input_ids=torch.tensor([i for text in texts for i in text]).to(device),
        positions=(torch.arange(int(ends[-1])) - starts).to(device),
        sequence=torch.arange(len(lengths)).repeat_interleave(sizes).to(device),
        last=(ends - 1).to(device),
        lengths=lengths,
        groups=[(len(list(run)), length) for length, run in groupby(lengths)],
    )


def segment_mean(x: Tensor, batch: Packed) -> Tensor:
    """(N, D) -> (B, D): mean over each text's own tokens, in fp32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    runs = wide.split([count * length for count, length in batch.groups])
    return torch.cat(
        [run.unflatten(0, shape).mean(1) for run, shape in zip(runs, batch.groups, strict=True)]
    )


def per_token(rows: Tensor, batch: Packed) -> Tensor:
    """(B, R) -> (N, R): each text's row once for each of its tokens.

    Not `rows[batch.sequence]`: its gradient is added up by threads in whatever order they come,
    so the same seed would not give the same losses. The gradient of `expand` is a plain sum.
    """
    runs = rows.split([count for count, _ in batch.groups])
    return torch.cat(
        [
            run[:, None].expand(-1, length, -1).flatten(0, 1)
            for run, (_, length) in zip(runs, batch.groups, strict=True)
        ]
    )
