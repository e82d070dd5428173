"""eval/approximate.py: FAISS finds what the exact search finds, and says what it misses."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval import approximate
from eval.retrieval import ABSENT, Ids, exact, from_keys
from eval.vectors import Vectors
from tests.eval.stored import grid, names, store


def made(folder: Path, documents: Tensor, window: int = 64, dtype: str = "float32") -> Vectors:
    return store(folder, documents, names(len(documents)), window, dtype)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Tensor, Vectors, Ids]:
    generator = torch.Generator().manual_seed(0)
    documents = F.normalize(torch.randn(400, 16, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(30, 16, generator=generator), dim=-1)
    stored = made(tmp_path_factory.mktemp("faiss"), documents)
    return queries, stored, Ids(stored.ids())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", approximate.INDEXES)
@pytest.mark.parametrize("k", [1, 6, 150, 1000])
def test_all_of_it_is_the_exact_answer(tmp_path, kind, dtype, k):
    """A flat index, and lists that are all looked at; hundreds of ties, by the same rule."""
    queries, documents = grid(9, 4, 5), grid(200, 4, 6)
    stored = made(tmp_path, documents, dtype=dtype)
    ids = Ids(stored.ids())
    index = approximate.build(stored, kind, 1e9)
    if kind == "ivf":
        kept = faiss.IndexIVFFlat if dtype == "float32" else faiss.IndexIVFScalarQuantizer
        assert isinstance(index, kept) and index.nlist == 5  # one for 39 documents
    found = approximate.search(index, queries, ids, k, probes=5, chunk=4)
    assert torch.equal(found, exact(queries, stored, ids, k, block=(64, 9)))


def test_recall_is_what_the_lists_hold(real):
    """One list for each query: what is found are the best of that list, by brute force."""
    queries, stored, ids = real
    index = approximate.build(stored, "ivf", 1e9, lists=8)
    found = approximate.search(index, queries, ids, 10, probes=1)
    best = exact(queries, stored, ids, 10, block=(64, 30))
    assert isinstance(index, faiss.IndexIVF)
    centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, 8))
    documents = torch.from_numpy(np.concatenate([stored.shard(i) for i in range(stored.shards)]))
    home = (documents @ centroids.t()).argmax(1)
    shares = []
    for i, query in enumerate(queries):
        own = torch.nonzero(home == (query @ centroids.t()).argmax())[:, 0]
        top = own[(documents[own] @ query).topk(min(10, len(own))).indices]
        places = from_keys(found[i][found[i] != ABSENT])[1].tolist()
        assert places == ids.places(top.numpy()).tolist()
        all_best = from_keys(best[i])[1].tolist()
        shares.append(len(set(places) & set(all_best)) / 10)
    assert 0.1 < np.mean(shares) < 0.9
    assert approximate.recall(found, best, 10) == pytest.approx(np.mean(shares))
    more = [approximate.recall(approximate.search(index, queries, ids, 10, probes=p), best, 10)
            for p in (1, 4, 8)]  # fmt: skip
    assert more[0] < more[1] <= more[2] == 1


def test_recall_by_hand():
    expected = torch.tensor([[9, 8, 7], [9, 8, 7]])
    found = torch.tensor([[9, 7, 3], [8, ABSENT, ABSENT]])
    assert approximate.recall(found, expected, 1) == 1 / 2
    assert approximate.recall(found, expected, 3) == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_lists_that_hold_too_few_leave_places_empty(real):
    queries, stored, ids = real
    index = approximate.build(stored, "ivf", 1e9, lists=10)
    found = approximate.search(index, queries, ids, 300, probes=1)
    held = (found != ABSENT).sum(1)
    assert found.shape == (30, 300) and 0 < held.min() and held.max() < 300
    for row, count in zip(found, held.tolist(), strict=True):
        assert (row[count:] == ABSENT).all() and len(set(row[:count].tolist())) == count


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hnsw", {}, "index 'hnsw': expected exact or one of"),
        ("ivf", {"lists": 401}, "--lists 401: expected at most 400"),
        ("flat", {"memory": 25_599}, "the flat index of 400 documents takes .*--index exact"),
        ("flat", {"held": 1}, "takes 2.6e-05 GB and ids, queries and rankings 1e-09 GB: allow"),
        ("ivf", {"memory": 30_000}, "the ivf index of 400 documents takes"),
    ],
)
def test_what_cannot_be_built(real, kind, options, message):
    with pytest.raises(ValueError, match=message):
        approximate.build(real[1], kind, **{"memory": 25_600, **options})


def test_the_flat_index_fits_exactly(real):
    assert approximate.build(real[1], "flat", 400 * 16 * 4).ntotal == 400
    assert approximate.build(real[1], "flat", 400 * 16 * 4 + 9, held=9).ntotal == 400
