"""eval/bm25.py: the formula, ties, odd inputs, and the scale on two public collections."""

import math
from collections.abc import Sequence

import bm25s
import numpy as np
import pytest

from eval import collections, metrics
from eval.bm25 import BM25
from eval.command import exit_status
from tests.eval.shared import real


def test_scores_follow_the_formula():
    texts = ["cats cats dogs", "dogs", "birds sing songs here", ""]
    k1, b = 0.9, 0.4
    found = BM25(["a", "b", "c", "d"], texts, k1=k1, b=b).search({"q": "a cat and the DOG"}, 10)
    mean_length = (3 + 1 + 4 + 0) / 4

    def weight(tf: int, df: int, length: int) -> float:
        idf = math.log(1 + (4 - df + 0.5) / (df + 0.5))
        return idf * tf / (tf + k1 * (1 - b + b * length / mean_length))

    expected = {"a": weight(2, 1, 3) + weight(1, 2, 3), "b": weight(1, 2, 1)}
    assert found["q"] == pytest.approx(expected, rel=1e-5)
    assert list(found["q"]) == ["a", "b"]  # best first


def test_scores_by_hand():
    """mean length 2.5; a: k1 (.6 + .4 * 3 / 2.5) = .972, b: k1 (.6 + .4 * 2 / 2.5) = .828;
    idf ln(1 + .5 / 2.5) of red, ln(1 + 1.5 / 1.5) of fish."""
    found = BM25(["a", "b"], ["red red fish", "red bird"]).search({"q": "red fish"}, 2)["q"]
    a = 0.182322 * 2 / 2.972 + 0.693147 * 1 / 1.972
    assert found == pytest.approx({"a": a, "b": 0.182322 / 1.828}, abs=1e-6)
    assert found == pytest.approx({"a": 0.474188, "b": 0.099738}, abs=2e-6)


def test_a_term_twice_in_the_query_counts_twice():
    index = BM25(["a", "b"], ["red fish", "blue bird"])
    once, twice = index.search({"once": "red", "twice": "red red"}, 2).values()
    assert twice["a"] == pytest.approx(2 * once["a"], rel=1e-6)


def test_identifiers_are_split_at_underscores_and_stemmed():
    index = BM25(["a", "b"], ["def read_files(self): pass", "def write(self): pass"])
    assert list(index.search({"q": "reads a file"}, 2)["q"]) == ["a"]


@pytest.mark.parametrize("order", [1, -1])
def test_ties_go_to_the_larger_id_also_at_the_cut(order):
    ids = [f"d{i}" for i in range(9)][::order]
    index = BM25(ids, ["same words"] * 8 + ["same words, and others that make it longer"])
    last = ids[8]
    equal = sorted((i for i in ids if i != last), reverse=True)
    for k in (1, 4, 8):
        assert list(index.search({"q": "same"}, k)["q"]) == equal[:k]
    assert list(index.search({"q": "same"}, 9)["q"]) == [*equal, last]


def test_the_cut_agrees_with_sorting_everything():
    rng = np.random.default_rng(0)
    words = [f"w{i:02d}" for i in range(12)]
    ids = [f"d{i:03d}" for i in rng.permutation(200)]
    index = BM25(ids, [" ".join(rng.choice(words, rng.integers(1, 5))) for _ in ids])
    everything = index.search({"q": "w00 w01 w02"}, 1000)["q"]
    expected = sorted(everything, key=lambda d: (everything[d], d), reverse=True)
    assert len(set(everything.values())) < len(everything)  # there are ties
    assert list(everything) == expected
    for k in (1, 7, 50):
        assert list(index.search({"q": "w00 w01 w02"}, k)["q"]) == expected[:k]


def test_a_query_without_a_known_term_finds_nothing_and_is_present():
    index = BM25(["a", "b"], ["red fish", "blue bird"])
    queries = {"unknown": "zebra", "empty": "", "letters": "a b", "known": "bird zebra"}
    assert index.search(queries, 2) == {
        "unknown": {},
        "empty": {},
        "letters": {},
        "known": {"b": pytest.approx(math.log(2) / (1 + 0.9), rel=1e-5)},
    }
    assert index.search({}, 2) == {}


def test_a_corpus_of_empty_documents_finds_nothing():
    assert BM25(["a", "b"], ["", "."]).search({"q": "red"}, 2) == {"q": {}}


def test_k_may_exceed_the_corpus_and_scores_are_float32():
    row = BM25(["a", "b", "c"], ["red fish", "red bird now", "sky"]).search({"q": "red"}, 99)["q"]
    assert set(row) == {"a", "b"}
    assert all(score == float(np.float32(score)) > 0 for score in row.values())


