"""Two documents and two queries: as a BEIR folder, and as the hub would serve them."""

import gzip
import json
from pathlib import Path

CORPUS = [{"_id": "d1", "title": "One", "text": "first"}, {"_id": "d2", "text": ""}]
QUERIES = [{"_id": "q1", "text": "which is first?"}, {"_id": "q2", "text": "which is empty?"}]
HEADER = "query-id\tcorpus-id\tscore"


def jsonl(rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(folder: Path, corpus=CORPUS, queries=QUERIES, **qrels: list[str]) -> str:
    """A BEIR folder; qrels without the header line."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text(jsonl(corpus))
    (folder / "queries.jsonl").write_text(jsonl(queries))
    for split, rows in (qrels or {"test": ["q1\td1\t1"]}).items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join([HEADER, *rows]) + "\n")
    return str(folder)


def serve(files, name: str, splits: dict[str, str]):
    files[f"BeIR/{name}"] = {
        "corpus.jsonl.gz": gzip.compress(jsonl(CORPUS).encode()),
        "queries.jsonl.gz": gzip.compress(jsonl(QUERIES).encode()),
    }
    files[f"BeIR/{name}-qrels"] = {
        file: f"{HEADER}\n{row}\n".encode() for file, row in splits.items()
    }
