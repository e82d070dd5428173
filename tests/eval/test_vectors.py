"""eval/vectors.py: a corpus into shards, killed, resumed, shared by ranks; what it refuses."""

import json
import os
import resource
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import vectors
from eval.collections import find
from eval.sources import Sources, documents
from eval.vectors import Vectors, encode
from model import tokens
from model.unimoer import UniMoER
from tests.train.tiny import tiny_config, write_collection
from train.trial import model_config

WINDOW = 5
DOCUMENTS = 42  # of the tiny collection: 9 shards


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("vectors") / "Tiny")


@pytest.fixture(scope="module")
def model(tiny_base: Path, data: Path) -> UniMoER:
    return UniMoER(model_config(tiny_config(tiny_base, data)))


def stored_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".lock"}


def run(model: UniMoER, data: Path, folder: Path, **options) -> Vectors:
    options = {"revision": "r", "window": WINDOW, **options}
    return encode(model, find(str(data)), folder, **options)


@pytest.fixture(scope="module")
def whole(model: UniMoER, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(model, data, folder)
    return folder


class Counted:
    """Counts the texts that a model encodes, and dies at one of the windows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int = -1):
        self.texts: list[str] = []
        self.windows, right = 0, UniMoER.encode_document

        def counted(model, texts, **options):
            self.texts += texts
            if self.windows == dies_at:
                raise KeyboardInterrupt
            self.windows += 1
            return right(model, texts, **options)

        monkeypatch.setattr(UniMoER, "encode_document", counted)


@pytest.mark.parametrize("dimension", [-1, 10_000])
def test_a_dimension_that_there_is_not(dimension, model: UniMoER, data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dimension={dimension}: expected 1 to"):
        run(model, data, tmp_path / "vectors", dimension=dimension)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d3", "text": ', r"corpus\.jsonl:43: found .*expected JSON"),
        ('{"text": "x"}', r"corpus\.jsonl:43: found keys \['text'\], expected '_id'"),
        (
            '{"_id": "d3", "text": "x"}',
            r"corpus\.jsonl:43: document id 'd3' occurs a second time, after .*corpus\.jsonl:4;",
        ),
        (r'{"_id": "x", "text": "\ud800"}', r"corpus\.jsonl:43: .*surrogates.*expected what UTF-8"),
        (r'{"_id": "x\u0000", "text": ""}', r"corpus\.jsonl:43: document id 'x.*' holds a NUL"),
    ],
)
def test_a_broken_line_is_found_before_anything_is_encoded(
    line: str, message: str, model: UniMoER, data: Path, tmp_path: Path, monkeypatch
) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    with open(copy / "corpus.jsonl", "a") as file:
        file.write(line + "\n")
    counted = Counted(monkeypatch)
    with pytest.raises(ValueError, match=message):
        run(model, copy, tmp_path / "vectors")
    assert not counted.texts and not list((tmp_path / "vectors").glob("*.npy"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_vectors_are_the_models(dtype: str, model: UniMoER, data: Path, tmp_path: Path) -> None:
    """In the order of the corpus, with their ids; float16 rounds them and does nothing else."""
    stored = run(model, data, tmp_path, dtype=dtype)
    rows = list(documents(find(str(data))))
    expected = model.encode_document([text for _, _, text in rows]).numpy()
    found = np.concatenate([stored.shard(i) for i in range(stored.shards)])
    assert stored.missing() == [] and stored.shards == 9 and found.dtype == dtype
    assert [key.decode() for key in stored.ids()] == [key for _, key, _ in rows]
    bound = 2e-6 + (0 if dtype == "float32" else 2.0**-11)
    assert np.abs(found.astype(np.float32) - expected).max() <= bound
    assert stored.size(8) == 2 and stored.shard(8).shape == (2, 32)


def test_killed_runs_encode_few_texts_twice(
    model: UniMoER, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """All calls together: at most `FLUSH` more for each kill, in the midst of encoding, of a write,
    and before a shard takes its name."""
    monkeypatch.setattr(vectors, "FLUSH", 2)  # of a shard's 5 documents
    run(model, data, tmp_path / "whole")
    folder, append, replace = tmp_path / "killed", vectors._append, os.replace

    def half(path: Path, end: int, content: bytes) -> None:
        if path.name.startswith(".00003.") and end > 128:  # behind the head and two vectors
            append(path, end, content[: len(content) // 2])
            raise KeyboardInterrupt
        append(path, end, content)

    def unnamed(source: Path, target: Path) -> None:
        if Path(target).name == "00004.npy":
            raise KeyboardInterrupt
        replace(source, target)

    texts = []
    for missing, dies_at, module, name, other in (
        (7, 7, vectors, "_append", append),
        (6, -1, vectors, "_append", half),
        (5, -1, os, "replace", unnamed),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, other)
            texts.append(Counted(patch, dies_at).texts)
            run(model, data, folder)
        assert len(Vectors(folder).missing()) == missing
    with pytest.raises(ValueError, match=r"5 of 9 shards are missing, the first is 00004\.npy"):
        Vectors(folder).require_all()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("0000[0-3].*")}
    texts.append(Counted(monkeypatch).texts)
    run(model, data, folder)
    # Two that were being encoded, two of a half write, and the last part of the unnamed shard.
    assert sum(map(len, texts)) == DOCUMENTS + 2 + 2 + 1
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert stored_files(folder) == stored_files(tmp_path / "whole")
    again = Counted(monkeypatch)
    assert run(model, data, folder).missing() == [] and not again.texts


def test_memory_does_not_grow_with_the_corpus(model: UniMoER, tmp_path: Path, monkeypatch) -> None:
    """Ten times the documents: some 100 kB more for their hashes, not 5 MB for their texts."""
    monkeypatch.setattr(
        UniMoER, "encode_document", lambda model, texts, **options: torch.zeros(len(texts), 32)
    )
    peaks = []
    for count in (1000, 10_000):
        file = tmp_path / f"{count}.jsonl"
        with open(file, "w") as out:
            for i in range(count):
                out.write(json.dumps({"_id": f"{i}", "text": f"{i} " + "ba ko " * 80}) + "\n")
        sources = Sources("x", [file], [], {}, {})
        tracemalloc.start()
        encode(model, sources, tmp_path / f"v{count}", revision="r", window=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000  # other threads of the process allocate too


def test_ranks_share_the_shards(
    model: UniMoER, data: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    counted = Counted(monkeypatch)
    assert run(model, data, tmp_path, rank=1, world=2).missing() == [0, 2, 4, 6, 8]
    assert counted.windows == 4
    assert run(model, data, tmp_path, rank=0, world=2).missing() == []
    assert len(counted.texts) == DOCUMENTS and stored_files(tmp_path) == stored_files(whole)


def test_two_processes_of_one_rank(model: UniMoER, data: Path, tmp_path: Path, monkeypatch) -> None:
    """The second is refused while the first is at work; another rank is not."""
    inside, go_on = threading.Event(), threading.Event()
    right = UniMoER.encode_document

    def waits(model, texts, **options):
        inside.set()
        go_on.wait(20)
        return right(model, texts, **options)

    monkeypatch.setattr(UniMoER, "encode_document", waits)
    first = threading.Thread(
        target=run, args=(model, data, tmp_path), kwargs={"rank": 0, "world": 2}
    )
    first.start()
    assert inside.wait(20)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another process encodes rank 0-of-2"):
        run(model, data, tmp_path, rank=0, world=2)
    run(model, data, tmp_path, rank=1, world=2)
    go_on.set()
    first.join()
    assert Vectors(tmp_path).missing() == []


def test_a_mixture_is_refused(model: UniMoER, data: Path, whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "Tiny")
    lines = (copy / "corpus.jsonl").read_text()
    (copy / "corpus.jsonl").write_text(lines.replace("rare3 ", "rare5 "))
    before = stored_files(whole)
    for source, options, message in (
        (data, {"revision": "other"}, "revision: 'r' there, 'other' now"),
        (data, {"window": 6}, "window: 5 there, 6 now"),
        (data, {"dtype": "float32"}, "dtype: 'float16' there, 'float32' now"),
        (copy, {}, "fingerprint: '"),
    ):
        with pytest.raises(ValueError, match=f"holds other vectors.*{message}"):
            run(model, source, whole, **options)
    assert stored_files(whole) == before


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"window": 0}, {"rank": 2, "world": 2}, {"rank": -1}]
)
def test_options_that_cannot_be(options: dict, model: UniMoER, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a dtype of"):
        run(model, data, tmp_path, **options)


def test_a_disk_without_room_is_seen_beforehand(
    model: UniMoER, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """42 vectors of 32 float16: 2,688 bytes; what is finished is not asked for again."""
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda path: usage(10, 10, 2687))
    counted = Counted(monkeypatch)
    with pytest.raises(ValueError, match="0.00 GB of vectors are still to be written.*make room"):
        run(model, data, tmp_path)
    assert not counted.texts
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda path: usage(10, 10, 2688))
    run(model, data, tmp_path)
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda path: usage(10, 10, 0))
    run(model, data, tmp_path)


def test_a_write_that_fails_keeps_what_is_finished(
    model: UniMoER, data: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    """The system refuses the fourth window's vectors: no file may be longer than 300 bytes. What
    was written of them is no hindrance."""
    right, seen = UniMoER.encode_document, []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def counted(model, texts, **options):
        seen.append(len(texts))
        if len(seen) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        return right(model, texts, **options)

    monkeypatch.setattr(UniMoER, "encode_document", counted)
    try:
        with pytest.raises(ValueError, match=r"00003\.npy: cannot be written \(File too large\)"):
            run(model, data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert Vectors(tmp_path).missing() == [3, 4, 5, 6, 7, 8]
    assert (tmp_path / ".00003.npy.0-of-1.part").stat().st_size == 300
    run(model, data, tmp_path)
    assert stored_files(tmp_path) == stored_files(whole)


def test_a_vector_that_is_no_number(
    model: UniMoER, data: Path, tmp_path: Path, monkeypatch
) -> None:
    right = UniMoER.encode_document

    def broken(model, texts, **options):
        found = right(model, texts, **options)
        found[2, 1] = torch.nan
        return found

    monkeypatch.setattr(UniMoER, "encode_document", broken)
    with pytest.raises(ValueError, match="document 'd2': its vector is not finite"):
        run(model, data, tmp_path)


def test_a_document_of_100000_tokens_is_cut(model: UniMoER, tmp_path: Path, monkeypatch) -> None:
    """Its vector is that of its first `document_tokens`; the tokenizer takes it alone."""
    long = "ba ko mi " * 33_334
    assert len(model.tokenizer.fast.encode(long).ids) >= 100_000
    rows = [{"_id": "a", "text": "ba ko"}, {"_id": "long", "text": long}, {"_id": "b", "text": ""}]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sizes = []
    chunks = tokens._chunks
    monkeypatch.setattr(tokens, "CHARACTERS", 200_000)
    monkeypatch.setattr(
        tokens, "_chunks", lambda filled: (sizes.append(len(c)) or c for c in chunks(filled))
    )
    sources = Sources("x", [file], [], {}, {})
    stored = encode(model, sources, tmp_path / "v", revision="r", dtype="float32")
    short = model.encode_document([long[:300]])
    assert sizes[:3] == [1, 1, 1]
    torch.testing.assert_close(torch.from_numpy(stored.shard(0)[1].copy()), short[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{", "manifest.json cannot be read as JSON"),
        ("manifest.json", b'{"format": 0}', "is not of format 1"),
        ("00003.npy", b"\x93NUMPY", r"00003\.npy cannot be read .*remove it"),
        ("00003.npy", None, r"00003\.npy holds .* of \(2, 32\), expected <f2 of \(5, 32\)"),
        ("00003.ids.npy", None, r"00003\.ids\.npy holds .* of \(2,\), expected .S of \(5,\)"),
    ],
)
def test_damaged_files_are_named(
    name: str, content: bytes | None, message: str, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    other = (whole / name.replace("00003", "00008")).read_bytes()  # the last shard is shorter
    (folder / name).write_bytes(other if content is None else content)
    with pytest.raises(ValueError, match=message):
        stored = Vectors(folder)
        stored.ids()
        stored.shard(3)


def test_a_removed_shard_alone_is_made_again(
    model: UniMoER, data: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "00002.npy").unlink()
    (folder / "00007.ids.npy").unlink()
    counted = Counted(monkeypatch)
    run(model, data, folder)
    assert counted.windows == 2 and stored_files(folder) == stored_files(whole)
