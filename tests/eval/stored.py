"""Vectors whose scores are often ties, and a folder of them as `encode` leaves it."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.vectors import Vectors


def grid(rows: int, width: int, seed: int) -> Tensor:
    """Rows of -1, 0 and 1: their products are exact in every dtype, and most scores are ties."""
    return torch.randint(
        -1, 2, (rows, width), generator=torch.Generator().manual_seed(seed)
    ).float()


def names(count: int) -> list[str]:
    """Ids of several lengths and scripts, in no order."""
    made = [f"{'aé文z'[i % 4]}{i * 7919 % 1000}" for i in range(count)]
    assert len(set(made)) == count
    return made


def store(folder: Path, documents: Tensor, ids: list[str], window: int, dtype: str) -> Vectors:
    """A folder as `encode` leaves it."""
    manifest = {"format": 1, "documents": len(ids), "dimension": documents.shape[1],
                "window": window, "dtype": dtype}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for shard in range(-(-len(ids) // window)):
        part = slice(shard * window, (shard + 1) * window)
        np.save(folder / f"{shard:05}.npy", documents[part].numpy().astype(dtype))
        np.save(folder / f"{shard:05}.ids.npy", np.array([key.encode() for key in ids[part]]))
    return Vectors(folder)
