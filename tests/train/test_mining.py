"""train/mining.py: what may be a negative, by the rule, by BM25, by models; what is refused."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.bm25 import BM25
from eval.collections import Collection, load
from model.unimoer import UniMoER
from tests.train.mined import WIDE, rows
from tests.train.tiny import TRAIN, write_collection
from train import __main__ as program
from train import first_stage, mining
from train.mining import LEXICAL, Settings, choose, limit, mine
from train.negatives import best_positive
from train.trial import model_config
from trials import Config


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
    mine(tmp_path / "out", collection, replace(WIDE, fill=False, pick="top"), LEXICAL)
    found = [d for d in rows(tmp_path / "out")["q3"]["negatives"] if d.startswith("same")]
    assert len(found) == 1


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
    monkeypatch.setattr(first_stage, "SHARD", 9)  # 42 documents
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


# Refused -----------------------------------------------------------------------------------------


def test_data_that_cannot_be_mined(collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny has no train split"):
        mine(tmp_path / "a", replace(collection, qrels={"test": {"q": {}}}), WIDE, LEXICAL)
    bare = replace(collection, qrels={"train": {"q0": {"d0": 0}}})
    with pytest.raises(ValueError, match="tiny: no training query has a relevant document"):
        mine(tmp_path / "a", bare, WIDE, LEXICAL)


@pytest.mark.parametrize("role", ["reranker", "teacher"])
@pytest.mark.parametrize("head", ["interaction", "pseudo_query"])
def test_what_scores_lists_scores_no_negatives(
    tiny: Config, collection: Collection, tmp_path: Path, role: str, head: str
) -> None:
    """Refused before anything is written."""
    UniMoER(model_config(replace(tiny, rerank_head=head))).save_pretrained(tmp_path / "lists")
    with pytest.raises(ValueError, match=f"lists has rerank_head='{head}', which scores lists"):
        mine(tmp_path / "mined", collection, Settings(), LEXICAL, **{role: str(tmp_path / "lists")})
    assert not (tmp_path / "mined").exists()


# The command -------------------------------------------------------------------------------------


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
