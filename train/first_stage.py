"""What mining finds and scores with: BM25 or a model's vectors first, then a model's logits."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval import retrieval
from eval.collections import Collection
from model.files import write_array
from model.unimoer import UniMoER

SHARD = 8192  # documents whose vectors are one file

Run = dict[str, dict[str, float]]  # query id -> document id -> score, best first
Search = Callable[[list[list[str]], int], Iterator[Run]]  # parts of query ids, k -> their runs
Score = Callable[[list[tuple[str, str]]], list[float]]  # of (query id, document id) pairs


def lexical(collection: Collection) -> tuple[Search, Score]:
    """BM25 over the training pool: its runs, and its score of any pair."""
    index = collection.bm25("train")

    def search(parts: list[list[str]], k: int) -> Iterator[Run]:
        for queries in parts:
            yield index.search({q: collection.queries[q] for q in queries}, k)

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        wanted: dict[str, list[str]] = {}
        for query, document in pairs:
            wanted.setdefault(query, []).append(document)
        found = {
            query: dict(zip(row, index.score(collection.queries[query], row), strict=True))
            for query, row in wanted.items()
        }
        return [found[query][document] for query, document in pairs]

    return search, score


def dense(
    model: UniMoER, collection: Collection, pool: Sequence[str], folder: Path
) -> tuple[Search, Score]:
    """Exact search by cosine over the pool's vectors, which are computed once, shard by shard."""
    shards = []
    for at in tqdm(range(0, len(pool), SHARD), desc="documents", unit="shard", leave=False):
        path = folder / f"{at // SHARD:06d}.npy"
        if not path.exists():
            texts = [collection.corpus[d] for d in pool[at : at + SHARD]]
            write_array(path, model.encode_document(texts, progress=False).numpy())
        shards.append(path)
    place = {document: i for i, document in enumerate(pool)}
    ids = retrieval.Ids.of(pool)
    asked: dict[str, Tensor] = {}  # of the latest search; they are scored next

    def search(parts: list[list[str]], k: int) -> Iterator[Run]:
        queries = [q for part in parts for q in part]
        vectors = model.encode_query([collection.queries[q] for q in queries], progress=False)
        asked.clear()
        asked.update(zip(queries, vectors, strict=True))
        best = retrieval.Best(vectors.to(model.device), ids, k)
        for path in tqdm(shards, desc="search", unit="shard", leave=False):
            best.add(torch.from_numpy(np.load(path)))
        sizes = [len(part) for part in parts]
        for part, keys in zip(parts, best.keys.cpu().split(sizes), strict=True):
            yield retrieval.to_run(keys, part, ids)

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        found = [0.0] * len(pairs)
        at = [place[document] for _, document in pairs]
        for shard, run in groupby(
            sorted(range(len(pairs)), key=at.__getitem__), lambda i: at[i] // SHARD
        ):
            there = np.load(shards[shard], mmap_mode="r")  # one open at a time
            for i in run:
                vector = torch.from_numpy(np.array(there[at[i] % SHARD]))
                found[i] = float(asked[pairs[i][0]] @ vector)
        return found

    return search, score


def logits(model: UniMoER, collection: Collection) -> Score:
    """Of a model that scores pair by pair."""

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        texts = [(collection.queries[q], collection.corpus[d]) for q, d in pairs]
        return model.score_pairs(texts).tolist()

    return score


def sigmoid(score: Score) -> Score:
    """Of logits, in float64: in fp32 everything above 17 would score alike."""
    return lambda pairs: torch.tensor(score(pairs), dtype=torch.float64).sigmoid().tolist()