def test_scores_of_given_documents_are_those_of_the_search():
    index = BM25(["a", "b", "c", "d"], ["red fish", "red red bird", "sky", ""])
    row = index.search({"q": "red bird"}, 9)["q"]
    names = ["c", "b", "a", "d"]
    assert index.score("red bird", names) == [row.get(name, 0.0) for name in names]
    assert index.score("zebra", ["a"]) == index.score("", ["a"]) == [0.0]
    assert index.score("red", []) == []
    assert BM25(["a"], [""]).score("red", ["a"]) == [0.0]
    with pytest.raises(ValueError, match="document 'z' is not among the 4 indexed"):
        index.score("red", ["a", "z"])


def test_terms_are_read_in_windows_with_the_same_result(monkeypatch):
    """Words of a window get the numbers that earlier windows gave them; scores to the last bit."""
    rng = np.random.default_rng(1)
    words = [f"w{i:02d}" for i in range(12)]
    ids = [f"d{i:03d}" for i in rng.permutation(50)]
    texts = [" ".join(rng.choice(words, rng.integers(0, 5))) for _ in ids]  # some are empty
    queries = {"q": "w00 w01 w02", "p": "w11 w11 w03"}
    whole = BM25(ids, texts).search(queries, 50)
    for size in (1, 7, 50):
        monkeypatch.setattr("eval.bm25.WINDOW", size)
        assert BM25(ids, texts).search(queries, 50) == whole
    reference = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    reference.index([text.split() for text in texts], show_progress=False)
    scores = reference.get_scores(["w00", "w01", "w02"])
    known = {d: float(s) for d, s in zip(ids, scores, strict=True) if s > 0}
    assert whole["q"] == known


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["x", "y"]), {}, "1 ids but 2 texts"),
        (([], []), {}, "no document"),
        ((["b", "a", "b"], ["x", "y", "z"]), {}, "'b' occurs twice"),
        ((["a"], ["x"]), {"k1": -1.0}, "k1=-1.0"),
        ((["a"], ["x"]), {"b": 1.5}, "b=1.5"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        BM25(*arguments, **options)


def test_k_below_one():
    with pytest.raises(ValueError, match="k=0"):
        BM25(["a"], ["red"]).search({"q": "red"}, 0)


def test_nothing_is_printed(capfd):
    BM25(["a", "b"], ["red fish", "blue bird"]).search({"q": "red"}, 2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "published"), [("scifact", 0.687), ("nfcorpus", 0.321)])
def test_public_collections_score_as_published(name, published):
    """bm25s in mteb's results; Anserini's flat index has .679 and .322."""
    data = collections.load(str(real(name)))
    qrels = data.qrels["test"]
    index = BM25(data.pools["test"], [data.corpus[i] for i in data.pools["test"]])
    run = index.search({query: data.queries[query] for query in qrels}, 100)
    found = metrics.mean(metrics.evaluate(qrels, run), "ndcg_cut_10")
    assert found == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(
    ("language", "texts", "query"),
    [
        # one word in another form, which that language's stemmer makes the same
        ("es", ["las casas blancas", "los perros"], "casa blanca"),
        ("ru", ["книги на столе", "дома в лесу"], "книга"),
        ("ar", ["الكتاب على الطاولة", "السيارة سريعة"], "كتاب"),
        # vowel signs are no letters to Python, and belong to the word
        ("hi", ["हिन्दी भाषा", "अंग्रेज़ी बोली"], "भाषा"),
        ("bn", ["বাংলা ভাষা", "ইংরেজি বই"], "ভাষা"),
        ("te", ["తెలుగు భాష", "ఆంగ్ల పుస్తకం"], "భాష"),
        ("yo", ["ọmọ ẹ̀kọ́", "ilé wa"], "ẹ̀kọ́"),
        # no spaces
        ("zh", ["人人生而自由", "科学与技术"], "自由"),
        ("ja", ["すべての人間は自由である", "身体の安全"], "自由とは"),
        ("th", ["มนุษย์ทั้งหลายเกิดมามีอิสระ", "ความปลอดภัย"], "อิสระ"),
        ("sw", ["watu wote wamezaliwa huru", "kila mtu"], "huru"),
    ],
)
def test_other_languages_have_their_own_words(language, texts, query):
    index = BM25(["a", "b"], texts, language=language)
    assert list(index.search({"q": query}, 2)["q"]) == ["a"]


