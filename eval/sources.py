"""The files of a collection, and what they hold, row by row, each with the place it stands at."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

COLUMNS = ["query-id", "corpus-id", "score"]  # of BEIR's judgments
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Sources:
    """Where a collection lies, before it is read.

    Attributes:
        corpus, queries: files of rows: .jsonl (.gz), .parquet, or .tsv of two columns.
        qrels: split -> its judgments; {}: they stand in the rows of the queries ("gold_ids" and
            "excluded_ids", as BRIGHT has them) and are the test split.
        key, document, query: the columns of an id, of a document's and of a query's text.
        published: it is as its authors publish it, and cannot be mended: a judgment of a document
            that the corpus lacks (ArguAna has some) then counts as one that nobody finds, as in
            trec_eval, where in a folder of one's own it is an error.
        own_document: a query is itself in the corpus, under its own id, and is no answer.
        language, query_prompt: see `collections.Collection`.
        provenance: e.g. repository -> commit, or {"path": ...}.
    """

    name: str
    corpus: list[Path]
    queries: list[Path]
    qrels: dict[str, Path]
    provenance: dict[str, str]
    key: str = "_id"
    document: str = "text"
    query: str = "text"
    published: bool = False
    own_document: bool = False
    language: str = "en"
    query_prompt: str = ""


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
    try:
        from pyarrow import parquet  # only for hub sets, hence not a requirement
    except ImportError as error:
        raise ValueError(f"{file}: needs pyarrow: `pip install pyarrow`, or DATA=path") from error
    number = 0
    for batch in parquet.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{file}: row {number}", row


def text_of(where: str, row: dict[str, Any], key: str, *, optional: bool = False) -> str:
    """The string in a column; "" for one that is absent and `optional`."""
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = f"{key!r}: {value!r}" if key in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: found {found}, expected {key!r} with a string")
    return value


def ids_of(where: str, row: dict[str, Any], key: str) -> list[str]:
    """The ids in a column of lists; BRIGHT writes ["N/A"] where there are none."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        found = f"{key!r}: {value!r}" if key in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: found {found}, expected {key!r} with a list of strings")
    return [one for one in value if one != "N/A"]


def judgments(file: Path) -> Iterator[tuple[str, str, str, int]]:
    """("file:line", query id, document id, grade) of each judgment.

    A .tsv has BEIR's three columns under their header, or TREC's four without one (query,
    iteration, document, grade; tabs or spaces): its first line says which. Other files hold rows
    with BEIR's columns.
    """
    if file.suffix != ".tsv":
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
