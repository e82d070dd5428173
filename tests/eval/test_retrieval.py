"""eval/retrieval.py: exact search, whatever the chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.retrieval import search

QUERIES = [f"q{i}" for i in range(7)]
DOCUMENTS = [f"d{i}" for i in range(23)]


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(30, 8, generator=generator).split((7, 23))
    return F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)


@pytest.mark.parametrize("k", [1, 5, 23, 100])
def test_it_is_brute_force(vectors, k):
    queries, documents = vectors
    run = search(queries, documents, QUERIES, DOCUMENTS, k)
    assert list(run) == QUERIES
    for i, query in enumerate(QUERIES):
        cosine = {d: float(queries[i] @ documents[j]) for j, d in enumerate(DOCUMENTS)}
        best = sorted(cosine, key=lambda d: -cosine[d])[:k]
        assert list(run[query]) == best
        assert run[query] == pytest.approx({d: cosine[d] for d in best}, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_the_chunk_does_not_matter(vectors, chunk):
    whole = search(vectors[0], vectors[1], QUERIES, DOCUMENTS, 5)
    found = search(vectors[0], vectors[1], QUERIES, DOCUMENTS, 5, chunk=chunk)
    assert list(found) == list(whole)
    for query in QUERIES:
        assert list(found[query]) == list(whole[query])
        assert found[query] == pytest.approx(whole[query], abs=1e-6)


def test_equal_documents_have_equal_scores(vectors):
    """Then trec_eval decides by id, not by where a document lies in the matrix."""
    queries, documents = vectors
    twins = torch.cat((documents, documents))
    run = search(queries, twins, QUERIES, [f"d{i:02d}" for i in range(46)], 46)
    for row in run.values():
        assert all(row[f"d{i:02d}"] == row[f"d{i + 23:02d}"] for i in range(23))
