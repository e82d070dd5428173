"""train/negatives.py: hard, fixed, and never a relevant document under another name."""

import pytest

from eval.bm25 import BM25
from train.negatives import bm25_negatives

CORPUS = {
    "right": "the red fish swims",
    "twin": "the red fish swims",  # not judged, but the same text
    "also": "red fish and more red fish",  # judged as well
    "judged0": "a red fish, judged not relevant",
    "near1": "red fish soup",
    "near2": "fish market in red",
    "near3": "fish tank",
    "far1": "blue sky",
    "far2": "green grass",
    "far3": "",
}
POOL = list(CORPUS)
QUERIES = {"q": "red fish", "p": "sky"}
RELEVANT = {"q": {"right": 1, "also": 2, "judged0": 0}, "p": {"far1": 1}}


def draw(
    queries: dict[str, str],
    relevant: dict[str, dict[str, int]],
    corpus: dict[str, str],
    pool: list[str],
    depth: int,
    count: int,
    language: str = "en",
) -> dict[str, list[str]]:
    index = BM25(pool, [corpus[d] for d in pool], language=language)
    return bm25_negatives(index, queries, relevant, corpus, pool, depth, count)


def negatives(count: int, depth: int = 50, pool: list[str] = POOL) -> dict[str, list[str]]:
    return draw(QUERIES, RELEVANT, CORPUS, pool, depth, count)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_never_relevant_nor_of_equal_text_nor_twice(count):
    found = negatives(count)
    assert set(found) == {"q", "p"}
    assert not set(found["q"]) & {"right", "twin", "also"}
    assert "far1" not in found["p"]
    assert all(len(row) == len(set(row)) == count for row in found.values())


def test_what_is_hard_comes_first():
    # four documents beside the relevant ones share a word with the query
    assert set(negatives(4)["q"]) == {"judged0", "near1", "near2", "near3"}
    six = negatives(6)["q"]
    assert set(six[:4]) == {"judged0", "near1", "near2", "near3"}
    assert set(six[4:]) < {"far1", "far2", "far3"}  # filled up from the pool


def test_depth_counts_what_is_not_relevant():
    ranked = BM25(POOL, list(CORPUS.values())).search({"q": "red fish"}, 10)["q"]
    hardest = [d for d in ranked if d not in ("right", "twin", "also")]
    assert set(negatives(2, depth=2)["q"]) == set(hardest[:2])


def test_the_same_every_time_and_whatever_else_is_asked():
    found = negatives(3)
    assert negatives(3) == found
    alone = draw({"q": "red fish"}, RELEVANT, CORPUS, POOL, 50, 3)
    assert alone["q"] == found["q"]


def test_copies_of_the_relevant_do_not_use_up_the_depth():
    """The search goes on until `depth` documents are left, however many copies there are."""
    corpus = {f"copy{i:02d}": "red fish" for i in range(30)}
    corpus |= {"near": "red fish and a good many other words", "far": "blue"}
    found = draw({"q": "red fish"}, {"q": {"copy00": 1}}, corpus, list(corpus), 1, 1)
    assert found == {"q": ["near"]}


def test_they_are_drawn_not_the_top_few():
    corpus = {f"d{i:02d}": f"red {i}" for i in range(40)}
    queries = {f"q{i}": "red" for i in range(20)}
    relevant = {q: {"d00": 1} for q in queries}
    found = draw(queries, relevant, corpus, list(corpus), 30, 2)
    assert len({d for row in found.values() for d in row}) > 10


def test_words_are_cut_as_the_language_has_it():
    """Japanese puts no spaces between words: as English, each text would be one word."""
    corpus = {"other": "犬が好き", "near": "東京の天気予報", "right": "東京は晴れ", "far": "猫"}
    asked, relevant = {"q": "東京の晴れ"}, {"q": {"right": 1}}
    found = draw(asked, relevant, corpus, list(corpus), 10, 1, "ja")
    assert found == {"q": ["near"]}
    blind = {draw({q: asked["q"]}, {q: relevant["q"]}, corpus, list(corpus), 10, 1)[q][0]
             for q in map(str, range(20))}  # fmt: skip
    assert len(blind) > 1  # nothing is found, so it is drawn from the pool


def test_a_document_outside_the_pool_is_never_drawn():
    pool = [d for d in POOL if d != "near1"]
    assert all("near1" not in row for row in negatives(6, pool=pool).values())


def test_a_pool_that_is_too_small():
    with pytest.raises(ValueError, match=r"'q': fewer than 8 negatives in a pool of 10"):
        negatives(8)
