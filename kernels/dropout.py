"""Dropout that does not see how a batch was cut: which elements fall is a hash of their place.

torch.rand gives an element the number that its place in the call has, so a batch that runs in
parts, in several processes or on another device drops others. Here a call draws one seed, from
torch's generator on the CPU wherever the batch lies, and the rest is integers: the counter-based
way of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with a hash of 32
bits for a counter that has no need of more.
"""

import torch
from torch import Tensor

AT_ONCE = 1 << 22  # elements that are hashed together, 8 bytes each
BITS = 32
MASK = (1 << BITS) - 1


def dropout_mask(places: Tensor, features: int, p: float, dtype: torch.dtype) -> Tensor:
    """(N, features) of 0, with probability p, and 1 / (1 - p), rounded to the dtype (in bfloat16 of
    p = 0.1 by -0.16 %).

    Args:
        places: (N,) int64 below 2^32, where each row stands in the whole batch, of which these rows
            may be a part: it alone, the feature and the seed of this call decide.
        p: in [0, 1).
    """
    seed = int(torch.randint(1 << BITS, (), device="cpu"))
    lanes = _mixed(torch.arange(features, device=places.device) + 1)
    mask = torch.empty(len(places), features, dtype=dtype, device=places.device)
    for some, out in zip(
        *(of.split(max(1, AT_ONCE // features)) for of in (places, mask)), strict=True
    ):
        rows = _mixed(_mixed(some) ^ seed)
        torch.ge(_mixed(rows[:, None] ^ lanes), round(p * (1 << BITS)), out=out)
    return mask.div_(1 - p)


def _mixed(h: Tensor) -> Tensor:
    """A permutation of the 32-bit numbers that parts neighbours (T. Mueller's): int64, of which no
    product reaches the sign."""
    for _ in range(2):
        h = ((h >> 16) ^ h) * 0x45D9F3B & MASK
    return (h >> 16) ^ h
