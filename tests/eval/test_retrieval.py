"""eval/retrieval.py: exact search, whatever the chunk, the shards and the ties."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.retrieval import ABSENT, Ids, exact, from_keys, plan, search, to_keys, to_run
from tests.eval.stored import grid, names, store

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


# ----------------------------------------------------------------------------- keys, ties, shards


SCORES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf]


def test_keys_are_ordered_as_score_and_place_are():
    pairs = [(score, place) for score in SCORES for place in (0, 1, 7, 2**31, 2**32 - 1)]
    random.Random(0).shuffle(pairs)
    scores, places = torch.tensor([s for s, _ in pairs]), torch.tensor([p for _, p in pairs])
    keys = to_keys(scores.clone(), places)
    by_key = [pairs[i] for i in keys.argsort().tolist()]
    expected = sorted((float(np.float32(s)), p) for s, p in pairs)
    assert [(float(np.float32(s)), p) for s, p in by_key] == expected
    back, at = from_keys(keys)
    assert torch.equal(back, scores) and torch.equal(at, places)
    assert keys.min() > ABSENT and len(set(keys.tolist())) == len(pairs) - 5  # 0.0 is -0.0


def test_scores_that_float32_cannot_tell_apart_are_ties():
    higher = torch.tensor([1.0 + 1e-9, 1.0], dtype=torch.float64)
    keys = to_keys(higher, torch.tensor([0, 1]))
    assert keys.argmax() == 1


def by_hand(queries: Tensor, documents: Tensor, ids: list[str], k: int) -> list[list[str]]:
    """All documents by score, equal ones by id, descending; cut at k."""
    scores = queries.double() @ documents.double().t()
    return [
        [d for _, d in sorted(zip(row, ids, strict=True), reverse=True)[:k]]
        for row in scores.tolist()
    ]


@pytest.mark.parametrize("k", [1, 5, 40, 100])
def test_ties_at_the_cut_are_settled_by_id(k):
    """As trec_eval orders them, so a shallow ranking is the beginning of a deep one."""
    queries, documents, ids = grid(7, 4, 0), grid(40, 4, 1), names(40)
    run = search(queries, documents, QUERIES, ids, k)
    assert [list(row) for row in run.values()] == by_hand(queries, documents, ids, k)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (7, 100), (100, 3)])
@pytest.mark.parametrize("k", [1, 6, 60, 1000])
def test_shards_in_blocks_are_brute_force(tmp_path, dtype, block, k):
    queries, documents, ids = grid(9, 6, 2), grid(60, 6, 3), names(60)
    stored = store(tmp_path, documents, ids, 7, dtype)
    keys = exact(queries, stored, Ids(stored.ids()), k, block=block)
    run = to_run(keys, [f"q{i}" for i in range(9)], Ids(stored.ids()))
    assert [list(row) for row in run.values()] == by_hand(queries, documents, ids, k)
    scores = queries @ documents.t()
    for i, row in enumerate(run.values()):
        assert list(row.values()) == [scores[i, ids.index(d)].item() for d in row]


@pytest.mark.gpu
def test_the_card_finds_the_same(tmp_path):
    queries, documents, ids = grid(9, 6, 2), grid(60, 6, 3), names(60)
    stored = store(tmp_path, documents, ids, 7, "float16")
    order = Ids(stored.ids())
    found = exact(queries, stored, order, 20, block=(3, 2), device="cuda")
    assert torch.equal(found, exact(queries, stored, order, 20, block=(3, 2)))


def test_shards_agree_with_memory(tmp_path):
    """Real vectors: the same rankings, the scores to rounding."""
    generator = torch.Generator().manual_seed(4)
    queries, documents = torch.randn(240, 16, generator=generator).split((40, 200))
    queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    ids, asked = names(200), [f"q{i}" for i in range(40)]
    expected = search(queries, documents, asked, ids, 20)
    stored = store(tmp_path, documents, ids, 64, "float32")
    order = Ids(stored.ids())
    found = to_run(exact(queries, stored, order, 20, block=(50, 7)), asked, order)
    assert [list(row) for row in found.values()] == [list(row) for row in expected.values()]
    for query in asked:
        assert found[query] == pytest.approx(expected[query], abs=1e-6)


def test_ids_have_places_and_are_looked_up():
    ids = names(50)
    order = Ids(np.array([key.encode() for key in ids]))
    expected = [sorted(ids).index(key) for key in ids]  # by character, as bytes are in UTF-8
    assert order.places(slice(None)).tolist() == expected
    assert order.places(np.array([3, 49, 0])).tolist() == [expected[i] for i in (3, 49, 0)]
    assert order.names(np.array(expected)) == ids and len(order) == 50
    assert order.absent([*ids, "a", "zz", "a1000000000", ""]) == ["a", "zz", "a1000000000", ""]


def test_the_plan_keeps_to_its_bound():
    """Whatever the bound, what a block takes beside the fixed part fits in it."""
    sizes = {"queries": 6980, "documents": 8_841_823, "dimension": 1024, "k": 1000, "id_bytes": 7}
    fixed = 8_841_823 * (7 + 16) + 6980 * (4 * 1024 + 8 * 1000) + 10_000 * 4 * 1024
    before = (0, 0)
    for memory in (0.35e9, 0.5e9, 1e9, 4e9, 64e9):
        n, q = plan(memory, rows=10_000, **sizes)
        assert 1 <= n <= 10_000 and 1 <= q <= 6980
        assert fixed + n * (4 * 1024 + 8) + q * (16 * n + 32 * 1000) <= memory
        assert n >= before[0]
        before = (n, q)
    assert before == (10_000, 6980)
    with pytest.raises(ValueError, match="--memory 0.25 GB: 6,980 queries, depth 1,000 and 8,841,"):
        plan(0.25e9, rows=10_000, **sizes)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since it was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to reset")
def test_the_search_keeps_to_its_bound(tmp_path):
    """All keys at once would be 128 MB of work; 8 MB are allowed, and 8 for the allocator."""
    queries, documents = grid(200, 16, 7), grid(40_000, 16, 8)
    stored = store(tmp_path, documents, [f"{i:05}" for i in range(40_000)], 5000, "float16")
    del documents
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    raw = stored.ids()
    block = plan(8e6, 200, 40_000, 16, 50, raw.itemsize, 5000)
    exact(queries, stored, Ids(raw), 50, block=block)
    assert block[1] < 200 and resident("VmHWM") - before < 16e6
