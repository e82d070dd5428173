"""The benchmarks run, compare like with like and say what they measured; no speed is asserted."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import corpus, encoding, index, reranking, tables, timing, training
from model.heads import LinearScore
from model.unimoer import UniMoER
from tests.train.tiny import write_collection
from train.trial import Workbench


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    """A tiny base that transformers can pad with."""
    folder = make_base()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    data = write_collection(tmp_path_factory.mktemp("bench") / "tiny")
    return Workbench(str(data), "cpu", data / "cache", keep_prefix=False)


SMALL = {"rounds": 2, "dtypes": ("float32",)}
MEAN = {**SMALL, "poolings": ("mean",)}
SETTINGS = {
    "all": {"layers": 4, "adapter_layers": 0, "prefix": False, "train_queries": 24},
    "upper": {"layers": 4, "adapter_layers": 2, "train_queries": 24},
}


def test_rivals_take_turns():
    seen = []

    def run(turn: int, name: str) -> None:
        seen.append((name, turn))

    times = timing.seconds({name: partial(run, name=name) for name in "ab"}, 3)
    assert {name: len(row) for name, row in times.items()} == {"a": 3, "b": 3}
    order = [("b", 0), ("a", 0)] * 2 + [("a", 1), ("b", 1)] + [("b", 2), ("a", 2)]
    assert seen == order  # the first pair warms up


def test_throughput_and_ratio_by_hand():
    times = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 2.0]}
    rates = timing.rates(times, [100, 100, 100])
    assert rates["ours"] == {"median": 50, "q1": 37.5, "q3": 75}
    assert timing.ratio(times, "ours", "theirs") == {"median": 1, "q1": 0.75, "q3": 1.5}


def test_encoding(base, bench):
    row, other = encoding.run(bench, str(base), layers=2, count=12, tokens=64, **SMALL)
    model = UniMoER(encoding.config(str(base), 2, "float32", 64))
    texts = encoding.mixed_texts(bench.collection, model, 12, 64)
    assert len(texts) == 18 and row["what"] == "encode 18 mixed texts, 2 layers, mean pooling"
    assert other["what"].endswith("last pooling") and other["tokens"] == row["tokens"]
    assert row["tokens"] == sum(map(len, model.tokenizer.documents(texts)))
    assert row["searched"].keys() == {str(batch) for batch in encoding.BATCHES["cpu"]}
    best = max(row["searched"], key=lambda batch: row["searched"][batch]["median"])
    assert row["against"] == other["against"] == f"sentence-transformers, batch {best}"
    assert "searched" not in other and row["rounds"] == 2  # searched once for each dtype


def test_an_encoder_that_does_something_else_is_refused(base, bench, monkeypatch):
    right = UniMoER.encode_document
    monkeypatch.setattr(UniMoER, "encode_document", lambda self, texts: right(self, texts).flip(1))
    with pytest.raises(ValueError, match="the two encoders disagree: smallest cosine"):
        encoding.run(bench, str(base), layers=2, count=12, tokens=64, **MEAN)


def test_reranking(base, bench):
    """A row of both sides on the same pairs, the rival at its best batch."""
    [row] = reranking.run(bench, str(base), layers=2, count=12, tokens=128, **SMALL)
    model = UniMoER(reranking.config(str(base), 2, "float32", 128))
    pairs = reranking.mixed_pairs(bench.collection, model, 12, 128)
    ids = model.tokenizer.pairs(pairs)
    lengths = [len(text) for text in ids]
    count = len({query for query, _ in pairs})
    assert len(pairs) == row["pairs"] == 12 and 1 < count < 12
    # All of them fit into one batch.
    assert row["entering"] == len({tuple(t[: n + 1]) for t in ids for n in range(len(t))})
    share = row["entering"] / row["tokens"]
    assert share < 0.95 and row["what"] == (
        f"rerank 12 mixed pairs of {count} queries, 2 layers ({share:.0%} of the tokens are run)"
    )
    assert row["tokens"] == sum(lengths) and len(set(lengths)) > 3 and max(lengths) <= 128
    assert row["searched"].keys() == {str(batch) for batch in reranking.BATCHES["cpu"]}
    best = max(row["searched"], key=lambda batch: row["searched"][batch]["median"])
    assert row["against"] == f"sentence-transformers' CrossEncoder, batch {best}"


def test_the_rival_scores_as_we_do(base, bench):
    """Ours against the library's logits, padded and alone, at a head whose bias counts."""
    model = UniMoER(reranking.config(str(base), 2, "float32", 128), seed=3)
    assert isinstance(model.head, LinearScore)
    with torch.no_grad():
        model.head.linear.bias.fill_(0.7)
    pairs = reranking.mixed_pairs(bench.collection, model, 12, 128)
    texts = [reranking.halves(pair, model) for pair in pairs]
    assert ["".join(pair) for pair in texts] == [
        f"Query: {query}\nDocument: {document}<|endoftext|>" for query, document in pairs
    ]
    rival = reranking.cross_encoder(model, base, 2, 128)
    for batch in (1, 12):
        theirs = rival.predict(texts, batch_size=batch, convert_to_tensor=True)
        torch.testing.assert_close(model.predict(pairs), theirs, rtol=1e-4, atol=1e-5)


