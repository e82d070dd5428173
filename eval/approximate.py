"""The same search through FAISS: a flat index, exact as well, and inverted lists, which are not.

FAISS holds all vectors in memory; `eval.retrieval.exact` does not.
"""

import faiss
import numpy as np
import torch
from torch import Tensor

from eval.retrieval import ABSENT, Ids, to_keys
from eval.vectors import Vectors

INDEXES = ("flat", "ivf")
TRAINING = 64  # vectors for each list that k-means sees; FAISS wants 39 at least


def build(
    vectors: Vectors, kind: str, memory: float, lists: int = 0, held: float = 0
) -> faiss.Index:
    """An index of all vectors under the inner product.

    Args:
        kind: flat (IndexFlatIP, float32), or ivf: lists around the centroids of a k-means
            (IndexIVFFlat; IndexIVFScalarQuantizer with fp16 where the shards are float16, which
            rounds nothing again).
        memory: bytes that the search may take; held: of these, what it holds beside the index.
        lists: of ivf; 0: 4 sqrt(documents), at most one for 39 documents.
    Raises:
        ValueError: an unknown kind, more lists than documents, or an index that does not fit.
    """
    if kind not in INDEXES:
        raise ValueError(f"index {kind!r}: expected exact or one of {INDEXES}")
    count, width = vectors.documents, vectors.dimension
    lists = lists or max(1, min(round(4 * count**0.5), count // 39))
    if kind == "ivf" and lists > count:
        raise ValueError(f"--lists {lists}: expected at most {count}, one for each document")
    size = 2 if kind == "ivf" and vectors.dtype == "float16" else 4
    needed = count * (size * width + 8 * (kind == "ivf"))
    needed += 4 * width * min(count, TRAINING * lists) * (kind == "ivf")
    if needed > memory - held:
        raise ValueError(
            f"--memory {memory / 1e9:g} GB: the {kind} index of {count:,} documents takes "
            f"{needed / 1e9:.2g} GB and ids, queries and rankings {held / 1e9:.2g} GB: allow more, "
            "or use --index exact, which reads from the disk"
        )
    kept = f"IVF{lists},{'SQfp16' if size == 2 else 'Flat'}" if kind == "ivf" else "Flat"
    index = faiss.index_factory(width, kept, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        index.by_residual = False  # a difference to the centroid would be rounded once more
    if kind == "ivf":
        index.train(_sample(vectors, min(count, TRAINING * lists)))
    for shard in range(vectors.shards):
        index.add(vectors.shard(shard).astype(np.float32))
    return index


def _sample(vectors: Vectors, count: int) -> np.ndarray:
    """(count, D) fp32, evenly spaced over the corpus."""
    chosen = np.linspace(0, vectors.documents - 1, count).astype(np.int64)
    out = np.empty((count, vectors.dimension), np.float32)
    for shard in np.unique(chosen // vectors.window):
        own = np.flatnonzero(chosen // vectors.window == shard)
        out[own] = vectors.shard(int(shard))[chosen[own] - shard * vectors.window]
    return out


def search(
    index: faiss.Index, queries: Tensor, ids: Ids, k: int, probes: int = 0, chunk: int = 256
) -> Tensor:
    """Keys (Q, min(k, M)), best first; ABSENT where the lists that were looked at hold fewer.

    FAISS breaks ties by chance, so it is asked for more until none crosses the cut at k; then
    the rule of `eval.retrieval` decides.

    Args:
        queries: (Q, D) unit vectors, fp32.
        probes: lists of ivf that are looked at for a query; 0: a sixteenth of them.
        chunk: queries asked at once.
    """
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = min(probes or -(-index.nlist // 16), index.nlist)
    k, parts = min(k, len(ids)), []
    for start in range(0, len(queries), chunk):
        asked, wanted = queries[start : start + chunk].float().numpy(), min(k + 1, len(ids))
        scores, found = index.search(asked, wanted)
        while wanted < len(ids) and np.any(
            (scores[:, -1] == scores[:, k - 1]) & (found[:, k - 1] >= 0)
        ):
            wanted = min(2 * wanted, len(ids))
            scores, found = index.search(asked, wanted)
        keys = to_keys(torch.from_numpy(scores), ids.places(np.maximum(found, 0)))
        keys[torch.from_numpy(found < 0)] = ABSENT
        parts.append(keys.topk(k, dim=1).values)
    return torch.cat(parts)


def recall(found: Tensor, expected: Tensor, k: int) -> float:
    """The share of the exact k best that an index found among its k best, mean over queries.

    Args:
        found, expected: keys (Q, >= k), best first.
    """
    k = min(k, expected.shape[1])
    shares = [
        len(np.intersect1d(mine[mine != ABSENT] & 0xFFFFFFFF, best & 0xFFFFFFFF)) / k
        for mine, best in zip(found[:, :k].numpy(), expected[:, :k].numpy(), strict=True)
    ]
    return float(np.mean(shares))
