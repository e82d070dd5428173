"""Retrieval tasks of mteb as collections; the hub's layout in a folder, and no network."""

from pathlib import Path
from typing import Any

import mteb
import pyarrow as pa
import pytest
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from pyarrow import parquet

from eval import collections as C
from eval import hub as H
from eval import mteb_data

TEXTS = {"d1": "red fish", "d2": "blue bird", "d3": ""}


def lay_out(place: Path, *, prefix: str = "", queries: dict[str, dict[str, str]] | None = None):
    """A repository as mteb's are: parquet by config and split, named in the README."""
    queries = queries or {"train": {"q1": "which swims?"}, "test": {"q2": "which flies?"}}
    judged = {split: (next(iter(rows)), f"d{1 + at}") for at, (split, rows) in
              enumerate(queries.items())}  # fmt: skip
    files: dict[tuple[str, str], dict] = {
        (f"{prefix}corpus", "corpus"): {
            "_id": list(TEXTS), "title": ["One", "", ""], "text": list(TEXTS.values())},
        **{(f"{prefix}queries", split): {"_id": list(rows), "text": list(rows.values())}
           for split, rows in queries.items()},
        **{(f"{prefix}qrels" if prefix else "default", split): {
            "query-id": [query], "corpus-id": [document], "score": [2]}
           for split, (query, document) in judged.items()},
    }  # fmt: skip
    listed: dict[str, list[str]] = {}
    place.mkdir(parents=True, exist_ok=True)
    for (config, split), columns in files.items():
        parquet.write_table(pa.table(columns), place / f"{config}-{split}.parquet")
        listed.setdefault(config, []).append(
            f"  - split: {split}\n    path: {config}-{split}.parquet\n"
        )
    configs = [f"- config_name: {c}\n  data_files:\n{''.join(of)}" for c, of in listed.items()]
    readme = place / "README.md"
    old = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
    readme.write_text(f"{old}{''.join(configs)}---\n")


@pytest.fixture
def task(tmp_path: Path, monkeypatch):
    """Makes mteb know a task whose repository is tmp_path/repo."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def known(langs: Any = ("deu-Latn",), kind: Any = "Retrieval", base=AbsTaskRetrieval,
              name="Mine", splits=("test",), **fields) -> None:  # fmt: skip
        made = type("Mine", (base,), {**fields, "metadata": TaskMetadata(
            name=name, description="made for a test", type=kind, category="t2t",
            eval_splits=list(splits), eval_langs=langs if isinstance(langs, dict) else list(langs),
            main_score="ndcg_at_10", dataset={"path": str(tmp_path / "repo"), "revision": "main"},
        )})  # fmt: skip
        monkeypatch.setattr(mteb, "get_task", lambda name: made())

    return known


def test_a_task_with_its_train_split(tmp_path, task):
    lay_out(tmp_path / "repo")
    task()
    data = C.load("mteb/Mine", tmp_path / "cache")
    assert data.name == "mteb-mine" and data.language == "de"
    assert data.corpus == {"d1": "One\nred fish", "d2": "blue bird", "d3": ""}
    assert data.queries == {"q1": "which swims?", "q2": "which flies?"}
    assert data.qrels["test"] == {"q2": {"d2": 2}}
    assert {**data.qrels["train"], **data.qrels["dev"]} == {"q1": {"d1": 2}}
    assert data.provenance[str(tmp_path / "repo")] == "main"
    # From then on it is read from the cache alone.
    for path in (tmp_path / "repo").iterdir():
        path.unlink()
    assert C.load("mteb/Mine", tmp_path / "cache").fingerprint == data.fingerprint


def test_a_subset_of_a_task(tmp_path, task):
    lay_out(tmp_path / "repo", prefix="sw-")
    task({"sw": ["swa-Latn"], "xx": ["kin-Latn"]})
    data = C.load("mteb/Mine:sw", tmp_path / "cache")
    assert (data.name, data.language, len(data.corpus)) == ("mteb-mine-sw", "sw", 3)
    with pytest.raises(ValueError, match="expected mteb/Mine:<one of sw, xx>"):
        C.load("mteb/Mine", tmp_path / "cache")
    lay_out(tmp_path / "repo", prefix="xx-")
    assert C.load("mteb/Mine:xx", tmp_path / "cache").language == "kin"


@pytest.mark.parametrize(
    ("splits", "own"),
    [(["train", "test"], "test"), (["validation"], "dev"), (["dev2", "dev"], "dev2")],
)
def test_measured_is_the_split_that_mteb_measures(task, splits, own):
    task(splits=splits)
    assert H.own_split("mteb/Mine") == own


def test_what_mteb_knows_of_a_task(tmp_path, task):
    """TREC DL's grades, Chinese under another code, queries that are documents themselves."""
    lay_out(tmp_path / "repo")
    task(["cmn-Hans"], name="TRECDL2020", ignore_identical_ids=True)
    data = C.load("mteb/TRECDL2020", tmp_path / "cache")
    assert data.relevant_from == {"test": 2} and data.language == "zh"
    found = mteb_data.find("mteb/TRECDL2020", tmp_path / "cache" / "mteb")
    assert found.own_document
    task(skip_first_result=True)
    with pytest.raises(ValueError, match="not laid out as mteb's retrieval"):
        C.load("mteb/Mine", tmp_path / "cache")


def test_what_cannot_be_had_leaves_nothing(tmp_path, task):
    task()
    with pytest.raises(ValueError, match="neither in the cache nor to be had from the hub"):
        C.load("mteb/Mine", tmp_path / "cache")
    rows = {"train": {"q": "which swims?"}, "test": {"q": "which flies?"}}
    lay_out(tmp_path / "repo", queries=rows)
    with pytest.raises(ValueError, match="id 'q' of its queries is another text in"):
        C.load("mteb/Mine", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "mteb").iterdir() if path.is_dir()]


def test_what_is_no_such_task(tmp_path, task, monkeypatch):
    class Own(AbsTaskRetrieval):
        def load_data(self, *_, **__):
            raise AssertionError

    for kind, base in (("Reranking", AbsTaskRetrieval), ("Retrieval", Own)):
        task(kind=kind, base=base)
        with pytest.raises(ValueError, match=f"task of type {kind} that is not laid out"):
            C.load("mteb/Mine", tmp_path)
    task()
    with pytest.raises(ValueError, match="Mine has no subsets, expected mteb/Mine"):
        C.load("mteb/Mine:sw", tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'NoSuchTask' not found"):
        C.load("mteb/NoSuchTask", tmp_path)


def test_without_mteb(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    with pytest.raises(ValueError, match="`make setup` installs"):
        mteb_data.find("mteb/Mine", tmp_path)
