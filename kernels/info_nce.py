"""InfoNCE whose score matrix is never whole in memory, forward and backward.

For unit vectors q of B queries and d of M documents, at temperature T (arXiv 1807.03748):

    loss = mean_i [ log sum_{j in C_i} exp(q_i d_j / T) - q_i p_i / T ],    p_i the positive of q_i

where C_i holds the positive and every document that is no false negative: neither judged relevant
to the query nor closer to it than the positive by more than `margin`. With s_ij the softmax over
C_i and g the incoming gradient,

    dq_i = g (sum_j s_ij d_j - p_i) / (B T)
    dd_j = g (sum_i s_ij q_i - sum_{i: p_i = d_j} q_i) / (B T)

Documents come in chunks: a running maximum and sum give the normaliser, and the backward pass
computes each chunk's scores again. Memory is B * chunk + (B + M) * D values, not B * M.
"""

import torch
from torch import Tensor

from kernels import reference

CHUNK = 4096  # documents


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class _ChunkedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, documents, positive, relevant, temperature, margin, chunk):
        q = _wide(queries)
        # The positive stands apart from its chunk: rounded otherwise there, it could be masked.
        own = (q * _wide(documents[positive])).sum(1, keepdim=True)
        best, total = own / temperature, torch.ones_like(own)
        for start in range(0, len(documents), chunk):
            scores, _ = _masked(q, documents, own, positive, relevant, margin, start, chunk)
            scores = scores / temperature
            higher = torch.maximum(best, scores.amax(1, keepdim=True))
            total = total * (best - higher).exp() + (scores - higher).exp().sum(1, keepdim=True)
            best = higher
        normaliser = best + total.log()
        ctx.save_for_backward(queries, documents, positive, relevant, own, normaliser)
        ctx.options = temperature, margin, chunk
        return (normaliser - own / temperature).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        queries, documents, positive, relevant, own, normaliser = ctx.saved_tensors
        temperature, margin, chunk = ctx.options
        q, p = _wide(queries), _wide(documents[positive])
        # What is left of the positive: its softmax less one.
        surplus = (own / temperature - normaliser).exp() - 1
        dq, dd = surplus * p, torch.empty_like(documents)
        order = positive.argsort(stable=True)
        for start in range(0, len(documents), chunk):
            scores, d = _masked(q, documents, own, positive, relevant, margin, start, chunk)
            share = (scores / temperature - normaliser).exp()
            dq += share @ d
            part = share.t() @ q
            _add_rows(part, surplus * q, positive, order, start)
            dd[start : start + chunk] = (grad / (len(q) * temperature) * part).to(dd.dtype)
        dq = (grad / (len(q) * temperature) * dq).to(queries.dtype)
        return dq, dd, None, None, None, None, None


def _masked(q, documents, own, positive, relevant, margin: float, start: int, chunk: int):
    """Scores (B, chunk) of a chunk, -inf at false negatives and at each query's positive; and the
    chunk of documents."""
    d = _wide(documents[start : start + chunk])
    scores = q @ d.t()
    scores.masked_fill_(scores > own + margin, float("-inf"))
    for rows, columns in ((relevant[:, 0], relevant[:, 1]),
                          (torch.arange(len(q), device=q.device), positive)):  # fmt: skip
        inside = (columns >= start) & (columns < start + len(d))
        scores[rows[inside], columns[inside] - start] = float("-inf")
    return scores, d


def _add_rows(part: Tensor, rows: Tensor, positive: Tensor, order: Tensor, start: int) -> None:
    """part[positive - start] += rows, in a fixed order even where positives repeat."""
    at = positive[order]
    inside = (at >= start) & (at < start + len(part))
    chosen, own = order[inside], at[inside] - start
    places, counts = own.unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(rows[chosen], "sum", lengths=counts, axis=0, unsafe=True)
    part[places] += sums


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positive: Tensor,
    relevant: Tensor,
    temperature: float,
    margin: float,
    chunk: int = CHUNK,
) -> Tensor:
    """The loss above; up to `chunk` documents by the plain formula, in one piece.

    Args:
        queries: (B, D) and documents: (M, D), unit vectors, scored in fp32 or wider.
        positive: (B,) int64, row of each query's positive.
        relevant: (P, 2) int64, (query, document) pairs known to be relevant; the positive may be
            among them.
        temperature: in (0, 1]. margin: in cosine.
    """
    if len(documents) <= chunk:
        wide = _wide(queries), _wide(documents)
        return reference.info_nce(*wide, positive, relevant, temperature, margin)
    arguments = (queries, documents, positive, relevant, temperature, margin, chunk)
    return _ChunkedInfoNCE.apply(*arguments)
