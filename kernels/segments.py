"""Where the texts of a packed batch lie, as kernels see it, and sums over each text's tokens.

A text is cut into chunks of at most CHUNK tokens; no chunk holds tokens of two texts. A kernel that
works chunk by chunk can therefore store one partial sum each, and `sum_chunks` adds them up in
order: no atomics, so the same batch gives the same bits on every run.
"""

# Launches are typed by Triton, not by Python: plain numbers for constexpr, num_warps and so on.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # tokens; 16 rows of 1024 values keep a program busy, 16k tokens make 1000 programs
PADDING = 1.25  # what padded calls may compute for each token that is there


@dataclass(frozen=True)
class Segments:
    """sizes: tokens of each text. starts (B + 1,): first token of each text, then N.
    index (N,): text of each token. chunks (C, 3): first token, one past the last, text.
    offsets (B + 1,): first chunk of each text, then C. lengths (B,): sizes. Tensors are int32."""

    sizes: tuple[int, ...]
    starts: Tensor
    index: Tensor
    chunks: Tensor
    offsets: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> "Segments":
        sizes = torch.tensor(lengths, dtype=torch.int64)
        counts = (sizes + CHUNK - 1) // CHUNK
        offsets = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        offsets[1:] = counts.cumsum(0)
        text = torch.arange(len(sizes)).repeat_interleave(counts)
        ends = sizes.cumsum(0)
        within = torch.arange(len(text)) - offsets[:-1][text]
        start = (ends - sizes)[text] + CHUNK * within
        chunks = torch.stack((start, torch.minimum(start + CHUNK, ends[text]), text), 1)
        index = torch.arange(len(sizes)).repeat_interleave(sizes)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends))
        parts = (starts, index, chunks, offsets, sizes)
        return cls(tuple(lengths), *(t.to(torch.int32).contiguous().to(device) for t in parts))

    @cached_property
    def padded(self) -> list["Bucket"]:
        """The texts as `buckets` pads them; made once, for all layers."""
        found, text, device = [], 0, self.starts.device
        for count, longest in buckets(self.sizes):
            starts = self.starts[text : text + count + 1].long()
            lengths = starts.diff()[:, None]  # (n, 1)
            at = torch.arange(longest, device=device)
            rows = starts[:-1, None] + torch.minimum(at, lengths - 1)
            offsets = torch.arange(sum(self.sizes[text : text + count]), device=device) + starts[0]
            own = torch.searchsorted(starts[1:], offsets, right=True)  # text of each token
            back = own * longest + offsets - starts[own]
            found.append(Bucket(rows, at < lengths, back))
            text += count
        return found


class Bucket(NamedTuple):
    """n texts as rows of L tokens. rows: (n, L) which packed token stands there, a pad being the
    text's last one again. real: (n, L) whether it is none. back: (M,) where the n texts' tokens
    stand in the n L, in packed order."""

    rows: Tensor
    real: Tensor
    back: Tensor


def buckets(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(count, longest) of runs of neighbouring texts of about one length: padded to the longest,
    a run has at most PADDING times its tokens. In a sorted batch that makes a few runs."""
    runs: list[tuple[int, int]] = []
    real = 0
    for size in sizes:
        if runs:
            count, longest = runs[-1]
            wider = max(longest, size)
            if (count + 1) * wider <= PADDING * (real + size):
                runs[-1], real = (count + 1, wider), real + size
                continue
        runs.append((1, size))
        real = size
    return runs


@triton.jit
def _sum_chunks(partial, offsets, lengths, out, width, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    text = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(tl.load(offsets + text), tl.load(offsets + text + 1)):
        total += tl.load(partial + chunk * width + cols, mask=cols < width, other=0.0)
    if MEAN:
        total /= tl.load(lengths + text).to(tl.float32)
    tl.store(out + text * width + cols, total, mask=cols < width)


def sum_chunks(partial: Tensor, segments: Segments, mean: bool) -> Tensor:
    """(C, W) fp32 sums of chunks -> (B, W) fp32 sums of texts, or means over their tokens."""
    texts, width = len(segments.lengths), partial.shape[1]
    out = partial.new_empty(texts, width)
    if texts:
        block = min(256, triton.next_power_of_2(width))
        grid = (texts, triton.cdiv(width, block))
        _sum_chunks[grid](
            partial, segments.offsets, segments.lengths, out, width, MEAN=mean, BLOCK=block
        )
    return out
