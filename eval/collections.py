"""Text collections: Python's standard library, BEIR folders, BEIR sets of the Hugging Face hub."""

import gzip
import hashlib
import json
import platform
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from eval.stdlib import DEV_SHARE, documented_functions, split_modules
from eval.store import StoredTexts, stored
from model import bases

# The public BEIR sets (arXiv 2104.08663, table 1) on the hub and the splits of their qrels.
HUB_SPLITS = (
    dict.fromkeys(("msmarco", "nfcorpus", "hotpotqa", "fiqa", "fever"), ("train", "dev", "test"))
    | {"scifact": ("train", "test"), "quora": ("dev", "test"), "dbpedia-entity": ("dev", "test")}
    | dict.fromkeys(("trec-covid", "nq", "arguana", "scidocs"), ("test",))
    | dict.fromkeys(("webis-touche2020", "climate-fever"), ("test",))
)
STORED_BYTES = 2**30  # of corpus files, above which texts stay on disk; see eval/store.py
MOST_SHARDS = 32  # of a parquet file on the hub that are looked for
NOT_ON_HUB = ("bioasq", "signal1m", "trec-news", "robust04", "cqadupstack")  # not as one set there


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
    """

    name: str
    corpus: Mapping[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, dict[str, int]]]
    domain: dict[str, str]
    pools: Mapping[str, Sequence[str]]
    fingerprint: str
    provenance: dict[str, str]


def load(data: str, cache: Path | None = None) -> Collection:
    """Load a collection.

    Args:
        data: "stdlib", a name in `HUB_SPLITS`, or the path of a BEIR folder. A name wins over a
            folder of that name: write ./scifact for the folder.
        cache: where hub files are kept, by default huggingface_hub's own cache; and stored texts,
            by default ours. "stdlib" is built anew each time (3.5 s on one core).
    Raises:
        ValueError: nothing of that name; a missing or malformed file (with file and line); no
            network and nothing cached.
    """
    if data == "stdlib":
        return stdlib(Path(sysconfig.get_path("stdlib")))
    if data in HUB_SPLITS:
        return _hub(data, cache)
    if data in NOT_ON_HUB:
        raise ValueError(
            f"DATA={data}: BEIR does not publish it on the hub as one collection; get it from its "
            "owner and pass the folder: DATA=path"
        )
    if not Path(data).is_dir():
        raise ValueError(
            f"DATA={data}: neither a collection nor a folder; expected 'stdlib', one of "
            f"{', '.join(HUB_SPLITS)}, or the path of a BEIR folder (corpus.jsonl, queries.jsonl, "
            "qrels/test.tsv)"
        )
    return _folder(Path(data), cache)


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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


# ---------------------------------------------------------------------------------- BEIR folders


def _folder(path: Path, cache: Path | None) -> Collection:
    corpus, queries = (_plain_or_gz(path, name) for name in ("corpus.jsonl", "queries.jsonl"))
    qrels = {file.stem: file for file in sorted((path / "qrels").glob("*.tsv"))}
    if not qrels:
        raise ValueError(f"{path}: no qrels/*.tsv; expected at least qrels/test.tsv")
    return _beir(path.resolve().name, [corpus], [queries], qrels, {"path": str(path)}, cache)


def _plain_or_gz(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise ValueError(f"{folder}: neither {name} nor {name}.gz; expected a BEIR folder")


def _beir(
    name: str,
    corpus: list[Path],
    queries: list[Path],
    qrels: dict[str, Path],
    provenance: dict[str, str],
    cache: Path | None,
) -> Collection:
    """Read the files of a BEIR set; the dev split, when there is none, is taken from train."""
    if {"dev", "validation"} <= qrels.keys():
        raise ValueError(f"{qrels['dev'].parent}: dev.tsv and validation.tsv; expected one of them")
    texts: Mapping[str, str]
    if sum(file.stat().st_size for file in corpus) > STORED_BYTES:
        folder = (cache or bases.cache_folder() / "data") / "texts"
        texts = stored(corpus, ((key, text) for _, key, text in _documents(corpus)), folder)
    else:
        texts = {}
        for where, key, text in _documents(corpus):
            _add(where, "document", texts, key, text)
    asked: dict[str, str] = {}
    domain: dict[str, str] = {}
    for where, row in chain.from_iterable(map(_rows, queries)):
        text = _field(where, row, "text")
        if not text.strip():
            raise ValueError(f"{where}: query {row.get('_id')!r} is empty; expected a text")
        key = _field(where, row, "_id")
        _add(where, "query", asked, key, text)
        metadata = row.get("metadata")
        source = row if "domain" in row else metadata if isinstance(metadata, dict) else {}
        if label := _field(where, source, "domain", optional=True):
            domain[key] = label
    splits = {
        "dev" if split == "validation" else split: _qrels(file, texts, asked)
        for split, file in qrels.items()
    }
    if "dev" not in splits and "train" in splits:
        train = splits["train"]
        held = set(sorted(train, key=_sha256)[: max(1, round(DEV_SHARE * len(train)))])
        splits["dev"] = {q: train[q] for q in train if q in held}
        splits["train"] = {q: train[q] for q in train if q not in held}
        provenance = provenance | {"dev": "10 % of the train queries, by sha256 of their ids"}
    if isinstance(texts, StoredTexts):
        everything, mark = texts.ids, fingerprint({}, asked, splits, domain)
        mark = _sha256(f"{texts.digest} {mark}")
    else:
        everything, mark = list(texts), fingerprint(texts, asked, splits, domain)
    pools = dict.fromkeys(splits, everything)  # one list: the largest corpus has 8.8 million ids
    return Collection(name, texts, asked, splits, domain, pools, mark, provenance)


def _documents(files: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(where, id, text) of each document."""
    for where, row in chain.from_iterable(map(_rows, files)):
        title = _field(where, row, "title", optional=True)
        text = _field(where, row, "text")
        yield where, _field(where, row, "_id"), f"{title}\n{text}" if title else text


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank; plain or gzip, UTF-8."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as handle:
            for number, raw in enumerate(handle, 1):  # noqa: B007  (read below)
                if raw.strip():
                    yield f"{file}:{number}", raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}:{number}: {error}; expected UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: {error} after line {number}; fetch the file again") from error