def test_a_reranker_that_does_something_else_is_refused(base, bench, monkeypatch):
    small = {"layers": 2, "count": 12, "tokens": 128, **SMALL}
    right = UniMoER.score_all
    monkeypatch.setattr(UniMoER, "score_all", lambda self, texts: right(self, texts).flip(0))
    with pytest.raises(ValueError, match="the two rerankers disagree: scores differ by up to"):
        reranking.run(bench, str(base), **small)
    monkeypatch.undo()
    halves = reranking.halves
    monkeypatch.setattr(reranking, "halves", lambda pair, model: halves(pair, model)[::-1])
    monkeypatch.setattr(reranking, "mixed_pairs", lambda *_: [("one", "two three"), ("a", "b")])
    with pytest.raises(ValueError, match="the two rerankers read other tokens in"):
        reranking.run(bench, str(base), **small)


def test_pairs_that_are_all_too_long_are_refused(base, bench):
    model = UniMoER(reranking.config(str(base), 2, "float32", 8))
    with pytest.raises(ValueError, match="pairs 0 have at most 8 tokens"):
        reranking.mixed_pairs(bench.collection, model, 12, 8)


def test_training(trained):
    rows = trained
    assert [row["what"] for row in rows] == [f"train Joint-Single, {name}" for name in SETTINGS]
    assert len({row["tokens"] for row in rows}) == 1 and rows[0]["tokens"] > 0
    assert all(row["ratio"]["median"] > 0 for row in rows)


def test_the_rival_trains_the_same_model(base, bench):
    """Same loss, and the same gradient of the head, which both have."""
    config = training.experiments.config(
        "kill_gate", "joint-single", "small", 0, base=str(base), dtype="float32", **SETTINGS["all"]
    )
    model = bench.model(config)
    data = training.TrainingData(
        bench.collection, model.tokenizer, config, bench.states(model, config)
    )
    ours = training.Ours(model, data, config)
    theirs = training.Theirs(base, ours)
    heads = []
    for side in (ours, theirs):
        loss = side.loss(1)
        loss.backward()
        heads.append((loss.detach(), side.parameters["head.linear.weight"].grad))
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-5)
    size = sum(p.numel() for p in ours.parameters.values())
    assert size == sum(p.numel() for p in theirs.parameters.values())


def test_a_rival_with_another_loss_is_refused(base, bench, monkeypatch):
    monkeypatch.setattr(training.Theirs, "loss", lambda self, step: torch.tensor(99.0))
    with pytest.raises(ValueError, match="first losses .*99.* differ"):
        training.run(bench, str(base), settings=SETTINGS, **SMALL)


def test_corpora_of_growing_size(base, bench, monkeypatch):
    rows = corpus.run(bench, str(base), layers=2, counts=(12, 30), window=8)
    model = UniMoER(encoding.config(str(base), 2, "float32", 512))
    for row, count in zip(rows, (12, 30), strict=True):
        texts = list(corpus.passages(bench.collection.queries.values(), count))
        assert {len(text.split()) for text in texts} == {corpus.WORDS} and len(set(texts)) > 5
        assert row["texts"] == count
        assert row["tokens"] == sum(map(len, model.tokenizer.documents(texts)))
        assert 0 < row["loaded_bytes"] <= row["peak_bytes"] and row["seconds"] > 0
    assert f"| 30 | {rows[1]['tokens']:,} | " in tables.corpus_table(rows)
    monkeypatch.setattr(corpus.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="encoding 3 texts ended with an error"):
        corpus.run(bench, "nowhere/at/all", counts=(3,))


