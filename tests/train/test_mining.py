"""train/mining.py: what may be a negative, what a killed run leaves, what is refused; and what
training makes of the folder."""

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.bm25 import BM25
from eval.collections import Collection, load
from eval.machine import device_name
from kernels.reference import info_nce
from model.packed import pack
from model.unimoer import UniMoER
from tests.train.tiny import TRAIN, build, tiny_config, tokens_only, write_collection
from train import __main__ as program
from train import losses, mining
from train.batches import TrainingData
from train.loop import train
from train.mining import LEXICAL, Settings, choose, limit, mine
from train.negatives import best_positive, mined_sha256
from train.step import task_loss
from train.trial import model_config, resolved
from trials import Config

WIDE = Settings(depth=30, ranks=(1, 30), margin=0, negatives=4, fill=True, part=7)


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def collection(tiny_data: Path) -> Collection:
    return load(str(tiny_data))


@pytest.fixture(scope="module")
def folders(
    tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Two saved models, whose experts differ."""
    made = []
    for seed in (0, 1):
        model = UniMoER(model_config(tiny_config(tiny_base, tiny_data)), seed=seed)
        with torch.no_grad():
            for name, parameter in model.trained().items():
                if ".lora_B" in name:
                    generator = torch.Generator().manual_seed(seed)
                    parameter.normal_(std=0.1, generator=generator)
        place = tmp_path_factory.mktemp("saved") / "arm" / f"seed{seed}.model"
        model.save_pretrained(place)
        made.append(str(place))
    return made


def rows(folder: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in (folder / "negatives.jsonl").read_text().splitlines()]
    return {row["query"]: row for row in found}


def distinct(ranking: Iterable[str], relevant: Iterable[str], collection: Collection) -> list[str]:
    """A ranking without the texts of relevant documents, and each other text once."""
    seen, kept = {collection.corpus[d] for d in relevant}, []
    for document in ranking:
        if collection.corpus[document] not in seen:
            seen.add(collection.corpus[document])
            kept.append(document)
    return kept


# The rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positive", "margin", "expected"),
    [
        (0.8, 0.95, 0.76),
        (20.0, 0.95, 19.0),
        (0.8, 1.0, 0.8),
        (-2.0, 0.95, -2.1),  # 0.95 * -2 = -1.9 would let in what beats the positive
        (0.0, 0.95, 0.0),
        (-2.0, 0.0, math.inf),
    ],
)
def test_the_limit_by_hand(positive: float, margin: float, expected: float) -> None:
    assert limit(positive, margin) == pytest.approx(expected)


def test_window_limit_and_draw_by_hand() -> None:
    ranked = {f"d{i}": 1 - i / 10 for i in range(1, 9)}  # d1 .9, d2 .8, ... d8 .2
    settings = Settings(depth=8, ranks=(2, 6), negatives=3, pick="top")
    assert choose("q", ranked, 0.65, settings) == ["d4", "d5", "d6"]
    assert choose("q", ranked, math.inf, settings) == ["d2", "d3", "d4"]
    assert choose("q", ranked, 0.45, settings) == ["d6"]
    assert choose("q", ranked, 0.4, settings) == []  # below, not at, the limit
    drawn = {tuple(choose(f"q{i}", ranked, 0.65, replace(settings, pick="sampled", negatives=2)))
             for i in range(40)}  # fmt: skip
    assert len(drawn) == 6 and {d for row in drawn for d in row} == {"d4", "d5", "d6"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (0, 5)}, "ranks 0 to 5: expected 1 <= first <= last <= depth=200"),
        ({"ranks": (10, 201)}, "ranks 10 to 201"),
        ({"margin": 1.5}, "margin must lie between 0"),
        ({"pick": "best"}, "pick must be one of sampled, top"),
        ({"negatives": 0}, "negatives must be at least 1"),
    ],
)
def test_settings_that_cannot_work(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


# BM25 --------------------------------------------------------------------------------------------


def test_bm25_by_the_definition(collection: Collection, tmp_path: Path) -> None:
    """Every line against BM25's whole ranking, gone through by hand."""
    settings = Settings(depth=20, ranks=(3, 12), margin=0.9, negatives=3, pick="top", part=5)
    manifest = mine(tmp_path / "out", collection, settings, LEXICAL)
    index = BM25(list(collection.corpus), list(collection.corpus.values()))
    short = 0
    for query, row in rows(tmp_path / "out").items():
        ranking = index.search({query: collection.queries[query]}, 999)[query]
        relevant = collection.qrels["train"][query]
        assert row["positive"] == best_positive(relevant)
        assert row["score"] == ranking.get(row["positive"], 0.0)  # 0: no term is shared
        ranked = distinct(ranking, relevant, collection)
        bound = 0.9 * row["score"]
        kept = [d for d in ranked[:20][2:12] if ranking[d] < bound][:3]
        assert row["negatives"] == {d: ranking[d] for d in kept}
        assert row["found"] == len(kept)
        short += len(kept) < 3
    assert manifest["mined"] == {
        "queries": TRAIN, "short": short, "none": sum(not r["found"] for r in
                                                      rows(tmp_path / "out").values()),
    }  # fmt: skip
    assert manifest["scores"] == "bm25" and manifest["retriever"] == "bm25"
    assert "copy4" not in rows(tmp_path / "out")["q4"]["negatives"]  # it has the positive's text


def test_bm25_cuts_words_as_the_collections_language_has_it(
    collection: Collection, tmp_path: Path
) -> None:
    foreign = replace(collection, language="zh")
    mine(tmp_path / "out", foreign, Settings(depth=20, ranks=(1, 12)), LEXICAL)
    texts = list(collection.corpus.values())
    for query, row in rows(tmp_path / "out").items():
        asked = collection.queries[query], [row["positive"]]
        there, english = (
            BM25(list(collection.corpus), texts, language=language).score(*asked)
            for language in ("zh", "en")
        )
        assert [row["score"]] == there != english


def test_copies_of_each_other_count_once(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "copies")
    with open(folder / "corpus.jsonl", "a") as file:
        for i in range(5):  # five times the text that is nearest to query 3, but for the rare word
            file.write(json.dumps({"_id": f"same{i}", "text": "mimi rare3 rare3"}) + "\n")
    collection = load(str(folder))
    mine(tmp_path / "out", collection, replace(WIDE, fill=False), LEXICAL)
    found = [d for d in rows(tmp_path / "out")["q3"]["negatives"] if d.startswith("same")]
    assert len(found) <= 1


def test_what_is_short_is_filled_from_the_pool(collection: Collection, tmp_path: Path) -> None:
    settings = Settings(depth=5, ranks=(4, 5), margin=0.5, negatives=4, part=100)
    mine(tmp_path / "short", collection, settings, LEXICAL)
    mine(tmp_path / "full", collection, replace(settings, fill=True), LEXICAL)
    short, full = rows(tmp_path / "short"), rows(tmp_path / "full")
    assert any(len(row["negatives"]) < 4 for row in short.values())
    for query, row in full.items():
        names = list(row["negatives"])
        assert names[: row["found"]] == list(short[query]["negatives"])
        assert len(names) == len({collection.corpus[d] for d in names}) == 4
        relevant = collection.qrels["train"][query]
        assert not {collection.corpus[d] for d in relevant} & {collection.corpus[d] for d in names}
    one = {"train": {"q0": {"d0": 1}}}
    small = replace(collection, qrels=one, pools={"train": ["d0", "d1", "d2"]})
    with pytest.raises(ValueError, match="fewer than 4 negatives in a pool of 3"):
        mine(tmp_path / "none", small, replace(settings, fill=True), LEXICAL)


# Models ------------------------------------------------------------------------------------------


def test_an_embedder_by_the_definition(
    collection: Collection, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors in several files, against cosines of all pairs in float64; two passes of two parts
    over them."""
    monkeypatch.setattr(mining, "SHARD", 9)  # 42 documents
    monkeypatch.setattr(mining, "AT_ONCE", 20)
    read, load = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **how: (read.append(how), load(path, **how))[1])
    settings = Settings(depth=20, ranks=(2, 15), margin=0.98, negatives=3, pick="top", part=10)
    manifest = mine(tmp_path / "out", collection, settings, folders[0])
    assert manifest["scores"] == "cosine"
    assert read.count({}) == 5 * -(-TRAIN // 20)  # whole files
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "manifest.json", "negatives.jsonl",
    ]  # fmt: skip
    model = UniMoER.from_pretrained(folders[0])
    names = list(collection.corpus)
    vectors = model.encode_document(list(collection.corpus.values())).double()
    some = 0
    for query, row in rows(tmp_path / "out").items():
        cosines = (model.encode_query([collection.queries[query]]).double() @ vectors.t())[0]
        ranking = {names[i]: float(cosines[i]) for i in cosines.argsort(descending=True)}
        assert row["score"] == pytest.approx(ranking[row["positive"]], abs=1e-6)
        relevant = collection.qrels["train"][query]
        ranked = distinct(ranking, relevant, collection)
        kept = [d for d in ranked[1:15] if ranking[d] < limit(ranking[row["positive"]], 0.98)][:3]
        texts = [[collection.corpus[d] for d in names] for names in (row["negatives"], kept)]
        assert texts[0] == texts[1]  # by text: copies tie
        assert list(row["negatives"].values()) == pytest.approx(
            [ranking[d] for d in kept], abs=1e-6
        )
        some += bool(kept)
    assert some > TRAIN // 2


def test_a_reranker_scores_anew_and_a_teacher_beside(
    collection: Collection, folders: list[str], tmp_path: Path
) -> None:
    settings = Settings(depth=12, ranks=(2, 8), margin=0.99, negatives=3, pick="top", part=24)
    mine(tmp_path / "out", collection, settings, LEXICAL, folders[0], folders[1])
    reranker, teacher = (UniMoER.from_pretrained(folder) for folder in folders)
    index = BM25(list(collection.corpus), list(collection.corpus.values()))
    some = 0
    for query, row in rows(tmp_path / "out").items():
        text, relevant = collection.queries[query], collection.qrels["train"][query]
        longest = max(map(len, collection.qrels["train"].values()))
        near = index.search({query: text}, 12 + longest)[query]
        near = distinct(near, relevant, collection)[:12]
        scores = reranker.predict([(text, collection.corpus[d]) for d in [row["positive"], *near]])
        own, scored = float(scores[0]), dict(zip(near, scores[1:].tolist(), strict=True))
        ranked = sorted(near, key=lambda d: -scored[d])
        kept = [d for d in ranked[1:8] if scored[d] < 0.99 * own][:3]
        assert list(row["negatives"]) == kept
        assert row["score"] == pytest.approx(own, rel=1e-5)
        group = [row["positive"], *kept]
        logits = [float(torch.logit(teacher.predict([(text, collection.corpus[d])]).double()))
                  for d in group]  # fmt: skip
        assert list(row["teacher"]) == group
        assert list(row["teacher"].values()) == pytest.approx(logits, abs=1e-4)
        some += bool(kept)
    assert some


# Killed, refused ---------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Every text and pair that a model is asked for."""
    seen: dict[str, list] = {"encode": [], "pairs": []}
    encode, pairs = UniMoER.encode, mining._logits

    def counting(self, texts, **options):
        seen["encode"] += [(options["task"], text) for text in texts]
        return encode(self, texts, **options)

    def counting_pairs(model, collection):
        score = pairs(model, collection)

        def scored(wanted):
            seen["pairs"] += [(id(score), pair) for pair in wanted]
            return score(wanted)

        return scored

    monkeypatch.setattr(UniMoER, "encode", counting)
    monkeypatch.setattr(mining, "_logits", counting_pairs)
    return seen


def forget(seen: dict[str, list]) -> None:
    for asked in seen.values():
        asked.clear()


def test_killed_and_continued_recomputes_nothing(
    collection: Collection, folders: list[str], tmp_path: Path, monkeypatch, counted
) -> None:
    monkeypatch.setattr(mining, "SHARD", 20)
    monkeypatch.setattr(mining, "AT_ONCE", 2 * WIDE.part)

    def run(name: str) -> dict:
        return mine(tmp_path / name, collection, WIDE, folders[0], "", folders[1])

    run("unbroken")
    whole = {kind: sorted(x[1] for x in asked) for kind, asked in counted.items()}
    forget(counted)
    writers: list[tuple[object, str]] = [(mining, "write_array"), (mining, "write_text")]
    for module, name in writers:  # killed after the first shard, then after a part
        write, calls = getattr(module, name), []

        def broken(path: Path, content, write=write, calls=calls) -> None:
            if calls:
                raise Stopped
            calls.append(path)
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(Stopped):
                run("broken")
    own = device_name("cpu")
    monkeypatch.setattr(mining, "device_name", lambda device: "another machine")
    manifest = run("broken")
    assert manifest["devices"] == [own, "another machine"]
    assert manifest["sha256"] == mined_sha256(tmp_path / "unbroken")
    for kind, least in (("encode", whole["encode"]), ("pairs", whole["pairs"])):
        asked = sorted(x[1] for x in counted[kind])
        assert set(map(str, asked)) == set(map(str, least))
        again = len(asked) - len(least)
        # Once more: the shard that was being made, the queries of the pass, a part's pairs.
        part = WIDE.part
        assert again == (20 + 2 * part if kind == "encode" else part * (1 + WIDE.negatives))
    forget(counted)
    assert run("broken") == manifest and counted == {"encode": [], "pairs": []}


def test_a_run_killed_at_its_end_is_finished_from_its_parts(
    collection: Collection, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(mining, "_finish", lambda *_: (_ for _ in ()).throw(Stopped()))
    with pytest.raises(Stopped):
        mine(tmp_path / "a", collection, WIDE, LEXICAL)
    with pytest.raises(ValueError, match="is not finished: run its"):
        mined_sha256(tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(mining, "_part", lambda *_: pytest.fail("nothing is left to mine"))
    assert mine(tmp_path / "a", collection, WIDE, LEXICAL)["mined"]["queries"] == TRAIN


def test_a_mixture_is_refused(collection: Collection, folders: list[str], tmp_path: Path) -> None:
    mine(tmp_path / "a", collection, WIDE, LEXICAL)
    with pytest.raises(ValueError, match=r"was mined otherwise \(margin: 0 there, 0.9 here\)"):
        mine(tmp_path / "a", collection, replace(WIDE, margin=0.9), LEXICAL)
    with pytest.raises(ValueError, match=r"\(retriever: bm25 there, [0-9a-f]{16} here; scores: "):
        mine(tmp_path / "a", collection, WIDE, folders[0])
    with pytest.raises(ValueError, match="data: .*'fingerprint': 'other'"):
        mine(tmp_path / "a", replace(collection, fingerprint="other"), WIDE, LEXICAL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and was not mined"):
        mine(tmp_path / "mine", collection, WIDE, LEXICAL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_data_that_cannot_be_mined(collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny has no train split"):
        mine(tmp_path / "a", replace(collection, qrels={"test": {"q": {}}}), WIDE, LEXICAL)
    bare = replace(collection, qrels={"train": {"q0": {"d0": 0}}})
    with pytest.raises(ValueError, match="tiny: no training query has a relevant document"):
        mine(tmp_path / "a", bare, WIDE, LEXICAL)


def test_the_command(tiny_data: Path, tmp_path: Path, capsys) -> None:
    line = ["mine", "--model", "bm25", "--data", str(tiny_data), "--out", str(tmp_path / "a"),
            "--depth", "30", "--ranks", "2", "20", "--margin", "0", "--negatives", "3",
            "--queries", "10"]  # fmt: skip
    assert program.main(line) == 0
    said = capsys.readouterr().out
    assert said.startswith("10 queries; ") and str(tmp_path / "a") in said
    assert len(rows(tmp_path / "a")) == 10
    assert program.main([*line, "--margin", "2"]) == 2
    assert "margin must lie between 0" in capsys.readouterr().err
    assert program.default_folder(load(str(tiny_data)), "runs/x/arm/seed0.model") == Path(
        "runs/mined/tiny-arm-seed0"
    )


# What training makes of it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mined(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mined") / "out"
    mine(folder, collection, WIDE, LEXICAL)
    return folder


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, mined: Path) -> Config:
    return resolved(tiny_config(tiny_base, tiny_data, negatives=str(mined)), "cpu")


def test_training_takes_them_in_the_file_s_order(
    config: Config, collection: Collection, mined: Path, monkeypatch
) -> None:
    monkeypatch.setattr("train.batches.bm25_negatives", lambda *_: pytest.fail("BM25 is asked"))
    _, data = build(replace(config, group_size=4), collection)
    for query in data.queries:
        assert data.negatives[query] == list(rows(mined)[query]["negatives"])[:3]
    assert data.embedding(0).teacher is None and data.reranking(0).teacher is None
    assert resolved(config, "cpu") == config and config.negatives_sha256 == mined_sha256(mined)


def changed(folder: Path, to: Path, change: Callable[[dict], object], sign: bool = True) -> Path:
    """A copy whose lines are changed, and signed as if it had been mined so."""
    to.mkdir()
    made = list(rows(folder).values())
    for row in made:
        change(row)
    text = "".join(json.dumps(row) + "\n" for row in made if row)
    (to / "negatives.jsonl").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    if sign:
        manifest["sha256"] = mining.hashlib.sha256(text.encode()).hexdigest()
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_a_changed_file_is_another_config_or_an_error(
    config: Config, collection: Collection, mined: Path, tmp_path: Path
) -> None:
    def reverse(row: dict) -> None:
        row["negatives"] = dict(reversed(row["negatives"].items()))

    unsigned = changed(mined, tmp_path / "a", reverse, sign=False)
    with pytest.raises(ValueError, match="was changed after it was mined"):
        resolved(replace(config, negatives=str(unsigned)), "cpu")
    other = replace(config, negatives=str(changed(mined, tmp_path / "b", reverse)))
    assert resolved(other, "cpu").negatives_sha256 != config.negatives_sha256
    with pytest.raises(ValueError, match="has changed: its lines have sha256"):
        build(other, collection)  # the trial began with the other one
    build(resolved(other, "cpu"), collection)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["negatives"].popitem() and row["negatives"].popitem()
         and row["negatives"].popitem() if row["query"] == "q7" else None,
         r"negatives.jsonl:\d+: query 'q7' has 1 negatives, training needs 2: mine with --fill"),
        (lambda row: row.update(positive="d9") if row["query"] == "q7" else None,
         "the positive of query 'q7' is 'd9', expected 'd7'"),
        (lambda row: row.update(negatives={"d7": 1, "d8": 1}) if row["query"] == "q7" else None,
         "'d7' is relevant to query 'q7'"),
        (lambda row: row.clear() if row["query"] == "q7" else None,
         r"has no line for query 'q7' \(1 of 24 are missing\)"),
    ],
)  # fmt: skip
def test_files_that_do_not_serve(
    config: Config, collection: Collection, mined: Path, tmp_path: Path, change, message: str
) -> None:
    folder = changed(mined, tmp_path / "a", change)
    with pytest.raises(ValueError, match=message):
        build(resolved(replace(config, negatives=str(folder)), "cpu"), collection)


def test_folders_that_do_not_serve(config: Config, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest.json is missing; expected bm25 or a folder of"):
        resolved(replace(config, negatives=str(tmp_path)), "cpu")
    with pytest.raises(ValueError, match="was mined from data with fingerprint"):
        build(config, replace(collection, fingerprint="other"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json cannot be read as JSON"):
        resolved(replace(config, negatives=str(tmp_path)), "cpu")
    with pytest.raises(ValueError, match="no teacher's scores, which distill needs"):
        build(replace(config, distill="kl"), collection)


# Distillation ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that likes the positive least, and the negatives in an order of its own."""

    def teach(row: dict) -> None:
        names = [row["positive"], *row["negatives"]]
        values = [-3.0, *random.Random(row["query"]).sample([0.0, 2.0, 4.0, 6.0], 4)]
        row["teacher"] = dict(zip(names, values, strict=True))

    return changed(mined, tmp_path_factory.mktemp("planted") / "out", teach)


def test_groups_and_scores_line_up(
    config: Config, collection: Collection, planted: Path, tiny_base: Path
) -> None:
    c = replace(config, negatives=str(planted), distill="kl", group_size=4, hard_negatives=2)
    model, data = build(resolved(c, "cpu"), collection)
    lines = rows(planted)
    place = {at: d for d, at in data.document_at.items()}
    batch = data.embedding(1)
    assert batch.teacher is not None and batch.teacher.shape == batch.group.shape == (6, 3)
    for query, group, scores in zip(batch.ids, batch.group, batch.teacher, strict=True):
        names = [place[batch.documents[i]] for i in group]
        assert names == [lines[query]["positive"], *list(lines[query]["negatives"])[:2]]
        assert scores.tolist() == [lines[query]["teacher"][d] for d in names]
    groups = data.reranking(1)
    assert groups.teacher is not None and groups.teacher.shape == (3, 4)
    for i, query in enumerate(groups.ids):
        names = [lines[query]["positive"], *list(lines[query]["negatives"])[:3]]
        pairs = [(collection.queries[query], collection.corpus[d]) for d in names]
        ids = [list(data.reranking_texts.ids[p]) for p in groups.pairs[4 * i : 4 * i + 4]]
        assert ids == model.tokenizer.pairs(pairs)
        assert groups.teacher[i].tolist() == [lines[query]["teacher"][d] for d in names]


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_the_weighted_term_is_added(
    config: Config, collection: Collection, planted: Path, task: str, kind: str
) -> None:
    """Against the formula of each group, in float64, texts one at a time; of whole vectors, even
    where narrower ones are trained too."""
    fields = {"negatives": str(planted), "distill": kind, "distill_weight": 0.5,
              "distill_temperature": 2.0, "hard_negatives": 2, "matryoshka": (4, 8),
              "dtype": "float64"}  # fmt: skip
    c = resolved(replace(config, **fields), "cpu")
    model, data = build(c, collection)
    plain = TrainingData(collection, model.tokenizer, replace(c, distill=""), tokens_only)
    found = task_loss(task, model, data, 0) - task_loss(task, model, plain, 0)
    terms = []
    rows = data.embedding(0) if task == "embedding" else data.reranking(0)
    assert rows.teacher is not None
    for i in range(len(rows.ids)):
        if task == "embedding":
            batch = data.embedding(0)
            at = [batch.queries[i], *(batch.documents[j] for j in batch.group[i])]
            q, *documents = (
                model.embed(data.embedding_texts.batch([a], model.device, model.dtype)[0])[0][0]
                for a in at
            )
            student = torch.stack([q @ d for d in documents]) / c.temperature
        else:
            at = data.reranking(0).pairs[3 * i : 3 * i + 3]
            student = torch.cat([
                model.score(data.reranking_texts.batch([a], model.device, model.dtype)[0])[0]
                for a in at
            ])  # fmt: skip
        teacher = rows.teacher[i].double()
        if kind == "kl":
            p, log_q = (teacher / 2).softmax(0), (student / 2).log_softmax(0)
            terms.append(4 * (p * (p.log() - log_q)).sum())
        else:
            terms += list(((student[0] - student[1:]) - (teacher[0] - teacher[1:])) ** 2)
    torch.testing.assert_close(found, 0.5 * torch.stack(terms).mean(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_planted_order_is_learnt(
    config: Config, collection: Collection, planted: Path, tmp_path: Path, kind: str
) -> None:
    """Of both tasks, though the labels say otherwise."""
    c = replace(
        config, negatives=str(planted), distill=kind, distill_weight=20.0, train_queries=3,
        distill_temperature=3.0,
        embedding_batch=3, reranking_batch=3, group_size=4, hard_negatives=3, steps=60,
        ranks=(16,), learning_rate=2e-2, head_learning_rate=2e-2, temperature=0.1,
    )  # fmt: skip
    model, data = build(resolved(c, "cpu"), collection)
    train(model, data, data.config, tmp_path / "a")
    with torch.no_grad():
        for query in data.queries:
            documents = [data.positive[query], *data.negatives[query][:3]]
            wanted = sorted(documents, key=lambda d: -data.teacher[query][d])
            texts = [collection.corpus[d] for d in documents]
            order = model.rank(collection.queries[query], texts)
            assert [documents[i] for i, _ in order] == wanted
            vectors = model.encode_document(texts)
            near = (model.encode_query([collection.queries[query]]) @ vectors.t())[0]
            assert [documents[int(i)] for i in near.argsort(descending=True)] == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill": "kd", "negatives": "f"}, "distill is kl, margin_mse or empty, got 'kd'"),
        ({"distill": "kl"}, "distill='kl' needs a teacher's scores: set negatives to a folder"),
        ({"distill": "kl", "negatives": "f", "hard_negatives": 0}, "hard_negatives is 0"),
        ({"distill_temperature": 0.0}, "distill_temperature must be > 0"),
    ],
)
def test_settings_of_distillation_that_cannot_work(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.parametrize("role", ["reranker", "teacher"])
@pytest.mark.parametrize("head", ["interaction", "pseudo_query"])
def test_what_scores_lists_scores_no_negatives(
    config: Config, collection: Collection, tmp_path: Path, role: str, head: str
) -> None:
    """Refused before anything is written."""
    UniMoER(model_config(replace(config, rerank_head=head))).save_pretrained(tmp_path / "lists")
    with pytest.raises(ValueError, match=f"lists has rerank_head='{head}', which scores lists"):
        mine(tmp_path / "mined", collection, Settings(), LEXICAL, **{role: str(tmp_path / "lists")})
    assert not (tmp_path / "mined").exists()


def test_the_teacher_of_pseudo_queries(
    config: Config, collection: Collection, planted: Path
) -> None:
    """Its scores are the order that RankNet learns; nothing else is added."""
    c = resolved(replace(config, negatives=str(planted), distill="kl", dtype="float64",
                         rerank_head="pseudo_query"), "cpu")  # fmt: skip
    model, data = build(c, collection)
    lines, made = rows(planted), data.pseudo(0)
    for query, grades in zip(made.ids, made.grades.tolist(), strict=True):
        names = [lines[query]["positive"], *list(lines[query]["negatives"])[: c.group_size - 1]]
        assert grades == pytest.approx([lines[query]["teacher"][d] for d in names])
    model.eval()
    count = len(made.ids)
    vectors = torch.cat([model.embed(pack([ids]))[0] for ids in made.texts])
    queries, asked, documents = vectors.split([count, count, len(vectors) - 2 * count])
    options = made.positive, made.relevant, c.temperature, c.false_negative_margin
    expected = info_nce(queries, documents, *options) + 2 * losses.ranknet(
        10 * torch.einsum("bw,bkw->bk", asked, documents[made.group]), made.grades
    )
    found = task_loss("reranking", model, data, 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_teacher_of_lists(config: Config, collection: Collection, planted: Path) -> None:
    """Lists come in a random order, the teacher's scores in the group's: list by list."""
    c = resolved(replace(config, negatives=str(planted), distill="margin_mse", dtype="float64",
                         rerank_head="interaction", similarity_weight=0.0), "cpu")  # fmt: skip
    model, data = build(c, collection)
    plain = TrainingData(collection, model.tokenizer, replace(c, distill=""), tokens_only)
    found = task_loss("reranking", model, data, 0) - task_loss("reranking", model, plain, 0)
    lines, made, terms = rows(planted), data.lists(0), []
    assert made.teacher is not None
    for i, query in enumerate(made.ids):
        names = [lines[query]["positive"], *list(lines[query]["negatives"])[: c.group_size - 1]]
        assert made.teacher[i].tolist() == [lines[query]["teacher"][d] for d in names]
        _, *documents, asked = torch.nn.functional.normalize(
            model.marked(pack([made.texts[i]]))[0], dim=-1
        )
        student = torch.stack([asked @ documents[at] for at in made.place[i]]) / c.list_temperature
        teacher = made.teacher[i].double()
        terms += list(((student[0] - student[1:]) - (teacher[0] - teacher[1:])) ** 2)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-9, atol=1e-10)
