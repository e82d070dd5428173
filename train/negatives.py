"""Training negatives, fixed per query, so that every arm and seed sees the same: drawn from BM25's
top, or read from a folder that `train.mining` wrote."""

import hashlib
import json
import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.bm25 import BM25
from eval.collections import Collection
from model.files import read_json

MINED, MANIFEST = "negatives.jsonl", "manifest.json"  # what a mined folder holds


def best_positive(relevant: Mapping[str, int]) -> str:
    """The one positive of a query, from document id -> grade: the best grade, then smallest id."""
    return min(relevant, key=lambda document: (-relevant[document], document))


def stranger(
    query: str,
    rng: random.Random,
    pool: Sequence[str],
    corpus: Mapping[str, str],
    taken: Container[str],
    texts: Container[str],
    count: int,
) -> str:
    """A document of the pool that is not among the ids `taken`, nor its text among `texts`.

    Raises:
        ValueError: 100 * `count` draws have found none. count: how many the query needs in all.
    """
    for _ in range(100 * count):
        document = rng.choice(pool)
        if document not in taken and corpus[document] not in texts:
            return document
    raise ValueError(
        f"query {query!r}: fewer than {count} negatives in a pool of {len(pool)} "
        "documents: lower group_size or hard_negatives, or give a larger corpus"
    )


def bm25_negatives(
    bm25: BM25,
    queries: Mapping[str, str],
    relevant: Mapping[str, Mapping[str, int]],
    corpus: Mapping[str, str],
    pool: Sequence[str],
    depth: int,
    count: int,
) -> dict[str, list[str]]:
    """`count` documents per query from BM25's top `depth`, none of them relevant.

    Drawn without replacement by a generator seeded with the query id. Documents whose text equals
    a relevant one's are false negatives and left out. A query with too few is filled up from the
    pool. What one query gets does not depend on the others.

    Args:
        bm25: of the pool. relevant: query id -> document id -> grade. pool: the documents to draw
            from.
    Raises:
        ValueError: the pool is too small to draw from.
    """
    chosen = {}
    for query, asked in queries.items():
        positives = {d for d, grade in relevant[query].items() if grade > 0}
        texts = {corpus[d] for d in positives}
        rng = random.Random(query)
        found, k, ended = [], depth + len(positives), False
        while len(found) < depth and not ended:  # once, unless there are copies of the relevant
            run = bm25.search({query: asked}, k)[query]
            found = [d for d in run if d not in positives and corpus[d] not in texts][:depth]
            k, ended = 2 * k, len(run) < k
        picked = rng.sample(found, min(count, len(found)))
        while len(picked) < count:
            taken = positives.union(picked)
            picked.append(stranger(query, rng, pool, corpus, taken, texts, count))
        chosen[query] = picked
    return chosen


@dataclass(frozen=True)
class Mined:
    """negatives: query id -> document ids. teacher: query id -> document id -> the teacher's logit
    of the pair, for the positive and the negatives; {} where no teacher was asked for."""

    negatives: dict[str, list[str]]
    teacher: dict[str, dict[str, float]]


def mined_sha256(folder: Path) -> str:
    """The hash of a mined folder's lines, which stands in the config of a trial that uses them.

    Raises:
        ValueError: there is no such folder, it is not finished, or its lines have been changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"negatives={folder}: {path} is missing; expected bm25 or a folder of "
            "`python -m train mine`"
        )
    expected = read_manifest(path).get("sha256")
    if expected is None:
        raise ValueError(f"{folder} is not finished: run its `python -m train mine` again")
    if not (folder / MINED).is_file():
        raise ValueError(f"{folder / MINED} is missing, {path} is whole: mine into another folder")
    with open(folder / MINED, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{folder / MINED} was changed after it was mined: its sha256 is {found}, {path} says "
            f"{expected}. Mine it again into another folder"
        )
    return found


def read_mined(
    folder: Path,
    sha256: str,
    collection: Collection,
    positive: Mapping[str, str],
    relevant: Mapping[str, Mapping[str, int]],
    count: int,
    teacher: bool,
) -> Mined:
    """The first `count` mined negatives of each query, in the file's order.

    Args:
        sha256: what the config says; "" takes the file as it is.
        positive: query id -> document id, of the queries that are wanted. relevant: as above.
        teacher: whether the scores of a teacher are needed.
    Raises:
        ValueError: the folder is not finished, changed, or of other data; a query is missing, has
            too few negatives, another positive, a relevant document as negative, or no scores.
    """
    found = mined_sha256(folder)
    if sha256 not in ("", found):
        raise ValueError(
            f"{folder} has changed: its lines have sha256 {found}, this trial began with {sha256}"
        )
    mark = read_manifest(folder / MANIFEST)["data"]["fingerprint"]
    if mark != collection.fingerprint:
        raise ValueError(
            f"{folder} was mined from data with fingerprint {mark}, {collection.name} has "
            f"{collection.fingerprint}: mine from this data"
        )
    mined = Mined({}, {})
    with open(folder / MINED, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{folder / MINED}:{number}"
            row = json.loads(line)
            query = row["query"]
            if query not in positive:
                continue
            documents = list(row["negatives"])[:count]
            if len(documents) < count:
                raise ValueError(
                    f"{where}: query {query!r} has {len(documents)} negatives, training needs "
                    f"{count}: mine with --fill, wider --ranks, a larger --margin or more "
                    "--negatives, or lower group_size or hard_negatives"
                )
            if row["positive"] != positive[query]:
                raise ValueError(
                    f"{where}: the positive of query {query!r} is {row['positive']!r}, expected "
                    f"{positive[query]!r}: mine again"
                )
            if known := [d for d in documents if relevant[query].get(d, 0) > 0]:
                raise ValueError(
                    f"{where}: {known[0]!r} is relevant to query {query!r}: mine again"
                )
            mined.negatives[query] = documents
            if teacher:
                if "teacher" not in row:
                    raise ValueError(
                        f"{where}: no teacher's scores, which distill needs: mine with --teacher"
                    )
                group = [positive[query], *documents]
                mined.teacher[query] = {d: row["teacher"][d] for d in group}
    if absent := [query for query in positive if query not in mined.negatives]:
        raise ValueError(
            f"{folder / MINED} has no line for query {absent[0]!r} ({len(absent)} of "
            f"{len(positive)} are missing): mine with a larger --queries (0: all)"
        )
    return mined


def read_manifest(path: Path) -> dict:
    """What a mined folder says of itself."""
    return read_json(path, "mine again")