def test_indexes_of_growing_size(monkeypatch):
    texts = index.Drawn(50)
    assert texts[3:5] == [texts[3], texts[4]] and texts[3] != texts[4]
    assert {len(text.split()) for text in texts} == {index.WORDS}
    words = " ".join(texts).split()
    assert words.count("w0") > 2 * words.count("w9") > 0  # after Zipf: ten times as frequent
    rows = index.run(counts=(200, 10_000))
    assert [row["documents"] for row in rows] == [200, 10_000]
    for row in rows:
        assert 0 < row["before_bytes"] <= row["peak_bytes"]
    # A posting is a score and a document's number, 4 bytes each; words that recur make one.
    assert index.growth(rows, "peak_bytes") > index.growth(rows, "kept_bytes") > 4 * index.WORDS
    assert 0 < rows[1]["own_bytes"] < rows[1]["peak_bytes"] - rows[1]["before_bytes"]
    assert "| 10,000 | " in tables.index_table(rows)
    monkeypatch.setattr(index.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="indexing 0 documents ended with an error"):
        index.run(counts=(0,))


@pytest.fixture(scope="module")
def trained(base, bench) -> list[dict]:
    """Rows of a real section, measured once."""
    return training.run(bench, str(base), settings=SETTINGS, **SMALL)


@pytest.fixture
def call(base, bench, trained, monkeypatch, tmp_path):
    """`make bench` of three parts, the last too large: call(seconds of each part, *arguments) ->
    what was run. Results go to tmp_path / "results"."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    data = str(bench.collection.provenance["path"])
    monkeypatch.setattr(command, "DATA", data)

    def run(seconds: float, *arguments: str) -> list[str]:
        ran, clock = [], [0.0]

        def some(bench, base, rounds):
            def part(name: str) -> list[dict]:
                ran.append(name)
                clock[0] += seconds
                if name == "third":
                    raise torch.OutOfMemoryError
                return copy.deepcopy(trained)

            return [
                ("training", "first", partial(part, "first")),
                ("training", "second", partial(part, "second")),
                ("ops", "third", partial(part, "third")),
            ]

        monkeypatch.setattr(command, "parts", some)
        monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
        given = ["--base", str(base), "--data", data, "--rounds", "2", "--runs", str(tmp_path)]
        command.main([*given, *arguments])
        return ran

    return run


def test_the_record_goes_on_where_time_ended(call, base, tmp_path, capsys):
    assert call(70, "--minutes", "1") == ["first"]
    [record, text] = sorted((tmp_path / "results").iterdir())
    assert record.stem == timing.stem(timing.made_by("cpu")["device"], base.name)
    shown = capsys.readouterr().out
    assert shown.count("| train Joint-Single, ") == 2
    assert "- training, second: not measured (out of time)" in text.read_text()
    assert "out of time: 2 parts are left, the same command goes on" in shown
    assert call(30) == ["second", "third"]
    found = json.loads(record.read_text())
    assert len(found["training"]) == 4 and found["left_out"] == [] and found["seconds"] == 130
    assert found["versions"]["torch"] == torch.__version__ and found["sources"]
    assert found["threads"] == torch.get_num_threads()
    assert "- ops, third: out of memory" in text.read_text()
    assert "- everything that needs a GPU: not measured" in text.read_text()
    assert call(30) == ["first", "second", "third"]  # a whole one is measured anew


def test_a_record_of_other_code_is_not_gone_on_with(call, tmp_path):
    call(70, "--minutes", "1")
    [record, _] = sorted((tmp_path / "results").iterdir())
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sources": "other"}))
    assert call(30) == ["first", "second", "third"]


def test_some_sections_leave_the_record_alone(call, tmp_path, capsys):
    call(30)
    whole = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert call(30, "--only", "ops") == ["third"]
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == whole
    assert len(list((tmp_path / "bench").iterdir())) == 2
    with pytest.raises(SystemExit):
        call(30, "--rounds", "1")


def test_other_texts_are_another_record(call, tmp_path, monkeypatch):
    call(30)
    monkeypatch.setattr(command, "DATA", "another")
    call(30)
    assert len(list((tmp_path / "results").glob("*.json"))) == 2
