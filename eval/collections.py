"""Text collections: Python's standard library, BEIR folders, BEIR sets of the Hugging Face hub."""

import hashlib
import json
import platform
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from eval import beir
from eval.stdlib import documented_functions, split_modules


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments.

    Attributes:
        name: as results are filed.
        corpus: document id -> text (title and text joined by a newline when there is a title).
        queries: query id -> text.
        qrels: split ("train", "dev", "test") -> query id -> document id -> grade.
        domain: query id -> domain (stdlib: the top-level module); empty when unknown.
        pools: split -> the ids of the documents that this split searches (BEIR: the whole corpus;
            stdlib: the functions of the split's own modules).
        fingerprint: sha256 (hex) over the content; does not depend on order or on the source.
        provenance: where it came from, e.g. {"python": "3.11.7"}, hub revisions, or the path.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, dict[str, int]]]
    domain: dict[str, str]
    pools: dict[str, list[str]]
    fingerprint: str
    provenance: dict[str, str]


def load(data: str, cache: Path | None = None) -> Collection:
    """Load a collection.

    Args:
        data: "stdlib", a name in `beir.HUB_SPLITS`, or the path of a BEIR folder. A name wins over
            a folder of that name: write ./scifact for the folder.
        cache: where hub files are kept; by default huggingface_hub's own cache. "stdlib" is built
            anew each time (3.5 s on one core).
    Raises:
        ValueError: nothing of that name; a missing or malformed file (with file and line); no
            network and nothing cached.
    """
    if data == "stdlib":
        return stdlib(Path(sysconfig.get_path("stdlib")))
    return _beir(beir.find(data, cache))


def require_split(collection: Collection, split: str) -> dict[str, dict[str, int]]:
    """The judgments of a split.

    Raises:
        ValueError: the collection has no such split, or it is empty.
    """
    if not collection.qrels.get(split):
        raise ValueError(
            f"{collection.name} has no {split} split (it has {', '.join(collection.qrels)}): add "
            f"qrels/{split}.tsv to a copy of it, or choose another DATA"
        )
    return collection.qrels[split]


def fingerprint(
    corpus: dict[str, str],
    queries: dict[str, str],
    qrels: dict[str, dict[str, dict[str, int]]],
    domain: dict[str, str],
) -> str:
    """sha256 (hex) over the content, the same in whatever order it was read."""
    digest = hashlib.sha256()
    for kind, texts in (("document", corpus), ("query", queries), ("domain", domain)):
        for key in sorted(texts):
            digest.update(json.dumps([kind, key, texts[key]]).encode())
    for split in sorted(qrels):
        for query in sorted(qrels[split]):
            row = sorted(qrels[split][query].items())
            digest.update(json.dumps(["qrels", split, query, row]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- stdlib


def stdlib(root: Path) -> Collection:
    """The standard library under `root`: docstrings ask, functions answer.

    Query: the first sentence of the docstring of a function or method (not of one nested in
    another function: its text is part of the outer one). Document: its source, decorators
    included, without docstrings. Whole top-level modules go to one split (`split_modules`).

    Duplicates: within a split, equal documents become one document and equal queries one query
    with several relevant documents; the domain of such a query is the module that most of its
    functions come from. Across splits nothing may be shared, or the test set would be seen in
    training: a pair whose query *or* document text also occurs in the test split is dropped from
    dev and train, one that occurs in dev is dropped from train.
    """
    pairs = list(documented_functions(root))
    if not pairs:
        raise ValueError(
            f"no function with a docstring under {root}: this Python carries no sources of its "
            "standard library; use another one, or pass DATA=path or a BEIR name"
        )
    split_of = split_modules(Counter(pair.module for pair in pairs))
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {split: {} for split in ("train", "dev", "test")}
    pools: dict[str, list[str]] = {split: [] for split in qrels}
    votes: dict[str, Counter[str]] = {}
    taken_queries: set[str] = set()
    taken_documents: set[str] = set()
    dropped = 0
    for split in ("test", "dev", "train"):  # the held-out side keeps what both sides have
        own = [pair for pair in pairs if split_of[pair.module] == split]
        kept = [
            p for p in own if p.query not in taken_queries and p.document not in taken_documents
        ]
        dropped += len(own) - len(kept)
        query_ids: dict[str, str] = {}
        document_ids: dict[str, str] = {}
        for pair in kept:
            # "q:" because some evaluators discard a document whose id is the query's own
            query = query_ids.setdefault(pair.query, "q:" + pair.id)
            document = document_ids.setdefault(pair.document, pair.id)
            queries[query], corpus[document] = pair.query, pair.document
            qrels[split].setdefault(query, {})[document] = 1
            votes.setdefault(query, Counter())[pair.module] += 1
        pools[split] = list(document_ids.values())
        taken_queries |= query_ids.keys()
        taken_documents |= document_ids.keys()
    domain = {query: max(sorted(count), key=count.__getitem__) for query, count in votes.items()}
    provenance = {
        "python": platform.python_version(),
        "modules": " ".join(f"{s} {list(split_of.values()).count(s)}" for s in qrels),
        "pairs dropped from train and dev": str(dropped),
    }
    mark = fingerprint(corpus, queries, qrels, domain)
    return Collection("stdlib", corpus, queries, qrels, domain, pools, mark, provenance)


# --------------------------------------------------------------------------------------- BEIR sets


def _beir(files: beir.Files) -> Collection:
    texts: dict[str, str] = {}
    for where, key, text in beir.documents(files):
        if key in texts:
            raise ValueError(
                f"{where}: document id {key!r} occurs a second time; expected unique ids"
            )
        texts[key] = text
    queries, domain = beir.read_queries(files.queries)
    splits, origin = beir.judgments(files, queries, texts)
    everything = list(texts)
    pools = dict.fromkeys(splits, everything)  # one list: the largest corpus has 8.8 million ids
    mark = fingerprint(texts, queries, splits, domain)
    provenance = files.provenance | origin
    return Collection(files.name, texts, queries, splits, domain, pools, mark, provenance)
