"""A batch as one row of tokens: no pad token exists, so none enters a linear layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

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
    trie: of what whole texts, if their common beginnings are here but once; see `pack_trie`.
    """

    input_ids: Tensor
    positions: Tensor
    sequence: Tensor
    last: Tensor
    lengths: tuple[int, ...]
    groups: list[tuple[int, int]]
    part: Part | None = None
    trie: "Trie | None" = None

    @cached_property
    def segments(self) -> Segments:
        """Where the texts lie, for kernels."""
        return Segments.of(self.lengths, self.last.device)

    @property
    def places(self) -> Tensor | None:
        """(N,) int64, where the tokens stand in the larger batch, if this is a part of one."""
        return self.part.tokens[1] if self.part else None

    @property
    def whole(self) -> "Packed":
        """The texts as they are, each one whole."""
        return self.trie.texts if self.trie else self

    def to(self, device: torch.device | str) -> "Packed":
        """Its tensors on a device, and those of its trie."""
        assert self.part is None, "a part is of a batch that is on its device already"
        tensors = ("input_ids", "positions", "sequence", "last")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in tensors}
        if self.trie:
            s = self.trie
            moved["trie"] = Trie(s.texts.to(device), s.rows.to(device), s.kept.to(device))
        return replace(self, **moved)

    def spread(self, of: Tensor) -> Tensor:
        """(M, ...) of what is here -> (N, ...) of the whole texts."""
        return of[self.trie.rows] if self.trie else of

    def gather(self, of: Tensor) -> Tensor:
        """(N, ...) of the whole texts -> (M, ...) of what is here."""
        return of[self.trie.kept] if self.trie else of


@dataclass(frozen=True)
class Only:
    """One token of each text. at: (B,) int64, where it stands in the whole texts. texts: these
    tokens alone, as a batch."""

    at: Tensor
    texts: Packed

    @classmethod
    def of(cls, batch: Packed, at: Tensor) -> "Only":
        """Of whole texts. at: (B,) int64."""
        assert batch.trie is None, "places are those in the whole texts"
        count, rows = len(batch.lengths), torch.arange(len(batch.lengths), device=at.device)
        alone = (1,) * count, [(count, 1)]
        part = Part((count, rows), (len(batch.input_ids), at))
        if batch.part is not None:
            total, places = batch.part.tokens
            part = Part(batch.part.texts, (total, places[at]))
        return cls(at, Packed(batch.input_ids[at], batch.positions[at], rows, rows, *alone, part))


@dataclass(frozen=True)
class Trie:
    """What stands behind a Packed of M tokens whose texts are the runs of a trie.

    texts: the whole texts, N tokens. rows: (N,) int64, which of the M stands at each of their
    places. kept: (M,) int64, one of these places for each of the M.
    """

    texts: Packed
    rows: Tensor
    kept: Tensor


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
        input_ids=torch.tensor([i for text in texts for i in text]),
        positions=torch.arange(int(ends[-1])) - starts,
        sequence=torch.arange(len(lengths)).repeat_interleave(sizes),
        last=ends - 1,
        lengths=lengths,
        groups=_runs(lengths),
    ).to(device)


def pack_trie(texts: Sequence[list[int]], device: torch.device | str = "cpu") -> Packed:
    """`pack`, but what texts have in common at their beginning is there once: the M nodes of the
    trie of their tokens, each run of them as a text.

    Under a causal mask a token's state depends on what precedes it alone, so one state stands for
    all texts that begin so. It pays for the pairs of a query, and for a template's instruction.
    """
    whole = pack(texts)
    starts = (whole.last + 1 - torch.tensor(whole.lengths)).tolist()
    order = sorted(range(len(texts)), key=texts.__getitem__)
    rows = torch.empty_like(whole.input_ids)
    kept, lengths, before = [], [], 0
    for i, common in zip(order, common_lengths(texts, order), strict=True):
        start, fork, end = starts[i], starts[i] + common, starts[i] + len(texts[i])
        rows[start:fork] = rows[before : before + common]
        rows[fork:end] = torch.arange(len(kept), len(kept) + end - fork)
        kept += range(fork, end)
        lengths += [end - fork] if end > fork else []  # an equal text is there already
        before = start
    at, sizes = torch.tensor(kept), torch.tensor(lengths)
    return Packed(
        input_ids=whole.input_ids[at],
        positions=whole.positions[at],
        sequence=torch.arange(len(lengths)).repeat_interleave(sizes),
        last=sizes.cumsum(0) - 1,
        lengths=tuple(lengths),
        groups=_runs(lengths),
        trie=Trie(whole, rows, at),
    ).to(device)


def common_lengths(texts: Sequence[Sequence[int]], order: Sequence[int]) -> list[int]:
    """With how many tokens each text of `order` begins that the one before it begins with too.

    In sorted order no earlier text has more in common with it than the one before it.
    """
    found, before = [], ()
    for i in order:
        both = enumerate(zip(before, texts[i], strict=False))
        shorter = min(len(before), len(texts[i]))
        found.append(next((at for at, (a, b) in both if a != b), shorter))
        before = texts[i]
    return found


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(len(list(run)), length) for length, run in groupby(lengths)]


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
