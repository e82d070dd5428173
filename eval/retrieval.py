"""Dense retrieval, exactly: every query against every document, in memory or from shards on disk.

One rule orders documents everywhere, trec_eval's: by score rounded to float32, equal scores by
document id, descending. So cutting at k here and ranking in eval/metrics.py agree. A score and the
place of the id among all ids are one int64, the key, and a ranking is the k largest keys.
"""

from collections.abc import Container, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.vectors import Vectors

ABSENT = torch.iinfo(torch.int64).min  # the key of no document


def to_keys(
    scores: Tensor, places: Tensor, spare: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """int64 (..., M) keys that are ordered as (score, place) are.

    A float32 read as an integer is ordered as the number is, but for negative ones, whose other
    bits are turned around. It fills the upper half of the key, the place the lower.

    Args:
        scores: (..., M), no NaN; rounded to float32. It is overwritten where it is float32.
        places: (M,) or (..., M) int64, in [0, 2^32): of the id among all ids in ascending order.
        spare, out: int32 and int64 of the scores' shape; with them nothing is allocated.
    """
    bits = scores.float().add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    bits ^= torch.bitwise_right_shift(bits, 31, out=spare).bitwise_and_(0x7FFFFFFF)
    keys = bits.long() if out is None else out.copy_(bits)
    return keys.bitwise_left_shift_(32).bitwise_or_(places)


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, fp32, and places, int64, of keys; the inverse of `to_keys`."""
    bits = (keys >> 32).int()
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.view(torch.float32), keys & 0xFFFFFFFF


def search(
    queries: Tensor,
    documents: Tensor,
    query_ids: list[str],
    document_ids: Sequence[str],
    k: int,
    chunk: int = 1024,
) -> dict[str, dict[str, float]]:
    """The k documents with the highest cosine of each query.

    Args:
        queries: (Q, D) and documents: (M, D), unit vectors, fp32.
        document_ids: of the documents, unique.
        chunk: queries scored at once; bounds the score matrix at chunk * M values.
    Returns:
        query id -> document id -> cosine, best first.
    """
    best = Best(queries, Ids.of(document_ids), k, chunk)
    best.add(documents)
    return best.run(query_ids)


class Best:
    """The k best documents of each query among those that have been added, in their order.

    Args:
        queries: (Q, D) unit vectors, fp32, on the device where they are compared.
        ids: of all documents that will be added.
        chunk: queries scored at once; bounds the score matrix at chunk * M values.
    """

    def __init__(self, queries: Tensor, ids: "Ids", k: int, chunk: int = 1024):
        self.queries, self.ids, self.chunk, self.added = queries, ids, chunk, 0
        size = len(queries), min(k, len(ids))
        self.keys = torch.full(size, ABSENT, device=queries.device)

    def add(self, documents: Tensor) -> None:
        """The next documents: (M, D) unit vectors, fp32, on any device."""
        end, k = self.added + len(documents), self.keys.shape[1]
        places = self.ids.places(slice(self.added, end)).to(self.keys.device)
        documents = documents.to(self.keys.device)
        for start in range(0, len(self.queries), self.chunk):
            rows = slice(start, start + self.chunk)
            keys = to_keys(self.queries[rows] @ documents.t(), places)
            near = keys.topk(min(k, len(documents)), dim=1).values
            self.keys[rows] = torch.cat((self.keys[rows], near), 1).topk(k, dim=1).values
        self.added = end

    def run(self, query_ids: Sequence[str]) -> dict[str, dict[str, float]]:
        """query id -> document id -> cosine, best first."""
        return to_run(self.keys.cpu(), query_ids, self.ids)


class Ids:
    """Document ids by place: the place of an id is its rank among all, ascending.

    Holds the longest id and 8 bytes for each document, and 8 more while it is built.

    Args:
        ids: (M,) unique UTF-8 ids in the order of the documents, a NumPy array of bytes. Byte by
            byte they are ordered as their characters are.
    """

    def __init__(self, ids: np.ndarray):
        assert len(ids) < 2**32, "places have 32 bits"
        self._ids = ids
        order = ids.argsort()
        self._at = order.astype(np.uint32)  # place -> document
        del order
        self._places = np.empty(len(ids), np.uint32)  # document -> place
        self._places[self._at] = np.arange(len(ids), dtype=np.uint32)

    @classmethod
    def of(cls, ids: Sequence[str]) -> "Ids":
        return cls(np.array([key.encode() for key in ids]))

    def __len__(self) -> int:
        return len(self._ids)

    def places(self, documents: slice | np.ndarray) -> Tensor:
        """int64 places of some documents, given by their positions in the corpus."""
        return torch.from_numpy(self._places[documents].astype(np.int64))

    def names(self, places: np.ndarray) -> list[str]:
        """The ids at some places."""
        return [key.decode() for key in self._ids[self._at[places]].tolist()]

    def absent(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that no document has."""
        asked = [name.encode() for name in names]
        found = np.searchsorted(self._ids, np.array(asked), sorter=self._at)
        near = self._ids[self._at[np.minimum(found, len(self) - 1)]].tolist()
        return [name for name, a, b in zip(names, asked, near, strict=True) if a != b]


def to_run(keys: Tensor, query_ids: Sequence[str], ids: Ids) -> dict[str, dict[str, float]]:
    """Keys (Q, k), best first, as query id -> document id -> score."""
    run = {}
    for query, row in zip(query_ids, keys.cpu(), strict=True):
        scores, places = from_keys(row[row != ABSENT])
        run[query] = dict(zip(ids.names(places.numpy()), scores.tolist(), strict=True))
    return run


def cut(
    run: Mapping[str, Mapping[str, float]], excluded: Mapping[str, Container[str]], k: int
) -> dict[str, dict[str, float]]:
    """The k best of each query without what is excluded for it; of a run with each best first."""
    found = {}
    for query, row in run.items():
        out = excluded.get(query, ())
        found[query] = dict([item for item in row.items() if item[0] not in out][:k])
    return found


def overhead(queries: int, documents: int, dimension: int, k: int, id_bytes: int, rows: int) -> int:
    """Bytes that a search takes whatever it scores by: the ids, the query vectors, the best k of
    each query and the mapped pages of a shard. id_bytes, rows: as of `plan`."""
    return documents * (id_bytes + 16) + queries * (4 * dimension + 8 * k) + rows * 4 * dimension


def plan(
    memory: float, queries: int, documents: int, dimension: int, k: int, id_bytes: int, rows: int
) -> tuple[int, int]:
    """How many documents and queries are scored at once within a bound of memory.

    Args:
        memory: bytes.
        id_bytes: of the longest id. rows: the documents of a shard.
    Returns:
        (documents, queries) of one block, both at least 1.
    Raises:
        ValueError: the bound is below `overhead` and the least block.
    """
    fixed = overhead(queries, documents, dimension, k, id_bytes, rows)
    # Of a block: its documents in fp32 and their places; scores, spare and keys; the block's best,
    # these and the best so far together, and the best of both.
    merge = 32 * k

    def block(n: int, q: int) -> int:
        return n * (4 * dimension + 8) + q * (16 * n + merge)

    left = memory - fixed
    if left < block(1, 1):
        raise ValueError(
            f"--memory {memory / 1e9:g} GB: {queries:,} queries, depth {k:,} and {documents:,} "
            f"documents take {(fixed + block(1, 1)) / 1e9:.2g} GB before anything is scored: allow "
            "more, or a smaller --depth"
        )
    n = rows
    while n > 1 and block(n, min(queries, 64)) > left:  # queries enough for a matrix product
        n = n // 2
    return n, max(1, min(queries, int((left - block(n, 0)) // (16 * n + merge))))


@torch.no_grad()
def exact(
    queries: Tensor,
    vectors: Vectors,
    ids: Ids,
    k: int,
    *,
    block: tuple[int, int],
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Keys (Q, min(k, M)) of the best documents of each query, best first, on the CPU.

    Scores are products in fp32, whatever the shards' dtype. The documents are read once, `block[0]`
    at a time, and scored by `block[1]` queries at a time; what a block finds is merged into the
    best so far.

    Args:
        queries: (Q, D) unit vectors, fp32.
        block: of `plan`.
    """
    k, (most, some) = min(k, vectors.documents), block
    queries = queries.float().to(device)
    best = torch.full((len(queries), k), ABSENT, device=device)
    # Made once: what is made anew for each block leaves gaps in the heap, twice what is in use.
    rows = torch.empty(min(most, vectors.window), vectors.dimension)
    work = [
        torch.empty(len(rows) * min(some, len(queries)), dtype=dtype, device=device)
        for dtype in (torch.float32, torch.int32, torch.int64)
    ]
    bar = tqdm(total=vectors.documents, unit="document", desc="search", disable=not progress)
    for shard in range(vectors.shards):
        stored = vectors.shard(shard)
        for start in range(0, len(stored), len(rows)):
            n = min(len(rows), len(stored) - start)
            np.copyto(rows[:n].numpy(), stored[start : start + n])
            documents = rows[:n].to(device).t()
            first = shard * vectors.window + start
            places = ids.places(slice(first, first + n)).to(device)
            for at in range(0, len(queries), some):
                part = queries[at : at + some]
                scores, spare, keys = (w[: len(part) * n].view(len(part), n) for w in work)
                torch.mm(part, documents, out=scores)
                found = to_keys(scores, places, spare, keys).topk(min(k, n), dim=1).values
                both = torch.cat((best[at : at + some], found), 1)
                best[at : at + some] = both.topk(k, dim=1).values
            bar.update(n)
    bar.close()
    return best.cpu()
