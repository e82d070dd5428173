"""Attention over packed sequences: no token sees another sequence, no pad token exists."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segments import Segments


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
    dtype, on_cpu = q.dtype, q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and dtype != torch.float64:
        # PyTorch's CPU kernel converts 16-bit values block by block: 4 to 7 times slower backward,
        # but twice as fast as the conversion where there is no backward.
        q, k, v = q.float(), k.float(), v.float()
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1 and not on_cpu:  # not every kernel of a card knows groups
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
            *heads, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=on_cpu
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).to(dtype)


def _window_mask(length: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(L, L) bool, True where a token may look."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    seen = distance.abs() < window
    return seen & (distance >= 0) if causal else seen


@functools.cache
def _varlen(grouped: bool) -> tuple[Callable[..., Any], dict[str, bool]]:
    """PyTorch's variable-length attention, and the option that allows fewer heads of keys than of
    queries: up to PyTorch 2.11 there is none and it is allowed. The import pulls the compiler in,
    two seconds, so it waits for a card."""
    from torch.nn.attention.varlen import varlen_attn

    told = grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if told else {}


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None = None
) -> Tensor:
    """`attention` for cards: one variable-length call where PyTorch has it, else padded calls.

    The variable-length kernel (FlashAttention) takes fp16 and bf16 from sm_80 up. A T4, or fp32,
    goes through `padded_attention`; the results are the same but for rounding.
    """
    if not segments.sizes:
        return q.clone()
    card = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if not card or q.dtype not in (torch.float16, torch.bfloat16):
        return padded_attention(q, k, v, segments, causal=causal, window=window)
    reach = -1 if window is None else window - 1  # how far a token looks to its left
    longest = max(segments.sizes)
    varlen_attn, options = _varlen(q.shape[1] != k.shape[1])
    out = varlen_attn(
        q, k, v, segments.starts, segments.starts, longest, longest,
        window_size=(reach, 0 if causal else reach), **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple where its auxiliary outputs are asked for
    return out


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, window: int | None = None
) -> Tensor:
    """The same by `scaled_dot_product_attention`, one call for each of `segments.padded`.

    Pads stand behind a text, so a causal mask hides them; otherwise a mask does.
    """
    heads, groups = q.shape[1], k.shape[1]
    joined, outputs = torch.cat((q, k, v), 1), []  # (N, H + 2 G, K): one gather for all three
    for bucket in segments.padded:
        some = joined[bucket.rows].transpose(1, 2)  # (n, H + 2 G, L, K)
        queries, keys, values = some.split((heads, groups, groups), 1)
        if heads != groups:  # not every kernel of a card knows groups
            repeat = heads // groups
            keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        mask, longest = None, bucket.rows.shape[1]
        if window is not None or not causal:
            mask = bucket.real[:, None, None]  # (n, 1, 1, L)
            if window is not None:
                mask = mask & _window_mask(longest, causal, window, q.device)
            # A pad sees at least itself: a row without any key would be NaN, and so its gradient.
            mask = mask | torch.eye(longest, dtype=torch.bool, device=q.device)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal and mask is None
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1)[bucket.back])
    return torch.cat(outputs)
