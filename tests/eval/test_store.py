"""eval/store.py: the same collection, read from disk."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from eval import collections, store
from eval.collections import Collection, load
from eval.store import StoredTexts, stored
from model.tokens import Prompts, Tokenizer
from tests.train.tiny import tiny_config, tokens_only, write_collection
from train.batches import TrainingData
from train.mining import LEXICAL, Settings, mine
from train.trial import Workbench, run_baselines, run_trial

DOCUMENTS = [("d1", "Ünï\ncode"), ("d2", ""), ("é", "third"), ("d0", "first {}\\")]


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Collection]:
    """`load` with every corpus on disk."""

    def from_disk(folder: Path) -> Collection:
        with monkeypatch.context() as patch:
            patch.setattr(collections, "STORED_BYTES", 0)
            return load(str(folder), tmp_path / "cache")

    return from_disk


def file_in(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("anything: the documents are given")
    return path


def test_it_is_the_mapping_that_was_stored(tmp_path: Path) -> None:
    texts = stored([file_in(tmp_path)], DOCUMENTS, tmp_path / "texts")
    assert dict(texts) == dict(DOCUMENTS) and len(texts) == 4
    assert list(texts) == list(texts.ids) == [key for key, _ in DOCUMENTS]
    assert texts.ids[-1] == "d0" and texts.ids[1:3] == ["d2", "é"]
    assert "é" in texts and "d3" not in texts and 3 not in texts
    for absent in ("d3", "", "D1"):
        with pytest.raises(KeyError, match=repr(absent)):
            texts[absent]
    with pytest.raises(IndexError):
        texts.ids[4]


def test_ids_with_equal_hashes_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "_hash", lambda key: 7 if key.startswith("d") else 2**64 - 1)
    texts = stored([file_in(tmp_path)], DOCUMENTS, tmp_path / "texts")
    assert dict(texts) == dict(DOCUMENTS)
    assert "d9" not in texts and "x" not in texts
    with pytest.raises(ValueError, match=r"corpus.jsonl: document id 'd1' occurs a second time"):
        stored([file_in(tmp_path)], [*DOCUMENTS, ("d1", "x")], tmp_path / "again")


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    def digest(documents: list[tuple[str, str]], name: str) -> str:
        return stored([file_in(tmp_path)], documents, tmp_path / name).digest

    first = digest(DOCUMENTS, "a")
    assert digest(DOCUMENTS[::-1], "b") == first and len(first) == 64
    changed = [*DOCUMENTS[:3], ("d0", "first {}")]
    swapped = [*DOCUMENTS[:2], ("d0", "third"), ("é", "first {}\\")]
    for i, other in enumerate([DOCUMENTS[:3], changed, swapped]):
        assert digest(other, f"c{i}") != first


def test_it_is_written_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    path = file_in(tmp_path)
    stored([path], DOCUMENTS, tmp_path / "texts")
    again = stored([path], iter([("never", "read")]), tmp_path / "texts")
    assert list(again) == [key for key, _ in DOCUMENTS]
    os.utime(path, ns=(1, 1))
    assert dict(stored([path], [("new", "text")], tmp_path / "texts")) == {"new": "text"}


def test_stopped_while_it_is_written(tmp_path: Path) -> None:
    def broken():
        yield from DOCUMENTS[:2]
        raise ValueError("line 3 is no JSON")

    path = file_in(tmp_path)
    with pytest.raises(ValueError, match="line 3"):
        stored([path], broken(), tmp_path / "texts")
    assert [p for p in (tmp_path / "texts").iterdir() if p.suffix != ".lock"] == []
    assert dict(stored([path], DOCUMENTS, tmp_path / "texts")) == dict(DOCUMENTS)
    with pytest.raises(ValueError, match="no document to store"):
        stored([path], [], tmp_path / "empty")


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    count, length = 2000, 4000  # 8 MB of texts

    def documents():
        for i in range(count):
            yield f"d{i}", f"{i:04d}" * (length // 4)

    tracemalloc.start()
    try:
        texts = stored([file_in(tmp_path)], documents(), tmp_path / "texts")
        built = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert all(texts[f"d{i}"].startswith(f"{i:04d}") for i in range(0, count, 7))
        read = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert built < 2_000_000 and read < 200_000


def test_a_collection_from_disk_is_the_same(tiny_folder: Path, from_disk) -> None:
    plain, found = load(str(tiny_folder)), from_disk(tiny_folder)
    assert isinstance(found.corpus, StoredTexts) and isinstance(plain.corpus, dict)
    assert dict(found.corpus) == plain.corpus
    assert (found.queries, found.qrels) == (plain.queries, plain.qrels)
    assert {s: list(pool) for s, pool in found.pools.items()} == plain.pools
    again = from_disk(tiny_folder)
    assert again.fingerprint == found.fingerprint
    path = tiny_folder / "corpus.jsonl"
    lines = path.read_text().splitlines()
    with gzip.open(tiny_folder / "corpus.jsonl.gz", "wt") as file:  # another order and format
        file.write("\n".join(lines[::-1]))
    path.unlink()
    assert from_disk(tiny_folder).fingerprint == found.fingerprint
    queries = tiny_folder / "queries.jsonl"
    queries.write_text(queries.read_text().replace("rare3", "rare4"))
    assert from_disk(tiny_folder).fingerprint != found.fingerprint


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return write_collection(tmp_path / "tiny")


def test_mined_and_trained_on_from_disk(
    tiny_folder: Path, tiny_base: Path, from_disk, tmp_path: Path
) -> None:
    """The same micro-batches, to the token."""
    wide = Settings(depth=30, ranks=(1, 30), margin=0, negatives=2, fill=True)
    made = []
    for name, collection in (("a", load(str(tiny_folder))), ("b", from_disk(tiny_folder))):
        mine(tmp_path / name, collection, wide, LEXICAL)
        config = tiny_config(tiny_base, tiny_folder, negatives=str(tmp_path / name))
        tokenizer = Tokenizer(tiny_base, Prompts(), 24)
        made.append(TrainingData(collection, tokenizer, config, tokens_only))
    assert (tmp_path / "a" / "negatives.jsonl").read_text() == (
        tmp_path / "b" / "negatives.jsonl"
    ).read_text()
    for step in range(4):
        batches = [data.embedding(step) for data in made]
        texts = [[data.embedding_texts.ids[i] for i in b.queries + b.documents]
                 for data, b in zip(made, batches, strict=True)]  # fmt: skip
        assert texts[0] == texts[1] and batches[0].relevant.equal(batches[1].relevant)
        assert made[0].reranking(step).pairs == made[1].reranking(step).pairs
    assert list(made[0].reranking_texts.ids) == list(made[1].reranking_texts.ids)
    drawn = [
        TrainingData(c, Tokenizer(tiny_base, Prompts(), 24),
                     tiny_config(tiny_base, tiny_folder), tokens_only).negatives
        for c in (load(str(tiny_folder)), from_disk(tiny_folder))
    ]  # fmt: skip
    assert drawn[0] == drawn[1]


def test_a_trial_on_a_corpus_that_no_memory_holds(
    tiny_folder: Path, tiny_base: Path, from_disk, tmp_path: Path, monkeypatch
) -> None:
    """Trained and measured as in memory: the BM25 rows, the loss curve, every query's scores."""
    config = tiny_config(tiny_base, tiny_folder, steps=2)
    bench = Workbench(str(tiny_folder), "cpu", tmp_path, False)
    plain = (
        run_trial(config, "arm", tmp_path / "plain", bench),
        run_baselines(config, bench, _quiet),
    )
    bench = Workbench(str(tiny_folder), "cpu", tmp_path, False)
    bench.collection = bench.collections[0] = from_disk(tiny_folder)
    for module, size in (("protocol.WINDOW", 5), ("protocol.SCORES", 15), ("bm25.WINDOW", 4)):
        monkeypatch.setattr(f"eval.{module}", size)
    found = run_trial(config, "arm", tmp_path / "disk", bench), run_baselines(config, bench, _quiet)
    assert isinstance(bench.collection.corpus, StoredTexts)
    for key in ("scores", "curve"):
        assert found[0][key] == plain[0][key]
    for key in ("bm25", "untrained", "ceiling"):
        assert found[1][key] == plain[1][key]


def _quiet(arm: str, scores: dict) -> None:
    """No rows of the running table."""


def test_the_errors_of_a_file_are_those_of_the_plain_path(tiny_folder: Path, from_disk) -> None:
    path = tiny_folder / "corpus.jsonl"
    good = path.read_text()
    path.write_text(good + "[1]\n")
    with pytest.raises(ValueError, match=r"corpus.jsonl:43: found '\[1\]', expected a JSON object"):
        from_disk(tiny_folder)
    path.write_text(good + json.dumps({"_id": "d3", "text": "twice"}) + "\n")
    with pytest.raises(ValueError, match="document id 'd3' occurs a second time"):
        from_disk(tiny_folder)
    path.write_text(good)
    judged = tiny_folder / "qrels" / "train.tsv"
    judged.write_text(judged.read_text() + "q0\tnowhere\t1\n")
    with pytest.raises(ValueError, match="document id 'nowhere' is not in the corpus"):
        from_disk(tiny_folder)
