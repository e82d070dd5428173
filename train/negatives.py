"""Training negatives from BM25, fixed per query, so that every arm and seed sees the same."""

import random
from collections.abc import Mapping

from eval.bm25 import BM25


def bm25_negatives(
    queries: Mapping[str, str],
    relevant: Mapping[str, Mapping[str, int]],
    corpus: Mapping[str, str],
    pool: list[str],
    depth: int,
    count: int,
) -> dict[str, list[str]]:
    """`count` documents per query from BM25's top `depth`, none of them relevant.

    Drawn without replacement by a generator seeded with the query id. Documents whose text equals
    a relevant one's are false negatives and left out. A query with too few is filled up from the
    pool.

    Args:
        relevant: query id -> document id -> grade. pool: the documents to draw from.
    Raises:
        ValueError: the pool is too small to draw from.
    """
    bm25 = BM25(pool, [corpus[d] for d in pool])
    longest = max((len(relevant[q]) for q in queries), default=0)
    runs = bm25.search(dict(queries), depth + longest)
    chosen = {}
    for query in queries:
        positives = {d for d, grade in relevant[query].items() if grade > 0}
        texts = {corpus[d] for d in positives}
        rng = random.Random(query)
        found = [d for d in runs[query] if d not in positives and corpus[d] not in texts][:depth]
        picked = rng.sample(found, min(count, len(found)))
        tried = 0
        while len(picked) < count:
            document = rng.choice(pool)
            tried += 1
            if tried > 100 * count:
                raise ValueError(
                    f"query {query!r}: fewer than {count} negatives in a pool of {len(pool)} "
                    "documents: lower group_size or hard_negatives, or give a larger corpus"
                )
            if document not in positives and document not in picked:
                if corpus[document] not in texts:
                    picked.append(document)
        chosen[query] = picked
    return chosen
