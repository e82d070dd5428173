"""Every op of `kernels/` in plain PyTorch: what the fast versions are held against.

Shapes: N packed tokens, D input features, O output features, E experts, R total rank.
Nothing here is fast, and nothing here has a hand-written gradient: autograd differentiates it.
"""

from itertools import accumulate

import torch
from torch import Tensor


def running_sum(x: Tensor) -> Tensor:
    """`x.cumsum(-1)`, of which CUDA has no deterministic kernel for floating point."""
    return torch.stack(list(accumulate(x.unbind(-1))), -1)


def sparsegen(u: Tensor, c: Tensor) -> Tensor:
    """Sparsegen-lin: argmin over the simplex of ||p - u||^2 - (1 - c) ||p||^2.

    p_i = max(u_i - tau, 0) / c with tau such that sum p = 1 (Laha et al. 2018, section 3).

    Args:
        u: logits (..., E).
        c: 1 - lambda > 0, broadcastable to (..., 1).
    Returns:
        weights (..., E), each row on the simplex.
    """
    u = u - u.amax(-1, keepdim=True)
    ordered = u.sort(-1, descending=True).values
    sums = running_sum(ordered)
    count = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    k = (c + count * ordered > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, k - 1) - c) / k
    return (u - tau).clamp(min=0) / c


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Half precision is normalised in fp32 and cast back before the weight, as Hugging Face does.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout (arXiv 2104.09864).

    Args:
        x: (N, H, K) queries or keys.
        cos, sin: (N, K / 2) of the token's position times the inverse frequencies.
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return torch.nn.functional.silu(gate) * up


def add_rmsnorm_pool(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + delta (N, D), its RMSNorm (N, D), and the norm's mean over each text (B, D).

    Args:
        sizes: tokens of each text. The means are fp32 or wider.
    """
    h = x if delta is None else x + delta
    normed = rms_norm(h, weight, eps)
    wide = normed if normed.dtype == torch.float64 else normed.float()
    means = [text.mean(0) for text in wide.split(sizes)]
    return h, normed, torch.stack(means) if means else wide.new_zeros(0, x.shape[1])


def qk_norm_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    heads: int,
    key_heads: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, (H + 2 G) K) -> q (N, H, K), k and v (N, G, K); q and k normalised (where there are
    weights) and rotated."""
    widths = [heads * size, key_heads * size, key_heads * size]
    q, k, v = (t.unflatten(1, (-1, size)) for t in qkv.split(widths, 1))
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return rope(q, cos, sin), rope(k, cos, sin), v


def route(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    c: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """Sparsegen of V silu(U x / rms(x) + b) + d + offset: (rows, D) -> (rows, E)."""
    z = torch.nn.functional.rms_norm(x, x.shape[-1:]) @ up.t() + up_bias
    u = torch.nn.functional.silu(z) @ down.t() + down_bias
    return sparsegen(u if offset is None else u + offset, c)


def moe_lora(
    x: Tensor,
    weight: Tensor,
    gates: Tensor,
    experts: list[tuple[Tensor, Tensor]],
    scales: list[float],
) -> Tensor:
    """y = W x + sum_i w_i s_i B_i A_i x.

    Args:
        x: (N, D). weight: (O, D), frozen.
        gates: (N, E), the weight of each expert for each token.
        experts: E pairs of A_i (r_i, D) and B_i (O, r_i).
        scales: E numbers s_i = alpha_i / r_i.
    Returns:
        (N, O)
    """
    y = x @ weight.t()
    for i, ((a, b), scale) in enumerate(zip(experts, scales, strict=True)):
        y = y + gates[:, i : i + 1] * scale * (x @ a.t() @ b.t())
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """softmax(q k' / sqrt(K)) v of one sequence, by the definition.

    Args:
        q: (T, H, K). k, v: (T, G, K), each key/value head shared by H / G query heads.
        window: with w, token i sees the tokens j with |i - j| < w (None: all).
    Returns:
        (T, H, K)
    """
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5
    at = torch.arange(len(q), device=q.device)
    distance = at[:, None] - at[None, :]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hij,jhk->ihk", scores.softmax(-1), v)


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positive: Tensor,
    relevant: Tensor,
    temperature: float,
    margin: float,
) -> Tensor:
    """Mean over queries of -log softmax(q . d / temperature) at the positive (arXiv 1807.03748).

    All documents compete but those known to be relevant to the query, and those whose cosine
    exceeds the positive's by more than `margin`.

    Args:
        queries: (B, D), documents: (M, D), unit vectors. positive: (B,) int64.
        relevant: (P, 2) int64 pairs (query, document).
    """
    scores = queries @ documents.t()  # (B, M)
    own = scores.gather(1, positive[:, None])
    false = scores.detach() > own.detach() + margin
    false[relevant[:, 0], relevant[:, 1]] = True
    false = false.scatter(1, positive[:, None], False)
    scores = (scores / temperature).masked_fill(false, float("-inf"))
    return torch.nn.functional.cross_entropy(scores, positive)
