"""The pipeline of three stages: what it reads, what it answers, what it says of memory and time."""

import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval import __main__ as program
from eval import large, rag
from eval.collections import load
from eval.provenance import sources
from eval.stages import Stages
from eval.vectors import Vectors, encode
from experiments import SPARSEGEN
from model.generate import Generator
from model.unimoer import UniMoER
from model.weights import revision
from tests.eval import published
from tests.eval.published import asked
from tests.eval.shared import real
from tests.train.tiny import TEST, tiny_config, write_collection
from train.trial import model_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny collection; query i is answered by its document's rare word."""
    folder = write_collection(tmp_path_factory.mktemp("rag") / "Tiny")
    lines = (folder / "queries.jsonl").read_text().splitlines()
    queries = [json.loads(line)["_id"] for line in lines]
    answers = {q: [f"rare{q[1:]}", "another"] for q in queries}
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


@pytest.fixture(scope="module")
def folder(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three of the base's four layers; the generator takes the fourth too."""
    model = UniMoER(model_config(tiny_config(tiny_base, data, **SPARSEGEN, layers=3)))
    with torch.no_grad():
        for name, parameter in model.trained().items():
            if ".lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    place = tmp_path_factory.mktemp("saved") / "arm" / "seed0.model"
    model.save_pretrained(place)
    return place


def encoded(folder: Path, data: Path, out: Path) -> Vectors:
    line = ["encode", "--model", str(folder), "--data", str(data), "--out", str(out),
            "--device", "cpu"]  # fmt: skip
    assert program.main(line) == 0
    return Vectors(large.folder_of(str(out), str(folder), data.name))


def test_each_stage_hands_on_what_it_found(folder: Path, data: Path, tmp_path: Path) -> None:
    """The reranker's best of the retriever's, cut and put before the question."""
    model = UniMoER.from_pretrained(folder)
    collection = load(str(data))
    settings = rag.Settings(depth=6, passages=2, passage_tokens=5, new_tokens=4)
    stored = encoded(folder, data, tmp_path)
    made = rag.Pipeline([model] * 3, collection, "test", stored, settings)
    documents = collection.pools["test"]
    query = "q30"
    answer, read, seconds = made.ask(query)
    text = collection.queries[query]
    vectors = model.encode_document([collection.corpus[d] for d in documents])
    torch.testing.assert_close(made.vectors, vectors.half().float())
    near: list[int] = (model.encode_query([text]) @ vectors.t())[0].topk(6).indices.tolist()
    ranked = model.rank(text, [collection.corpus[documents[i]] for i in near], 2)
    assert read == [documents[near[i]] for i, _ in ranked]
    fast = model.tokenizer.fast
    cut = [fast.decode(fast.encode(collection.corpus[d]).ids[:5]) for d in read]
    prompt = rag.PROMPT.format(passages=f"{cut[0]}\n\n{cut[1]}", question=text)
    assert prompt.endswith(f"{cut[0]}\n\n{cut[1]}\n\nQuestion: {text}\nAnswer:")
    ids = Generator(model).generate([fast.encode(prompt).ids], 4, stop=made.stop)[0]
    assert answer == fast.decode([i for i in ids if i not in made.stop]).strip()
    assert set(seconds) == set(rag.STAGES) and min(seconds.values()) > 0
    assert all("\n" in fast.decode([i]) for i in made.stop - {model.tokenizer.end_id})


def test_the_prompt_begins_as_texts_of_the_base_do(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a BOS for Mistral."""
    model, stored = UniMoER.from_pretrained(folder), encoded(folder, data, tmp_path)
    made = rag.Pipeline([model] * 3, load(str(data)), "test", stored, rag.Settings())
    bare = made.prompt("who?", [])
    monkeypatch.setattr(type(model.tokenizer), "lead", lambda self: [5])
    assert made.prompt("who?", []) == [5, *bare]


def test_stages_that_are_left_out(folder: Path, data: Path, tmp_path: Path) -> None:
    """Without reranking the retriever's best are read, or BM25's; without documents, none."""
    model, collection = UniMoER.from_pretrained(folder), load(str(data))
    settings = rag.Settings(depth=6, passages=2, passage_tokens=5, new_tokens=4)
    stored = encoded(folder, data, tmp_path)
    query, made = "q30", {}
    for side in ("one", *rag.PARTS):
        pipeline = rag.Pipeline([model] * 3, collection, "test", stored, settings, side)
        made[side] = answer, read, seconds = pipeline.ask(query)
        assert tuple(seconds) == rag.PARTS.get(side, rag.STAGES)
        prompt = pipeline.prompt(collection.queries[query], read)
        ids = Generator(model).generate([prompt], 4, stop=pipeline.stop)[0]
        assert (
            answer
            == model.tokenizer.fast.decode([i for i in ids if i not in pipeline.stop]).strip()
        )
    near = rag.Pipeline([model] * 3, collection, "test", stored, settings).retrieve(query, "rare30")
    assert len(near) == 6
    vectors = model.encode_document(list(collection.corpus.values()))
    best = (model.encode_query([collection.queries[query]]) @ vectors.t())[0].topk(2).indices
    assert made["no-rerank"][1] == [list(collection.corpus)[i] for i in best.tolist()]
    found = collection.bm25("test").search({query: collection.queries[query]}, 2)[query]
    assert made["bm25"][1] == list(found) and list(found)[0] == "d30"
    assert made["closed-book"][1] == []
    closed = rag.Pipeline([model] * 3, collection, "test", stored, settings, "closed-book")
    prompt = model.tokenizer.fast.decode(closed.prompt("who am i", []))
    assert prompt.endswith("Answer: 366\n\nQuestion: who am i\nAnswer:")


@pytest.mark.parametrize("side", ["bm25", "closed-book"])
def test_a_side_that_takes_no_vectors(side: str, folder: Path, data: Path) -> None:
    """None are read, so none have to be there."""
    model, collection = UniMoER.from_pretrained(folder), load(str(data))
    assert not rag.takes_vectors(side) and rag.takes_vectors("no-rerank")
    settings = rag.Settings(depth=6, passages=2, passage_tokens=5, new_tokens=4)
    pipeline = rag.Pipeline([model] * 3, collection, "test", None, settings, side)
    assert len(pipeline.ask("q30")[1]) == (2 if side == "bm25" else 0)


def test_intervals_of_the_table() -> None:
    """Student's t by hand, and a paired difference that no question disagrees with."""

    def side(name: str, scores: list[float]) -> dict:
        rows = {f"q{i}": {"exact_match": s, "f1": s, "answer": str(s)}
                for i, s in enumerate(scores)}  # fmt: skip
        took = {
            s: {"median": 0.1, "p95": 0.2} for s in (*rag.PARTS.get(name, rag.STAGES), "together")
        }
        mean = sum(scores) / len(scores)
        return {"side": name, "questions": rows, "found": 0.5, "latency": took,
                "exact_match": mean, "f1": mean,
                "resident_bytes": 10**9, "peak_bytes": 2 * 10**9}  # fmt: skip

    text = rag.table([side("one", [1, 0, 1, 0]), side("no-rerank", [0.75, 0, 0.75, 0])], "title")
    # mean 0.5, sd 0.577, 3 degrees of freedom: 3.182 * 0.577 / 2
    title, head, one, without, last = text.splitlines()
    assert title == "title" and "0.500 ± 0.919" in one and "0.375 ± 0.689" in without
    assert one.count("100, 200 ms") == 4 and without.count("100, 200 ms") == 3
    assert last.startswith("all stages against no-rerank: +0.125 [-0.105, +0.355] EM")
    assert "nan" in rag.table([side("one", [1])], "title")
    # Three specialists are no whole of which a part of one model were left.
    three = side("three", [0.75, 0, 0.75, 0]) | {"specialists": [{}, {}]}
    assert "against" not in rag.table([three, side("no-rerank", [0.75, 0, 0.75, 0])], "title")
    *_, last = rag.table([side("one", [1, 0, 1, 0]), three], "title").splitlines()
    assert last.startswith("all stages against three specialists: +0.125 [-0.105, +0.355] EM")


def test_vectors_of_something_else(folder: Path, data: Path, tmp_path: Path) -> None:
    """Of other documents, of another model on the same base, or not all there."""
    model, collection = UniMoER.from_pretrained(folder), load(str(data))
    stored = encoded(folder, data, tmp_path)
    few = replace(collection, corpus={"d0": collection.corpus["d0"]})
    with pytest.raises(ValueError, match="vectors of 42 documents, expected 1: remove it"):
        rag.Pipeline([model] * 3, few, "test", stored, rag.Settings())
    with torch.no_grad():
        next(iter(model.trained().values())).add_(1)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match="holds vectors of the model .*, expected those of .*other"
    ):
        rag.measure(str(tmp_path / "other"), "one", collection, "test", {}, rag.Settings(), "cpu",
                    stored, Stages(tmp_path / "of.json", {}))  # fmt: skip
    stored.path(0).unlink()
    with pytest.raises(ValueError, match="1 of 1 shards are missing"):
        rag.Pipeline([model] * 3, collection, "test", stored, rag.Settings())


def test_more_models_hold_more_and_answer_alike(
    folder: Path, data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    line = ["rag", "--model", str(folder), "--data", str(data), "--out", str(tmp_path),
            "--device", "cpu", "--depth", "5", "--passages", "2", "--queries", "3"]  # fmt: skip
    commands, run = [], subprocess.run

    def counted(words: list[str], check: bool):
        """The first of a kind as it is, the others in this process."""
        commands.append(words[3])
        if words[3] in commands[:-1]:
            return SimpleNamespace(returncode=program.main(words[3:]))
        return run(words, check=check)

    monkeypatch.setattr(subprocess, "run", counted)
    assert program.main(line) == 0
    assert commands == ["encode", *["rag"] * 5]  # encoded once for all
    out = capsys.readouterr().out
    assert "all stages against no-rerank: " in out and "all stages against closed-book: " in out
    assert (tmp_path / "rag" / "arm-seed0" / "tiny-test.txt").read_text() in out
    assert "the sides give the same answers: yes" in out
    results = [json.loads((tmp_path / "rag" / "arm-seed0" / f"tiny-test-{side}.json").read_text())
               for side in rag.SIDES]  # fmt: skip
    sizes = [result["resident_bytes"] for result in results]
    model = UniMoER.from_pretrained(folder).compact()
    bare = UniMoER(replace(model.config, layers=None, lora=None, router=None)).compact()
    embedder, base = (sum(t.numel() * t.element_size() for t in (*of.parameters(), *of.buffers()))
                      for of in (model, bare))  # fmt: skip
    added = sum(t.numel() * t.element_size() for t in Generator(model).added)
    assert sizes == [embedder + added, embedder + base, 2 * embedder + base] and 0 < added < base
    for result in results:
        assert result["sources"] == sources() and result["versions"]["torch"] == torch.__version__
        assert len(result["questions"]) == 3 and result["exact_match"] <= result["f1"] <= 1
        assert result["peak_bytes"] > 0 and set(result["latency"]) == {*rag.STAGES, "together"}
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*.json"))
    assert program.main(line) == 0 and len(commands) == 6  # nothing is computed twice
    assert before == sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*.json"))
    assert program.main([*line, "--passages", "1"]) == 2
    said = "is of another model, data, setting or device (asked.passages: 2 there, 1 now)"
    assert said in capsys.readouterr().err


def test_specialists_take_the_place_of_one_model_thrice(
    folder: Path, data: Path, tmp_path: Path, capsys, in_process
) -> None:
    """A reranker of its own, whose head is turned round, reads other passages first."""
    other = UniMoER.from_pretrained(folder)
    with torch.no_grad():
        for parameter in other.head.parameters():
            parameter.neg_()
    other.save_pretrained(tmp_path / "other")
    line = ["rag", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / "out"),
            "--device", "cpu", "--depth", "5", "--passages", "5", "--queries", "2"]  # fmt: skip
    both = [str(folder), str(tmp_path / "other")]
    assert program.main([*line, "--sides", "one", "three", "--specialists", *both]) == 0
    read = {}
    for side in ("one", "three"):
        path = tmp_path / "out" / "rag" / "arm-seed0" / f"tiny-test-{side}.json"
        found = json.loads(path.read_text())
        read[side] = [row["read"] for row in found["questions"].values()]
        mine = list(map(revision, both)) if side == "three" else []
        assert [of["revision"] for of in found["specialists"] or []] == mine
    assert read["three"] == [row[::-1] for row in read["one"]]
    assert program.main([*line, "--sides", "three"]) == 2  # those were of other models
    assert "is of another model" in capsys.readouterr().err
    assert program.main([*line, "--sides", "one"]) == 0  # which they have no part in


def test_right_answers_count(folder: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    """A generator that says the rare word of the question scores 1 throughout."""
    collection = load(str(data))
    queries = [q for q in collection.qrels["test"] if q != f"q{24 + 4 + TEST - 1}"]
    answers = rag.read_answers(data, queries)
    monkeypatch.setattr(rag.Pipeline, "ask", lambda self, query: (
        f"The {answers[query][0]}.", [], dict.fromkeys(rag.STAGES, 0.1)))  # fmt: skip
    stored = encoded(folder, data, tmp_path)
    stages = Stages(tmp_path / "result.json", {})

    def measure() -> dict:
        settings = rag.Settings()
        line = str(folder), "one", collection, "test", answers, settings, "cpu", stored, stages
        return rag.measure(*line)

    found = measure()
    assert (found["exact_match"], found["f1"], found["found"]) == (1, 1, 0)
    assert found["latency"]["together"]["p95"] == pytest.approx(0.3)
    # Started again it asks none of them a second time.
    monkeypatch.setattr(rag.Pipeline, "ask", None)
    again = measure()
    assert again["questions"] == found["questions"]
    assert again["peak_bytes"] >= found["peak_bytes"]


def test_a_set_by_name(
    hub_files, folder: Path, tmp_path: Path, monkeypatch, capsys, in_process
) -> None:
    """Only questions that have an answer are asked, by the set's own rule and split."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    # In this process the hub is the tests' own; windows of two of the three passages.
    monkeypatch.setattr(large, "encode", partial(encode, window=2))
    published.triviaqa(hub_files[0])
    published.beir(hub_files[0], "nq", 0)
    published.nq_answers(hub_files[0], {asked("nq")["q1"]: ["an answer"]})
    published.beir(hub_files[0], "hotpotqa", 1)
    published.hotpotqa_answers(hub_files[0], {"q0": "yes", "q2": "no"})
    line = ["rag", "--model", str(folder), "--data", "triviaqa", "nq", "hotpotqa",
            "--out", str(tmp_path), "--device", "cpu", "--depth", "3", "--passages", "1",
            "--sides", "one"]  # fmt: skip
    assert program.main(line) == 0
    assert "triviaqa, dev, arm-seed0" in (out := capsys.readouterr().out)
    assert "nq, test, arm-seed0" in out
    place = tmp_path / "rag" / "arm-seed0"
    trivia = json.loads((place / "triviaqa-dev-one.json").read_text())
    assert (trivia["asked"]["rule"], list(trivia["questions"])) == ("triviaqa", ["0", "1"])
    assert trivia["documents"] == 3 and trivia["answers"]["questions without an answer"] == "0"
    nq = json.loads((place / "nq-test-one.json").read_text())
    assert (nq["asked"]["rule"], list(nq["questions"])) == ("nq", ["q1"])
    assert nq["answers"]["questions without an answer"] == "2"
    hotpot = json.loads((place / "hotpotqa-test-one.json").read_text())
    assert (hotpot["asked"]["rule"], list(hotpot["questions"])) == ("hotpotqa", ["q0", "q2"])
    prompts = UniMoER.from_pretrained(folder).config.prompts
    assert hotpot["prompts"] == {**prompts.texts(), "generate": rag.PROMPT}
    assert program.main([*line, "--split", "test"]) == 2
    assert "triviaqa has no test split (it has dev)" in capsys.readouterr().err


def test_sampled_answers(folder: Path, data: Path, tmp_path: Path, capsys, in_process) -> None:
    """They differ from greedy ones and from another seed's, and are the same again: of all sides,
    and of a question that is asked alone."""

    def answers(name: str, *more: str) -> dict[str, str]:
        line = ["rag", "--model", str(folder), "--data", str(data), "--out", str(tmp_path / name),
                "--device", "cpu", "--depth", "5", "--sides", "one", "three"]  # fmt: skip
        assert program.main([*line, *more]) == 0
        assert "the sides give the same answers: yes" in capsys.readouterr().out
        [place] = (tmp_path / name).glob("rag/*/tiny-test-one.json")
        found = json.loads(place.read_text())
        assert found["asked"].get("temperature") == (float(more[1]) if more else None)
        return {q: row["answer"] for q, row in found["questions"].items()}

    hot = ("--temperature", "50", "--top-k", "50", "--top-p", "0.95", "--queries", "4")
    greedy, drawn = answers("greedy"), answers("drawn", *hot)
    assert len(drawn) == 4 and all(drawn[q] != greedy[q] for q in drawn)
    fewer = answers("fewer", *hot[:-1], "2")
    assert fewer == {q: drawn[q] for q in fewer} and len(fewer) == 2
    other = answers("other", *hot, "--seed", "1")
    assert all(drawn[q] != other[q] for q in drawn)


def test_real_questions_and_answers(folder: Path, tmp_path: Path, capsys, in_process) -> None:
    """NQ's own questions and answers over 2,000 passages, to the end."""
    sides = ("one", "three", "bm25")
    line = ["rag", "--model", str(folder), "--data", str(real("nq-open-silver")), "--queries", "4",
            "--out", str(tmp_path), "--device", "cpu", "--depth", "5"]  # fmt: skip
    assert program.main([*line, "--sides", *sides]) == 0
    out = capsys.readouterr().out
    assert "the sides give the same answers: yes" in out and "all stages against bm25: " in out
    for side in sides:
        place = tmp_path / "rag" / "arm-seed0" / f"nq-open-silver-test-{side}.json"
        found = json.loads(place.read_text())
        assert len(found["questions"]) == 4 and found["asked"]["rule"] == "nq"
        assert all(row["gold"] for row in found["questions"].values())


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="rule must be one of"):
        rag.Settings(rule="mine")
    with pytest.raises(ValueError, match="passages must lie between 1 and depth=2"):
        rag.Settings(depth=2, passages=3)
    with pytest.raises(ValueError, match="expected temperature >= 0"):
        rag.Settings(temperature=-1.0)
    options: tuple[dict[str, Any], ...] = ({"top_p": 0.9}, {"top_k": 5}, {"seed": 1})
    for drawn in options:
        with pytest.raises(ValueError, match="give a temperature above 0 too"):
            rag.Settings(**drawn)
