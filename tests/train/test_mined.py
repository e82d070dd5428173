"""train/negatives.py: training takes mined negatives as they are, or says why it cannot."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval.collections import Collection
from tests.train.mined import changed, rows
from tests.train.tiny import build, tiny_config
from train.negatives import mined_sha256
from train.trial import resolved
from trials import Config


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
