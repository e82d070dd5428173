"""The files of a BEIR set, in a folder or on the Hugging Face hub, read row by row."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from eval.stdlib import DEV_SHARE

# The public BEIR sets (arXiv 2104.08663, table 1) on the hub and the splits of their qrels.
HUB_SPLITS = (
    dict.fromkeys(("msmarco", "nfcorpus", "hotpotqa", "fiqa", "fever"), ("train", "dev", "test"))
    | {"scifact": ("train", "test"), "quora": ("dev", "test"), "dbpedia-entity": ("dev", "test")}
    | dict.fromkeys(("trec-covid", "nq", "arguana", "scidocs"), ("test",))
    | dict.fromkeys(("webis-touche2020", "climate-fever"), ("test",))
)
MOST_SHARDS = 32  # of a parquet file on the hub that are looked for
NOT_ON_HUB = ("bioasq", "signal1m", "trec-news", "robust04", "cqadupstack")  # not as one set there
HEADER = ["query-id", "corpus-id", "score"]  # of BEIR's judgments

Qrels = dict[str, dict[str, int]]  # query id -> document id -> grade


@dataclass(frozen=True)
class Files:
    """Where the parts of a set lie; a part may have several files (parquet shards).

    Attributes:
        name: as results are filed.
        qrels: split, as the file says it ("dev" may be "validation") -> file.
        provenance: the hub's commits, or {"path": folder}.
    """

    name: str
    corpus: list[Path]
    queries: list[Path]
    qrels: dict[str, Path]
    provenance: dict[str, str]

    def only(self, split: str) -> "Files":
        """With no more judgments than `judgments` needs for this split."""
        names = {split}
        if split in ("dev", "train"):
            names = ({"dev", "validation"} & self.qrels.keys()) or {"train"}
            names |= {split}
        return replace(self, qrels={s: file for s, file in self.qrels.items() if s in names})


def find(data: str, cache: Path | None = None) -> Files:
    """The files of a name in `HUB_SPLITS` or of a BEIR folder; a name wins over a folder.

    A folder holds corpus.jsonl, corpus.jsonl.gz or corpus/*.parquet, the same for queries, and
    qrels/*.tsv.

    Raises:
        ValueError: nothing of that name; a missing file; no network and nothing cached.
    """
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
    path = Path(data)
    corpus, queries = (_part(path, name) for name in ("corpus", "queries"))
    qrels = {file.stem: file for file in sorted((path / "qrels").glob("*.tsv"))}
    if not qrels:
        raise ValueError(f"{path}: no qrels/*.tsv; expected at least qrels/test.tsv")
    return Files(path.resolve().name, corpus, queries, qrels, {"path": str(path)})


def _part(folder: Path, name: str) -> list[Path]:
    """The file or the parquet shards of the corpus or the queries."""
    for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if file.is_file():
            return [file]
    shards = sorted((folder / name).glob("*.parquet"))
    if not shards:
        raise ValueError(
            f"{folder}: neither {name}.jsonl nor {name}.jsonl.gz nor {name}/*.parquet; expected a "
            "BEIR folder"
        )
    counted = re.search(r"-of-(\d+)$", shards[0].stem)
    if counted and int(counted[1]) != len(shards):
        raise ValueError(f"{folder / name}: {len(shards)} of {int(counted[1])} parquet shards")
    return shards


# ------------------------------------------------------------------------------------------ rows


def documents(files: Files) -> Iterator[tuple[str, str, str]]:
    """("file:line", id, text) of each document, read as it is asked for.

    The text is title and text joined by a newline where there is a title. Whether ids are unique
    is not looked at.

    Raises:
        ValueError: a line that is no document, by file and line.
    """
    for where, row in chain.from_iterable(map(rows, files.corpus)):
        title = field(where, row, "title", optional=True)
        text = field(where, row, "text")
        yield where, field(where, row, "_id"), f"{title}\n{text}" if title else text


def read_queries(files: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Query id -> text, and query id -> domain where a row tells it (itself or its metadata).

    Raises:
        ValueError: a line that is no query, an empty text or an id for the second time.
    """
    queries: dict[str, str] = {}
    domain: dict[str, str] = {}
    for where, row in chain.from_iterable(map(rows, files)):
        text, key = field(where, row, "text"), field(where, row, "_id")
        if not text.strip():
            raise ValueError(f"{where}: query {key!r} is empty; expected a text")
        if key in queries:
            raise ValueError(f"{where}: query id {key!r} occurs a second time; expected unique ids")
        queries[key] = text
        metadata = row.get("metadata")
        source = row if "domain" in row else metadata if isinstance(metadata, dict) else {}
        if label := field(where, source, "domain", optional=True):
            domain[key] = label
    return queries, domain


def judgments(
    files: Files, queries: Container[str], corpus: Container[str] | None = None
) -> tuple[dict[str, Qrels], dict[str, str]]:
    """Split ("train", "dev", "test", ...) -> judgments, and what is to be said of their origin.

    The dev split, when there is none, is taken from train.

    Args:
        corpus: the ids of all documents; None: they are not looked at.
    """
    if {"dev", "validation"} <= files.qrels.keys():
        folder = files.qrels["dev"].parent
        raise ValueError(f"{folder}: dev.tsv and validation.tsv; expected one of them")
    splits = {
        "dev" if split == "validation" else split: read_qrels(file, queries, corpus)
        for split, file in files.qrels.items()
    }
    if "dev" in splits or "train" not in splits:
        return splits, {}
    train = splits["train"]
    order = sorted(train, key=lambda query: hashlib.sha256(query.encode()).hexdigest())
    held = set(order[: max(1, round(DEV_SHARE * len(train)))])
    splits["dev"] = {q: train[q] for q in train if q in held}
    splits["train"] = {q: train[q] for q in train if q not in held}
    return splits, {"dev": "10 % of the train queries, by sha256 of their ids"}


def read_qrels(file: Path, queries: Container[str], corpus: Container[str] | None = None) -> Qrels:
    """Query id -> document id -> grade.

    BEIR's format: a header, then query, document and grade, with tabs. Without that header,
    trec_eval's is read where the first line has it: query, iteration (ignored), document and
    grade, with spaces or tabs.

    Raises:
        ValueError: another format, a grade that is no integer, an id that is unknown, or a pair
            with two grades; by file and line.
    """
    qrels: Qrels = {}
    lines = _lines(file)
    where, line = next(lines, (f"{file}:1", ""))
    trec = re.fullmatch(r"\S+\s+\S+\s+\S+\s+[+-]?\d+\s*", line) is not None
    if trec:
        lines = chain([(where, line)], lines)
    elif line.split("\t") != HEADER:
        raise ValueError(
            f"{where}: found {line[:80]!r}, expected the columns {HEADER}, or no header and the "
            "four columns of trec_eval: query, 0, document, grade"
        )
    for where, line in lines:
        cells = line.split() if trec else line.split("\t")
        if len(cells) != 3 + trec:
            expected = "the four columns of trec_eval" if trec else f"three columns: {HEADER}"
            raise ValueError(f"{where}: found {line[:80]!r}, expected {expected}")
        query, document, grade = cells[0], cells[-2], cells[-1]
        if not re.fullmatch(r"[+-]?\d+", grade.strip()):
            raise ValueError(f"{where}: found score {grade!r}, expected an integer grade")
        if query not in queries:
            raise ValueError(f"{where}: query id {query!r} is not in queries.jsonl")
        if corpus is not None and document not in corpus:
            raise ValueError(f"{where}: document id {document!r} is not in corpus.jsonl")
        if qrels.setdefault(query, {}).setdefault(document, int(grade)) != int(grade):
            raise ValueError(
                f"{where}: found grade {grade} for query {query!r} and document {document!r}, "
                f"expected {qrels[query][document]}, which a line above says"
            )
    return qrels


def rows(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """("file:line", row) of JSON lines (plain or gzip), parquet, or .tsv (id, tab, text).

    Raises:
        ValueError: a row that cannot be read, by file and line.
    """
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    for where, line in _lines(file):
        if file.suffix == ".tsv":
            key, tab, text = line.partition("\t")
            if not tab:
                raise ValueError(f"{where}: found {line[:80]!r}, expected an id, a tab and a text")
            yield where, {"_id": key, "text": text}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: found {line[:80]!r}, expected JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {line[:80]!r}, expected a JSON object")
        yield where, row


def field(where: str, row: dict[str, object], key: str, *, optional: bool = False) -> str:
    """The string under a key; "" where it is optional and absent. Raises ValueError otherwise."""
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = f"{key!r}: {value!r}" if key in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: found {found}, expected {key!r} with a string")
    return value


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


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        from pyarrow import ArrowException, parquet  # only for hub sets: `eval` works without it
    except ImportError as error:
        raise ValueError(f"{file}: needs pyarrow: `pip install pyarrow`, or DATA=path") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file}: {error} after row {number}; fetch the file again") from error


# --------------------------------------------------------------------------------------- the hub


def _hub(name: str, cache: Path | None) -> Files:
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
    return Files(name, files[1], files[0], qrels, provenance)


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
