"""Random numbers and rotations in float64, the same for the same seed."""

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed))[0]
