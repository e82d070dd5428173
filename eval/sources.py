"""The files of a collection, and what they hold, row by row, each with the place it stands at."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from eval.stdlib import DEV_SHARE

COLUMNS = ["query-id", "corpus-id", "score"]  # of BEIR's judgments
Row = tuple[str, dict[str, Any]]
Qrels = dict[str, dict[str, int]]  # query id -> document id -> grade


@dataclass(frozen=True)
class Sources:
    """Where a collection lies, before it is read.

    Attributes:
        corpus, queries: files of rows: .jsonl (.gz), .parquet, or .tsv of two columns.
        qrels: split, as the file says it ("dev" may be "validation") -> its judgments.
        beside: the split whose judgments stand in the rows of the queries instead; "" for none.
        gold, excluded: there, the columns of what is right (ids as in BRIGHT, or whole documents)
            and of what is taken out; "" for none.
        key, document, query: the columns of an id, of a document's and of a query's text;
            query_key: of a query's id, where it has another name.
        pairs: a row of the corpus is a query and a document that answers it, in these columns; ids
            are hashes of the texts, and rows of one text are one.
        published: it is as its authors publish it, and cannot be mended: a judgment of a document
            that the corpus lacks (ArguAna has some) then counts as one that nobody finds, as in
            trec_eval, where in a folder of one's own it is an error.
        own_document: a query is itself in the corpus, under its own id, and is no answer.
        language, instruction: see `collections.Collection`.
        provenance: e.g. repository -> commit, or {"path": ...}.
        relevant: split -> the lowest grade that is relevant, where that is not 1.
    """

    name: str
    corpus: list[Path]
    queries: list[Path]
    qrels: dict[str, Path]
    provenance: dict[str, str]
    key: str = "_id"
    document: str = "text"
    query: str = "text"
    query_key: str = ""
    beside: str = ""
    gold: str = "gold_ids"
    excluded: str = "excluded_ids"
    pairs: bool = False
    published: bool = False
    own_document: bool = False
    language: str = "en"
    instruction: str = ""
    relevant: dict[str, int] = field(default_factory=dict)

    def only(self, split: str) -> "Sources":
        """With no more judgments than `read_splits` needs for this split."""
        names = {split}
        if split in ("dev", "train"):
            names = ({"dev", "validation"} & self.qrels.keys()) or {"train"}
            names |= {split}
        return replace(self, qrels={s: file for s, file in self.qrels.items() if s in names})


def folder(path: Path) -> Sources:
    """The files of a BEIR folder.

    It holds corpus.jsonl, corpus.jsonl.gz or corpus/*.parquet, the same for queries, and
    qrels/*.tsv.

    Raises:
        ValueError: one of these is missing, or the dev split is there under both its names.
    """
    corpus, queries = (_part(path, name) for name in ("corpus", "queries"))
    qrels = {file.stem: file for file in sorted((path / "qrels").glob("*.tsv"))}
    if not qrels:
        raise ValueError(f"{path}: no qrels/*.tsv; expected at least qrels/test.tsv")
    if {"dev", "validation"} <= qrels.keys():
        raise ValueError(f"{path / 'qrels'}: dev.tsv and validation.tsv; expected one of them")
    return Sources(path.resolve().name, corpus, queries, qrels, {"path": str(path)})


def _part(path: Path, name: str) -> list[Path]:
    """The file or the parquet shards of the corpus or the queries."""
    for file in (path / f"{name}.jsonl", path / f"{name}.jsonl.gz"):
        if file.is_file():
            return [file]
    shards = sorted((path / name).glob("*.parquet"))
    if not shards:
        raise ValueError(
            f"{path}: neither {name}.jsonl nor {name}.jsonl.gz nor {name}/*.parquet; expected a "
            "BEIR folder"
        )
    counted = re.search(r"-of-(\d+)$", shards[0].stem)
    if counted and int(counted[1]) != len(shards):
        raise ValueError(f"{path / name}: {len(shards)} of {int(counted[1])} parquet shards")
    return shards


# ------------------------------------------------------------------------------ of a collection


def documents(sources: Sources) -> Iterator[tuple[str, str, str]]:
    """("file:line", id, text) of each document, read as it is asked for.

    The text is title and text joined by a newline where there is a title. Whether ids are unique
    is not looked at.

    Raises:
        ValueError: a row that is no document, by file and line.
    """
    seen: set[str] = set()
    for file in sources.corpus:
        for where, row in rows(file, sources.key, sources.document):
            text = text_of(where, row, sources.document)
            if sources.pairs:
                if (key := _hash(text)) not in seen:
                    seen.add(key)
                    yield where, key, text
                continue
            title = text_of(where, row, "title", optional=True)
            yield where, text_of(where, row, sources.key), f"{title}\n{text}" if title else text


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Queries:
    """Query id -> text; and what a row says beside it: its domain, its judgments, who is excluded.

    Attributes:
        qrels: of `Sources.beside`, else empty.
    """

    texts: dict[str, str] = field(default_factory=dict)
    domain: dict[str, str] = field(default_factory=dict)
    qrels: Qrels = field(default_factory=dict)
    excluded: dict[str, list[str]] = field(default_factory=dict)


def read_queries(sources: Sources, corpus: Container[str] | None = None) -> Queries:
    """All queries.

    Args:
        corpus: the ids of all documents; None: they are not looked at.
    Raises:
        ValueError: a row that is no query, an empty text, an id for the second time, or a document
            that is both right and excluded; by file and line.
    """
    if sources.pairs:
        return _pairs(sources)
    found, column = Queries(), sources.query_key or sources.key
    for where, row in chain.from_iterable(
        rows(file, column, sources.query) for file in sources.queries
    ):
        text, key = text_of(where, row, sources.query), text_of(where, row, column)
        if not text.strip():
            raise ValueError(f"{where}: query {key!r} is empty; expected a text")
        if key in found.texts:
            raise ValueError(f"{where}: query id {key!r} occurs a second time; expected unique ids")
        found.texts[key] = text
        metadata = row.get("metadata")
        source = row if "domain" in row else metadata if isinstance(metadata, dict) else {}
        if label := text_of(where, source, "domain", optional=True):
            found.domain[key] = label
        if sources.beside:
            found.qrels[key] = dict.fromkeys(ids_of(where, row, sources.gold, sources.key), 1)
            out = ids_of(where, row, sources.excluded, sources.key) if sources.excluded else []
            if out:
                found.excluded[key] = out
            if both := sorted(found.qrels[key].keys() & set(out)):
                raise ValueError(f"{where}: document id {both[0]!r} is both gold and excluded")
        elif sources.own_document and (corpus is None or key in corpus):
            found.excluded[key] = [key]
    return found


def _pairs(sources: Sources) -> Queries:
    found = Queries()
    for where, row in chain.from_iterable(map(rows, sources.corpus)):
        text, answer = (text_of(where, row, key) for key in (sources.query, sources.document))
        if not text.strip():
            raise ValueError(f"{where}: the query is empty; expected a text")
        key = f"q{_hash(text)}"  # never the id of a document, though that may have its text
        found.texts[key] = text
        found.qrels.setdefault(key, {})[_hash(answer)] = 1
    return found


def read_splits(
    sources: Sources, queries: Queries, corpus: Container[str] | None = None
) -> tuple[dict[str, Qrels], dict[str, str]]:
    """Split ("train", "dev", "test", ...) -> judgments, and what is to be said of their origin.

    The dev split, when there is none, is taken from train. No query of train keeps a document that
    the corpus lacks: nothing could be trained on it.

    Args:
        corpus: the ids of all documents; None: they are not looked at.
    Raises:
        ValueError: see `read_qrels`; or no judged document is in the corpus.
    """
    known = None if sources.published else corpus
    splits = {
        "dev" if split == "validation" else split: read_qrels(file, queries.texts, known)
        for split, file in sources.qrels.items()
    }
    if sources.beside:
        splits[sources.beside] = queries.qrels
    origin: dict[str, str] = {}
    # Held out before anything is dropped, so that dev is the same whether or not `corpus` is given.
    if "dev" not in splits and "train" in splits:
        train = splits["train"]
        order = sorted(train, key=lambda query: hashlib.sha256(query.encode()).hexdigest())
        held = set(order[: max(1, round(DEV_SHARE * len(train)))])
        splits["dev"] = {q: train[q] for q in train if q in held}
        splits["train"] = {q: train[q] for q in train if q not in held}
        origin["dev"] = "10 % of the train queries, by sha256 of their ids"
    if corpus is not None:
        judged = {d for qrels in splits.values() for row in qrels.values() for d in row}
        absent = {document for document in judged if document not in corpus}
        origin |= lacking(sources.name, judged, absent)
        if "train" in splits and absent:
            kept = {
                query: {d: grade for d, grade in row.items() if d not in absent}
                for query, row in splits["train"].items()
            }
            splits["train"] = {query: row for query, row in kept.items() if row}
    return splits, origin


def lacking(name: str, judged: set[str], absent: set[str]) -> dict[str, str]:
    """What is to be said of judged documents that a published corpus lacks.

    Raises:
        ValueError: none of them is there: corpus and judgments do not belong together.
    """
    if absent and absent == judged:
        raise ValueError(f"{name}: no judged document is in the corpus, such as {min(absent)!r}")
    return {"judged documents that the corpus lacks": str(len(absent))} if absent else {}


def read_qrels(file: Path, queries: Container[str], corpus: Container[str] | None = None) -> Qrels:
    """Query id -> document id -> grade; see `judgments` for the formats.

    Args:
        corpus: the ids of all documents; None: they are not looked at.
    Raises:
        ValueError: a line of another format, an id that is unknown, or a pair with two grades; by
            file and line.
    """
    qrels: Qrels = {}
    for where, query, document, grade in judgments(file):
        if query not in queries:
            raise ValueError(f"{where}: query id {query!r} is not in the queries")
        if corpus is not None and document not in corpus:
            raise ValueError(f"{where}: document id {document!r} is not in the corpus")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(
                f"{where}: found grade {grade} for query {query!r} and document {document!r}, "
                f"expected {qrels[query][document]}, which a line above says"
            )
    return qrels


# ------------------------------------------------------------------------------------ of a file


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


def rows(file: Path, key: str = "_id", text: str = "text") -> Iterator[Row]:
    """("file:line", row) of each row; the two columns of a .tsv are called `key` and `text`."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    for where, line in _lines(file):
        if file.suffix == ".tsv":
            first, tab, rest = line.partition("\t")
            if not tab:
                raise ValueError(f"{where}: found {line[:80]!r}, expected an id, a tab and a text")
            yield where, {key: first, text: rest}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: found {line[:80]!r}, expected JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {line[:80]!r}, expected a JSON object")
        yield where, row


def _parquet(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # takes a moment to import, for hub sets alone

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file}: {error} after row {number}; fetch the file again") from error


def text_of(where: str, row: dict[str, Any], key: str, *, optional: bool = False) -> str:
    """The string in a column; "" for one that is absent and `optional`."""
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = f"{key!r}: {value!r}" if key in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: found {found}, expected {key!r} with a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can write
        raise ValueError(f"{where}: {key!r}: {error}; expected what UTF-8 can hold") from error
    return value


def strings_of(where: str, row: dict[str, Any], key: str) -> list[str]:
    """The strings in a column of lists."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        found = f"{key!r}: {value!r}" if key in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: found {found}, expected {key!r} with a list of strings")
    return value


def ids_of(where: str, row: dict[str, Any], key: str, inside: str) -> list[str]:
    """The ids in a column of lists, of ids or of whole documents that hold them under `inside`;
    BRIGHT writes ["N/A"] where there are none."""
    value = row.get(key)
    if isinstance(value, list):
        ids = [one.get(inside) if isinstance(one, dict) else one for one in value]
        row = row | {key: ids}
    return [one for one in strings_of(where, row, key) if one != "N/A"]


def judgments(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """("file:line", query id, document id, grade) of each judgment.

    Text has BEIR's three columns under their header, or TREC's four without one (query, iteration,
    document, grade; tabs or spaces): its first line says which. JSON lines and parquet hold rows
    with BEIR's columns.
    """
    if {".jsonl", ".parquet"} & set(file.suffixes):
        for where, row in rows(file):
            query, document = (text_of(where, row, column) for column in COLUMNS[:2])
            yield where, query, document, _grade(where, row.get("score"))
        return
    lines = _lines(file)
    first, head = next(lines, (f"{file}:1", ""))
    trec = len(_cells(head)) == 4
    if not trec and head.split("\t") != COLUMNS:
        raise ValueError(
            f"{first}: found {head[:80]!r}, expected the columns {COLUMNS}, or the four of TREC's "
            "format: query, iteration, document, grade"
        )
    for where, line in chain([(first, head)] * trec, lines):
        cells = _cells(line) if trec else line.split("\t")
        if len(cells) != 3 + trec:
            expected = "TREC's four columns, as in line 1" if trec else f"three columns: {COLUMNS}"
            raise ValueError(f"{where}: found {line[:80]!r}, expected {expected}")
        yield where, cells[0], cells[-2], _grade(where, cells[-1])


def _cells(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()


def _grade(where: str, value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    if isinstance(value, int | float) and float(value).is_integer():
        return int(value)
    raise ValueError(f"{where}: found score {value!r}, expected an integer grade")