def test_pairs_of_letters_overlap_and_marks_hold_on_to_their_words():
    index = BM25(["a"], ["自由権"], language="zh")
    assert index._tokenize(["自由権、x 人"]) == [["自由", "由権"]]
    hindi = BM25(["a"], ["क"], language="bn")._tokenize(["प्राप्त है। ok"])
    assert hindi == [["प्राप्त", "है", "ok"]]
    assert BM25(["a"], ["x"])._tokenize(["naïve caf\u0065\u0301s"]) == [["naïv", "cafe"]]


class Once(Sequence):
    """Texts that may be read, each once."""

    def __init__(self, texts: list[str], may: bool = True):
        self.texts, self.may = texts, may

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, at):
        assert self.may, "the index was kept"
        return self.texts[at]


def test_an_index_that_is_kept_is_not_made_again(tmp_path):
    ids, texts = ["a", "b", "c"], ["red fish", "red bird now", "sky"]
    expected = BM25(ids, texts).search({"q": "red now"}, 3)
    made = BM25(ids, texts, folder=tmp_path, content="x")
    again = BM25(ids, Once(texts, False), folder=tmp_path, content="x")
    assert made.search({"q": "red now"}, 3) == again.search({"q": "red now"}, 3) == expected
    assert again.score("red", ["b", "c"]) == made.score("red", ["b", "c"])
    assert again._index and isinstance(again._index.scores["data"], np.memmap)
    for change in ({"content": "y"}, {"language": "de"}, {"k1": 1.0}, {"b": 0.5}):
        with pytest.raises(AssertionError, match="the index was kept"):
            BM25(ids, Once(texts, False), folder=tmp_path, **{"content": "x", **change})
    with pytest.raises(AssertionError, match="the index was kept"):
        BM25(["a", "b", "z"], Once(texts, False), folder=tmp_path, content="x")
    assert BM25(["a"], ["."], folder=tmp_path, content="x").search({"q": "red"}, 1) == {"q": {}}


@pytest.mark.parametrize("name", ["data.csc.index.npy", "vocab.index.json", "params.index.json"])
@pytest.mark.parametrize("kept", [0, 20])
def test_a_damaged_index_is_made_again(tmp_path, name, kept, capsys):
    ids, texts = ["a", "b"], ["red fish", "red bird now"]
    expected = BM25(ids, texts, folder=tmp_path).search({"q": "bird"}, 2)
    [place] = [path for path in tmp_path.iterdir() if path.is_dir()]
    (place / name).write_bytes((place / name).read_bytes()[:kept])
    assert BM25(ids, texts, folder=tmp_path).search({"q": "bird"}, 2) == expected
    assert "is damaged" in capsys.readouterr().err
    assert BM25(ids, Once(texts, False), folder=tmp_path).search({"q": "bird"}, 2) == expected


def test_an_index_that_cannot_be_mapped_is_used_as_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.bm25._read", lambda folder: None)
    found = BM25(["a"], ["red"], folder=tmp_path).search({"q": "red"}, 1)
    assert found == BM25(["a"], ["red"]).search({"q": "red"}, 1) != {"q": {}}


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device"), OSError("128 requested and 0 written")]
)
def test_an_index_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch, capsys, problem):
    """The second is numpy's, which does not say that the disk is full."""

    def full(self, place, **_):
        place.mkdir()
        raise problem

    monkeypatch.setattr(bm25s.BM25, "save", full)
    assert exit_status(lambda: BM25(["a"], ["red"], folder=tmp_path)) == 2
    assert f"error: {tmp_path}" in (said := capsys.readouterr().err) and "Make room" in said
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_bm25_s_index_of_many_documents_is_kept_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path))
    texts = {"a": "red fish", "b": "blue bird"}

    def made(fingerprint: str, **corpus: str) -> collections.Collection:
        return collections.Collection(
            "x", corpus, {"q": "red"}, {"test": {"q": {"a": 1}}}, {}, {"test": list(corpus)},
            fingerprint, {},
        )  # fmt: skip

    assert list(made("1", **texts).bm25("test").search({"q": "red"}, 2)["q"]) == ["a"]
    assert not (tmp_path / "bm25").exists()
    monkeypatch.setattr(collections, "KEPT_FROM", 1)
    # The texts decide, not the fingerprint, which is of the judgments too.
    for fingerprint, red in (("1", "a"), ("2", "a"), ("1", "b")):
        of = {red: "red", "ab".replace(red, ""): "blue"}
        of = dict(sorted(of.items()))
        assert list(made(fingerprint, **of).bm25("test").search({"q": "red"}, 2)["q"]) == [red]
    assert len([path for path in (tmp_path / "bm25").iterdir() if path.is_dir()]) == 2
