"""Text collections: Python's standard library, BEIR folders, the benchmarks of eval/hub.py."""

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from eval import hub, mteb_data
from eval.bm25 import BM25
from eval.command import exit_status
from eval.sources import Qrels, Sources, documents, folder, read_queries, read_splits
from eval.stdlib import documented_functions, kept_functions, split_modules
from eval.store import StoredTexts, stored
from model import bases

KEPT_FROM = 100_000  # documents, above which BM25's index is kept on disk
STORED_BYTES = 2**30  # of corpus files, above which texts stay on disk; see eval/store.py


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments.

    Attributes:
        name: as results are filed.
        corpus: document id -> text (title and text joined by a newline when there is a title);
            read from disk one by one where the files are larger than `STORED_BYTES`.
        queries: query id -> text.
        qrels: split ("train", "dev", "test") -> query id -> document id -> grade.
        domain: query id -> domain (stdlib: the top-level module); empty when unknown.
        pools: split -> the ids of the documents that this split searches (BEIR: the whole corpus;
            stdlib: the functions of the split's own modules).
        fingerprint: sha256 (hex) over the content; does not depend on order or on the source.
        provenance: where it came from, e.g. {"python": "3.11.7"}, hub revisions, or the path.
        excluded: query id -> documents that are taken out of every ranking before it is scored,
            because the authors say that they are neither right nor wrong.
        language: of documents and queries (ISO 639-1, or 639-3 where it is another of mteb's);
            BM25 cuts and stems words by it.
        instruction: the task in words, as the authors give it to the models; "" for none.
        relevant_from: split -> the lowest grade that counts as relevant in scores, where not 1.
        negatives: (depth, count) -> query id -> BM25's hard negatives, kept by `train.batches`.
        frequencies: (split, terms) -> term -> documents with it, kept by `analysis.properties`.
    """

    name: str
    corpus: Mapping[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, dict[str, int]]]
    domain: dict[str, str]
    pools: Mapping[str, Sequence[str]]
    fingerprint: str
    provenance: dict[str, str]
    excluded: dict[str, list[str]] = field(default_factory=dict)
    language: str = "en"
    instruction: str = ""
    relevant_from: dict[str, int] = field(default_factory=dict)
    # What a process has found out about it, for all of its trials
    _indices: dict[int, BM25] = field(default_factory=dict, init=False, repr=False, compare=False)
    _orders: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    negatives: dict[tuple[int, int], dict[str, list[str]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    frequencies: dict[tuple[str, frozenset[str]], Counter[str]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def bm25(self, split: str) -> BM25:
        """The index over a split's pool, made when it is first asked for; splits that search the
        same pool share it. That of more than `KEPT_FROM` documents stays in the cache."""
        pool = self.pools[split]
        if id(pool) not in self._indices:
            folder = bases.cache_folder() / "bm25" if len(pool) > KEPT_FROM else None
            content = _content(self.corpus, pool) if folder else ""
            self._indices[id(pool)] = BM25(
                pool, Texts(self.corpus, pool), language=self.language,
                folder=folder, content=content,
            )  # fmt: skip
        return self._indices[id(pool)]

    def relevant(self, split: str) -> dict[str, dict[str, int]]:
        """Query id -> relevant documents with their grades: those of every query of the split that
        asks the same, so that none of them is taken for a negative."""
        of_text: dict[str, dict[str, int]] = {}
        for query, row in self.qrels[split].items():
            found = of_text.setdefault(words(self.queries[query]), {})
            for document, grade in row.items():
                if grade > 0:
                    found[document] = max(grade, found.get(document, 0))
        return {query: of_text[words(self.queries[query])] for query in self.qrels[split]}

    def order(self, split: str) -> str:
        """A hash (hex) over a split's judged queries and documents in their order, of which the
        fingerprint knows nothing: what is kept by position is kept under it."""
        if split not in self._orders:
            digest = hashlib.sha256()
            for kind, ids in (("query", self.qrels[split]), ("document", self.pools[split])):
                for key in ids:
                    digest.update(json.dumps([kind, key]).encode())
            self._orders[split] = digest.hexdigest()[:16]
        return self._orders[split]

    @property
    def identity(self) -> dict[str, str]:
        """What a result says of it: name, content, and where it came from, but for a folder."""
        origin = {k: v for k, v in self.provenance.items() if k != "path"}
        return {"name": self.name, "fingerprint": self.fingerprint, **origin}


def _content(corpus: Mapping[str, str], pool: Sequence[str]) -> str:
    """A hash (hex) of the texts alone: other judgments of a corpus leave its index as it is."""
    if isinstance(corpus, StoredTexts):
        return corpus.digest
    digest = hashlib.sha256()
    for key in pool:
        digest.update(json.dumps([key, corpus[key]]).encode())
    return digest.hexdigest()


class Texts(Sequence[str]):
    """The texts of some documents, each looked up when it is asked for."""

    def __init__(self, corpus: Mapping[str, str], ids: Sequence[str]):
        self._corpus, self._ids = corpus, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> "Texts": ...
    def __getitem__(self, at: int | slice) -> "str | Texts":
        if isinstance(at, slice):
            return Texts(self._corpus, self._ids[at])
        return self._corpus[self._ids[at]]


def load(data: str, cache: Path | None = None) -> Collection:
    """Load a collection.

    Args:
        data: "stdlib", a name of eval/hub.py ("scifact", "cqadupstack/android", "bright/biology",
            "miracl/sw", "mmarco/es", "triviaqa", "nq-train"), "mteb/" and the name of a
            retrieval task of mteb, or the path of a BEIR folder. A name
            wins over a folder of that name: write ./scifact for the folder.
        cache: where hub files are kept, by default huggingface_hub's own cache; and stored texts,
            by default ours. What the hub may not have ("bioasq") is a BEIR folder of that name in
            it. The functions of "stdlib" are kept there too.
    Raises:
        ValueError: nothing of that name; a missing or malformed file (with file and line); no
            network and nothing cached.
    """
    if data == "stdlib":
        place = cache or bases.cache_folder() / "data"
        return stdlib(Path(sysconfig.get_path("stdlib")), place)
    return _read(find(data, cache), cache)


def require_known(data: str) -> None:
    """Raise ValueError unless something is called `data`, or is a folder; nothing is read."""
    if data == "stdlib" or data in hub.GATED or hub.known(data) or data in hub.GROUPS:
        return
    if data.startswith(mteb_data.PREFIX) and not Path(data).is_dir():
        return  # mteb, which takes seconds to import, says what it has
    if not Path(data).is_dir():
        raise ValueError(
            f"DATA={data}: neither a collection nor a folder; expected 'stdlib', one of "
            f"{', '.join([*hub.HUB_SPLITS, 'triviaqa', *hub.PAIRS])}, one of "
            f"{', '.join(hub.FAMILIES)} with its part (bright/biology, miracl/sw), mteb/ and a "
            "retrieval task's name (mteb/FiQA2018), or the path of a BEIR folder (corpus.jsonl, "
            "queries.jsonl, qrels/test.tsv)"
        )


def find(data: str, cache: Path | None = None) -> Sources:
    """The files of whatever `load` loads, but for "stdlib", which has none; they are not read.

    Raises:
        ValueError: nothing of that name; a missing file; no network and nothing cached.
    """
    if data in hub.GATED:
        if why := missing(data, cache):
            raise ValueError(f"DATA={data}: {why}, or pass another folder: DATA=path")
        assert cache is not None
        return folder(cache / data)
    if hub.known(data):
        return hub.find(data, cache)
    if data in hub.GROUPS:
        raise ValueError(
            f"DATA={data} is {len(hub.GROUPS[data])} collections: `make eval BENCH=beir` takes "
            f"them all, elsewhere name one, such as {hub.GROUPS[data][0]}"
        )
    require_known(data)
    if not Path(data).is_dir():
        return mteb_data.find(data, (cache or bases.cache_folder() / "data") / "mteb")
    return folder(Path(data))


def missing(data: str, cache: Path | None) -> str:
    """Why `data` cannot be had, and from whom it can; "" if nothing stands in its way."""
    if data not in hub.GATED or (cache is not None and (cache / data).is_dir()):
        return ""
    place = f"at {cache / data}" if cache is not None else "into the cache"
    return (
        f"its licence keeps it off the hub: get it from {hub.GATED[data]} and put it, as a BEIR "
        f"folder, {place}"
    )


def require_split(collection: Collection, split: str) -> dict[str, dict[str, int]]:
    """The judgments of a split.

    Raises:
        ValueError: the collection has no such split, or it is empty.
    """
    if not collection.qrels.get(split):
        other = "" if split == "train" else "measure one of these (--split), "
        raise ValueError(
            f"{collection.name} has no {split} split (it has {', '.join(collection.qrels)}): "
            f"{other}add qrels/{split}.tsv to a copy of it, or choose another DATA"
        )
    return collection.qrels[split]


def fingerprint(
    corpus: Mapping[str, str],
    queries: dict[str, str],
    qrels: dict[str, dict[str, dict[str, int]]],
    domain: dict[str, str],
    excluded: dict[str, list[str]] | None = None,
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
    for query, out in sorted((excluded or {}).items()):
        digest.update(json.dumps(["excluded", query, sorted(out)]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- stdlib


def stdlib(root: Path, cache: Path | None = None) -> Collection:
    """The standard library under `root`: docstrings ask, functions answer.

    Query: the first sentence of the docstring of a function or method (not of one nested in
    another function: its text is part of the outer one). Document: its source, decorators
    included, without docstrings. Whole top-level modules go to one split (`split_modules`).

    Duplicates: within a split, equal documents become one document and equal queries one query
    with several relevant documents; the domain of such a query is the module that most of its
    functions come from. Across splits nothing may be shared, or the test set would be seen in
    training: a pair whose query *or* document text also occurs in the test split is dropped from
    dev and train, one that occurs in dev is dropped from train.

    cache: where the functions are kept; None: they are looked for anew.
    """
    pairs = list(documented_functions(root)) if cache is None else kept_functions(root, cache)
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


# --------------------------------------------------------------------- BEIR folders and the hub


def _read_bytes(file: Path) -> int:
    """About how many bytes of text a file holds: gzip and parquet hold three times their own."""
    return file.stat().st_size * (3 if file.suffix in (".gz", ".parquet") else 1)


def _read(sources: Sources, cache: Path | None) -> Collection:
    texts: Mapping[str, str]
    if sum(map(_read_bytes, sources.corpus)) > STORED_BYTES:
        place = (cache or bases.cache_folder() / "data") / "texts"
        texts = stored(sources.corpus, ((k, text) for _, k, text in documents(sources)), place)
    else:
        texts = {}
        for where, key, text in documents(sources):
            if key in texts:
                raise ValueError(
                    f"{where}: document id {key!r} occurs a second time; expected unique ids"
                )
            texts[key] = text
    queries = read_queries(sources, texts)
    splits, origin = read_splits(sources, queries, texts)
    origin |= _keep_apart(splits, queries.texts)
    beside = queries.texts, splits, queries.domain, queries.excluded
    if isinstance(texts, StoredTexts):
        everything = texts.ids
        mark = hashlib.sha256(f"{texts.digest} {fingerprint({}, *beside)}".encode()).hexdigest()
    else:
        everything, mark = list(texts), fingerprint(texts, *beside)
    pools = dict.fromkeys(splits, everything)  # one list: the largest corpus has 8.8 million ids
    return Collection(
        sources.name, texts, queries.texts, splits, queries.domain, pools, mark,
        sources.provenance | origin, queries.excluded, sources.language, sources.instruction,
        sources.relevant,
    )  # fmt: skip


def _keep_apart(splits: dict[str, Qrels], texts: Mapping[str, str]) -> dict[str, str]:
    """Take from train the queries that another split asks in the same words, under whatever id:
    they would be known there. Returns what is to be said of it."""
    if "train" not in splits:
        return {}
    asked = {words(texts[q]) for split, of in splits.items() if split != "train" for q in of}
    train = splits["train"]
    splits["train"] = {q: row for q, row in train.items() if words(texts[q]) not in asked}
    twice = len(train) - len(splits["train"])
    said = {"train queries that another split asks too": f"{twice}, left out of train"}
    return said if twice else {}


def words(text: str) -> str:
    """What two texts that ask the same have in common: case and spaces do not count."""
    return " ".join(text.split()).casefold()


def main(arguments: list[str] | None = None) -> None:
    """Fetch collections, read all of them, and say what they hold."""
    parser = argparse.ArgumentParser(prog="python -m eval.collections", description=main.__doc__)
    parser.add_argument(
        "data", nargs="+", help="stdlib, names of eval/hub.py, mteb/TASK, BEIR folders"
    )
    given = parser.parse_args(arguments)

    def show() -> None:
        for name in given.data:
            found = load(name, bases.cache_folder() / "data")
            splits = ", ".join(f"{len(of):,} {split}" for split, of in found.qrels.items())
            print(f"{found.name}: {len(found.corpus):,} documents; judged queries: {splits}; "
                  f"fingerprint {found.fingerprint[:12]}")  # fmt: skip

    sys.exit(exit_status(show))


if __name__ == "__main__":
    main()