def _rows(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    for where, line in _lines(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: found {line[:80]!r}, expected JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {line[:80]!r}, expected a JSON object")
        yield where, row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        from pyarrow import parquet  # only for hub sets, hence not a requirement
    except ImportError as error:
        raise ValueError(f"{file}: needs pyarrow: `pip install pyarrow`, or DATA=path") from error
    number = 0
    for batch in parquet.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{file}: row {number}", row


def _field(where: str, row: dict[str, object], key: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = f"{key!r}: {value!r}" if key in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: found {found}, expected {key!r} with a string")
    return value


def _add(where: str, kind: str, texts: dict[str, str], key: str, text: str) -> None:
    if key in texts:
        raise ValueError(f"{where}: {kind} id {key!r} occurs a second time; expected unique ids")
    texts[key] = text


def _qrels(
    file: Path, corpus: Mapping[str, str], queries: dict[str, str]
) -> dict[str, dict[str, int]]:
    header = ["query-id", "corpus-id", "score"]
    qrels: dict[str, dict[str, int]] = {}
    lines = _lines(file)
    where, line = next(lines, (f"{file}:1", ""))
    if line.split("\t") != header:
        raise ValueError(f"{where}: found {line[:80]!r}, expected the columns {header}")
    for where, line in lines:
        cells = line.split("\t")
        if len(cells) != 3:
            raise ValueError(f"{where}: found {line[:80]!r}, expected three columns: {header}")
        query, document, grade = cells
        if not re.fullmatch(r"[+-]?\d+", grade.strip()):
            raise ValueError(f"{where}: found score {grade!r}, expected an integer grade")
        if query not in queries:
            raise ValueError(f"{where}: query id {query!r} is not in queries.jsonl")
        if document not in corpus:
            raise ValueError(f"{where}: document id {document!r} is not in corpus.jsonl")
        if qrels.setdefault(query, {}).setdefault(document, int(grade)) != int(grade):
            raise ValueError(
                f"{where}: found grade {grade} for query {query!r} and document {document!r}, "
                f"expected {qrels[query][document]}, which a line above says"
            )
    return qrels


# --------------------------------------------------------------------------------------- the hub


def _hub(name: str, cache: Path | None) -> Collection:
    """BeIR/<name> and BeIR/<name>-qrels, each at one commit, which is recorded.

    The repositories have moved from gzipped JSON lines to parquet; old commits and caches have the
    former. Judgments come first: they are small, and what fails then fails early.
    """
    qrels: dict[str, Path] = {}
    at: str | None = None
    for split in HUB_SPLITS[name]:
        names = ["dev.tsv", "validation.tsv"] if split == "dev" else [f"{split}.tsv"]
        qrels[split], at = _fetch(f"BeIR/{name}-qrels", names, at, cache)
    provenance = {f"BeIR/{name}-qrels": str(at)}
    files, at = [], None
    for part in ("queries", "corpus"):
        shards = [f"{part}/{part}-00000-of-{n:05}.parquet" for n in range(1, MOST_SHARDS + 1)]
        file, at = _fetch(f"BeIR/{name}", [f"{part}.jsonl.gz", *shards], at, cache)
        found = [file]
        for number in range(1, int(file.stem[-5:]) if file.suffix == ".parquet" else 1):
            shard = f"{part}/{part}-{number:05}-of-{file.stem[-5:]}.parquet"
            found.append(_fetch(f"BeIR/{name}", [shard], at, cache)[0])
        files.append(found)
    provenance[f"BeIR/{name}"] = str(at)
    return _beir(name, files[1], files[0], qrels, provenance, cache)


def _fetch(
    repo: str, names: list[str], revision: str | None, cache: Path | None
) -> tuple[Path, str]:
    """The first of `names` that the repository has, and the commit it was resolved to."""
    failures = []
    for name in names:
        try:
            file = huggingface_hub.hf_hub_download(
                repo, name, repo_type="dataset", revision=revision, cache_dir=cache
            )
        except (EntryNotFoundError, OSError) as error:  # absent there; no network; no access
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        parts = Path(file).parts
        return Path(file), parts[parts.index("snapshots") + 1]  # .../snapshots/<commit>/<name>
    shown = failures[:2] + [f"and {len(failures) - 2} more"] * (len(failures) > 2)
    raise ValueError(
        f"{repo}: neither in the cache nor to be had from the hub ({'; '.join(shown)}). Without "
        "a network, load it once on a machine that has one and bring the cache folder (HF_HOME) "
        "over, or pass a BEIR folder: DATA=path"
    )
