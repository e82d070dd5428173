"""Properties of pairs by hand, and of what a model reads of a document."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis import properties
from eval.collections import Collection, load
from eval.protocol import EvaluationSet, without_states
from model.unimoer import UniMoER
from tests.train.tiny import tiny_config, write_collection
from train.trial import model_config


def test_properties_of_a_pair() -> None:
    seen = {"open": 1, "file": 2, "the": 1, "read": 1}  # of three documents
    pairs = [("Open the file", "open a file, then the file."), ("read", "nothing")]
    found = {k: v.tolist() for k, v in properties.of_text(pairs, [2.5, 0.0], seen, 3).items()}
    assert found["covered_terms"] == [3, 0] and found["covered_share"] == [1, 0]
    assert found["tf_sum"] == [4, 0]  # open once, the once, file twice
    idf = math.log(3 / 1) + math.log(3 / 1) + math.log(3 / 2)
    assert found["idf_sum"] == pytest.approx([idf, 0])
    assert found["bm25"] == [2.5, 0]
    assert found["bigrams"] == [0.5, 0]  # "the file", not "open the"
    assert found["exact"] == [1, 0]
    assert found["length"] == pytest.approx([math.log(6), 0])


def test_parts_of_speech() -> None:
    assert properties.parts_of_speech("Return the sorted list of open files.") == (
        pytest.approx(3 / 7), pytest.approx(1 / 7))  # fmt: skip
    assert properties.parts_of_speech("...") == (0.0, 0.0)


def test_what_is_cut_off_a_document_is_none_of_a_pair_s(tiny_base: Path, tmp_path: Path) -> None:
    """Its words once more behind the cut change BM25's score alone."""
    config = tiny_config(tiny_base, write_collection(tmp_path / "Tiny"))
    collection = load(config.data)
    longer = replace(collection, corpus={k: f"{d} {d}" for k, d in collection.corpus.items()})

    def found(of: Collection, limit: int) -> tuple[dict[str, list[float]], int]:
        model = UniMoER(model_config(replace(config, document_tokens=limit)))
        evaluation = EvaluationSet(of, model.tokenizer, config, without_states)
        own = {q: evaluation.bm25[q] for q in evaluation.candidates}
        keys = [(q, f"d{q[1:]}") for q in own if f"d{q[1:]}" in own[q]]
        evaluation.candidates = own
        assert len(keys) >= 9
        values, cut = properties.of_pairs(model, evaluation, keys)
        return {name: column.tolist() for name, column in values.items()}, cut

    short, long, whole = found(collection, 8), found(longer, 8), found(collection, 100)
    assert short[1] == long[1] == len(short[0]["bm25"]) and whole[1] == 0
    changed = {name for name in short[0] if short[0][name] != long[0][name]}
    assert changed == {"bm25"}
    seen = {name for name in short[0] if short[0][name] != whole[0][name]}
    assert seen >= {"covered_terms", "tf_sum", "idf_sum", "length"} and "bm25" not in seen


class Streamed(Mapping[str, str]):
    """A corpus whose texts are asked for one by one, each at most once; none may be held."""

    def __init__(self, texts: dict[str, str]):
        self.texts, self.asked = texts, Counter[str]()
        self.held: list[weakref.ref] = []

    def __getitem__(self, key: str) -> str:
        assert sum(text() is not None for text in self.held) <= 1
        self.asked[key] += 1
        text = Text(self.texts[key])
        self.held.append(weakref.ref(text))
        return text

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("all at once")


class Text(str):
    """Of which it is seen when it is let go."""


def test_the_corpus_is_counted_in_one_pass(tiny_base: Path, tmp_path: Path) -> None:
    """Of the words that are asked for; a second trial of the process asks for no text again."""
    config = tiny_config(tiny_base, write_collection(tmp_path / "Tiny"))
    corpus = Streamed({"a": "Open a file, a file.", "b": "a file", "other": "open"})
    whole = load(config.data)
    collection = replace(whole, corpus=corpus, pools={"dev": ["a", "b"], "test": ["other"]})
    of = SimpleNamespace(collection=collection, config=replace(config, split="dev"))
    for _ in range(2):
        found = properties.frequencies(of, frozenset({"open", "file", "rare"}))  # type: ignore
        assert found == {"open": 1, "file": 2}
    assert corpus.asked == {"a": 1, "b": 1}
    of.config = replace(config, split="test")
    assert properties.frequencies(of, frozenset({"open"})) == {"open": 1}  # type: ignore
