"""Full-corpus dense retrieval: every query against every document of the pool, exactly."""

from collections.abc import Sequence

from torch import Tensor


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
        chunk: queries scored at once; bounds the score matrix at chunk * M values.
    Returns:
        query id -> document id -> cosine.
    """
    run = {}
    for start in range(0, len(query_ids), chunk):
        scores = queries[start : start + chunk] @ documents.t()
        best = scores.topk(min(k, len(document_ids)), dim=1)
        for row, (values, places) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            found = zip(places, values, strict=True)
            run[query_ids[start + row]] = {document_ids[p]: v for p, v in found}
    return run
