"""Attention over packed sequences: no token sees another sequence, no pad token exists."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: list[tuple[int, int]],
    *,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """softmax(q k' / sqrt(K)) v within each sequence, grouped-query heads.

    Neighbouring sequences of equal length are one batched call, so a batch that is sorted by length
    costs a few calls and not one token of padding.

    Args:
        q: (N, H, K). k, v: (N, G, K) with H a multiple of G.
        groups: (count, length) of each run of equally long sequences, in packed order.
        causal: a token sees itself and what precedes it in its sequence; otherwise all of it.
        window: with w, only tokens at a distance below w are seen (Mistral's sliding window).
    Returns:
        (N, H, K)
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype != torch.float64:
        # PyTorch's CPU kernel converts 16-bit values block by block: 4 to 7 times slower backward.
        q, k, v = q.float(), k.float(), v.float()
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    sizes = [count * length for count, length in groups]
    parts = zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outputs = []
    for (count, length), *qkv in parts:
        # (n L, H, K) -> (n, H, L, K)
        heads = [t.unflatten(0, (count, length)).transpose(1, 2) for t in qkv]
        mask = None
        if window is not None and length > window:
            mask = _window_mask(length, causal, window, q.device)
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=causal and mask is None
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype)


def _window_mask(length: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(L, L) bool, True where a token may look."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    seen = distance.abs() < window
    return seen & (distance >= 0) if causal else seen
