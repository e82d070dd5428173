"""eval/vectors.py: a corpus is read once before anything is encoded, from whatever files."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from eval import vectors
from eval.collections import find
from eval.sources import Sources, documents
from eval.vectors import survey
from tests.train.tiny import write_collection

DOCUMENTS = 42  # of the tiny collection


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("survey") / "Tiny")


def test_every_source_is_the_same_corpus(data: Path, tmp_path: Path) -> None:
    """Plain, gzip, parquet in shards; the fingerprint follows ids, texts and their order."""
    plain = survey(find(str(data)))
    assert plain[0] == DOCUMENTS and len(plain[1]) == 64
    lines = (data / "corpus.jsonl").read_text().splitlines()
    marks = {}
    for name in ("gzip", "parquet", "turned", "other"):
        shutil.copytree(data, tmp_path / name)
        (tmp_path / name / "corpus.jsonl").unlink()
    (tmp_path / "gzip" / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "parquet" / "corpus").mkdir()
    rows = [json.loads(line) for line in lines]
    for shard, part in enumerate((rows[:20], rows[20:])):
        table = pa.Table.from_pylist(part)
        parquet.write_table(
            table, tmp_path / "parquet" / "corpus" / f"corpus-{shard:05}-of-00002.parquet"
        )
    (tmp_path / "turned" / "corpus.jsonl").write_text("\n".join(lines[::-1]))
    (tmp_path / "other" / "corpus.jsonl").write_text("\n".join(lines).replace("rare7", "rare8"))
    for name in ("gzip", "parquet", "turned", "other"):
        marks[name] = survey(find(str(tmp_path / name)))
    assert marks["gzip"] == marks["parquet"] == plain
    assert len({plain[1], marks["turned"][1], marks["other"][1]}) == 3
    (tmp_path / "parquet" / "corpus" / "corpus-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="corpus: 1 of 2 parquet shards"):
        find(str(tmp_path / "parquet"))


def test_what_moves_between_id_and_text_is_another_corpus(tmp_path: Path) -> None:
    marks = set()
    for key, text in (("ab", "c"), ("a", "bc"), ("a", "b c")):
        file = tmp_path / "corpus.jsonl"
        file.write_text(json.dumps({"_id": key, "text": text}))
        marks.add(survey(Sources("x", [file], [], {}, {}))[1])
    assert len(marks) == 3


def test_two_ids_of_one_hash_are_no_duplicate(data: Path, monkeypatch) -> None:
    """With one byte instead of eight, ids collide, and the texts decide."""
    right = vectors.hashlib.blake2b

    def weak(content: bytes, digest_size: int):
        class Short:
            def digest(self) -> bytes:
                return right(content, digest_size=1).digest() * digest_size

        return Short()

    monkeypatch.setattr(vectors.hashlib, "blake2b", weak)
    sources = find(str(data))
    names = [key for _, key, _ in documents(sources)]
    assert len({right(key.encode(), digest_size=1).digest() for key in names}) < DOCUMENTS
    assert survey(sources)[0] == DOCUMENTS


def test_an_empty_corpus_and_a_damaged_parquet_file(tmp_path: Path) -> None:
    empty = tmp_path / "corpus.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl: no document"):
        survey(Sources("x", [empty], [], {}, {}))
    damaged = tmp_path / "corpus.parquet"
    damaged.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ValueError, match=r"corpus\.parquet: .*after row 0; fetch"):
        survey(Sources("x", [damaged], [], {}, {}))
