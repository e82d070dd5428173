"""Every command of evaluation, from end to end, on a few dozen real texts and a tiny model.

The texts are functions of Python's own `email` package, asked for by their docstrings; other files
here go into the numbers, on texts that were made for it.
"""

import json
from pathlib import Path

import pytest

import run
from eval import __main__ as program
from eval.collections import load
from model.unimoer import UniMoER
from tests.eval import published
from tests.train.tiny import tiny_config
from train import __main__ as training
from train.trial import model_config

METRIC = "ndcg_cut_10"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.of_functions(tmp_path_factory.mktemp("real") / "email")


@pytest.fixture(scope="module")
def folder(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved") / "arm" / "seed0.model"
    UniMoER(model_config(tiny_config(tiny_base, data))).save_pretrained(place)
    return place


@pytest.fixture
def line(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))
    return ["--model", str(folder), "--data", str(data), "--out", str(tmp_path), "--device", "cpu"]


def read(place: Path) -> dict:
    return json.loads(place.read_text())


def mean(rows: dict) -> float:
    return sum(row[METRIC] for row in rows.values()) / len(rows)


def test_collection_by_our_protocol_and_by_shards(line: list[str], tmp_path: Path) -> None:
    """Retrieval is the same in memory, from shards on disk, and through FAISS's flat index."""
    assert program.main(["beir", *line, "--candidates", "8", "--dimensions", "16"]) == 0
    found = read(tmp_path / "beir" / "arm-seed0" / "email-test.json")
    assert mean(found["bm25"]["embedding"]) > 0.6  # real texts, which words can find
    assert len(found["scores"]["reranking"]) == 10 and "16" in found["dimensions"]
    assert program.main(["encode", *line, "--window", "10", "--dtype", "float32"]) == 0
    for index in ("exact", "flat", "ivf"):
        given = [*line, "--index", index, "--lists", "2", "--probes", "2"]
        assert program.main(["search", *given, "--depth", "36"]) == 0
        name = "email-test" + ("" if index == "exact" else f"-{index}")
        rows = read(tmp_path / "search" / "arm-seed0" / f"{name}.json")["scores"][index]
        assert mean(rows) == pytest.approx(mean(found["scores"]["embedding"]))


@pytest.mark.filterwarnings("ignore")  # mteb's own
def test_mteb(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert program.main(["mteb", *line, "--candidates", "8"]) == 0
    assert program.main(["beir", *line, "--candidates", "8"]) == 0
    found = read(tmp_path / "beir" / "arm-seed0" / "email-test.json")["scores"]
    out = capsys.readouterr().out
    # mteb stores five digits, of which four are printed
    assert f"email: {round(mean(found['embedding']), 5):.4f} (ndcg_at_10)" in out
    assert f"email-reranking: {round(mean(found['reranking']), 5):.4f} (ndcg_at_10)" in out


def test_baselines(line: list[str], folder: Path, tmp_path: Path, capsys) -> None:
    given = line[line.index("--data") :]
    rows = ["--candidates", "8", "--models", str(folder), "--rows", "bm25"]
    assert program.main(["baselines", *given, *rows]) == 0
    out = capsys.readouterr().out
    assert "| bm25 |" in out.lower() and "arm-seed0" in out


def test_retrieve_rerank_generate(line: list[str], tmp_path: Path, capsys, in_process) -> None:
    sides = ("one", "two")
    assert program.main(["rag", *line, "--queries", "3", "--depth", "4", "--sides", *sides]) == 0
    assert "the sides give the same answers: yes" in capsys.readouterr().out
    for side in sides:
        found = read(tmp_path / "rag" / "arm-seed0" / f"email-test-{side}.json")["questions"]
        assert len(found) == 3 and all(len(row["read"]) == 3 for row in found.values())


@pytest.mark.parametrize("first", ["bm25", "model"])
def test_mining_and_training_on_it(
    first: str, line: list[str], folder: Path, data: Path, tiny_base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Negatives of the training queries; then two steps of the kill gate on them, measured on
    another collection as well."""
    out = tmp_path / "mined"
    model = str(folder) if first == "model" else first
    words = ["mine", "--model", model, "--data", str(data), "--out", str(out), "--depth", "20",
             "--ranks", "1", "20", "--margin", "0", "--fill", "--device", "cpu"]  # fmt: skip
    assert training.main(words) == 0
    mined = [json.loads(row) for row in (out / "negatives.jsonl").read_text().splitlines()]
    texts = load(str(data))
    assert len(mined) == 20 and all(len(row["negatives"]) == 7 for row in mined)
    assert all(row["positive"] not in row["negatives"] for row in mined)
    if first == "model":
        return
    small = ["steps=2", "dtype=float32", "measured=6", f"negatives={out}", "embedding_batch=4",
             "reranking_batch=2", "document_tokens=24"]  # fmt: skip
    go = ["run", "kill_gate", "--scale", "smoke", "--base", str(tiny_base), "--data", str(data),
          "--runs", str(tmp_path / "runs"), "--seeds", "2", "--device", "cpu",
          "--evaluate", str(published_elsewhere(tmp_path)),
          *(word for field in small for word in ("--set", field))]  # fmt: skip
    assert run.main(go) == 0
    (verdict,) = (tmp_path / "runs").rglob("*-email/verdict.json")
    assert read(verdict)["documents"] == len(texts.corpus) == 36
    assert "mean of 1" in next((tmp_path / "runs").rglob("across.md")).read_text()


def test_pointwise_against_listwise(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """All three modes, with one LoRA and with experts, trained for two steps."""
    small = ["steps=2", "dtype=float32", "measured=6", "embedding_batch=4", "reranking_batch=2",
             "document_tokens=24"]  # fmt: skip
    go = ["run", "pointwise_vs_listwise", "--scale", "smoke", "--base", str(tiny_base), "--data",
          str(data), "--runs", str(tmp_path), "--seeds", "1", "--device", "cpu",
          *(word for field in small for word in ("--set", field))]  # fmt: skip
    assert run.main(go) == 0
    trials = [read(path) for path in tmp_path.glob("pointwise_vs_listwise/*/*/seed0.json")]
    assert len(trials) == 6
    assert all(0 <= mean(rows) <= 1 for t in trials for rows in t["scores"].values())
    orders = [read(path) for path in tmp_path.glob("pointwise_vs_listwise/*/*/order-seed0.json")]
    assert len(orders) == 6 and all(order["speed"]["pairs_per_second"] > 0 for order in orders)


def published_elsewhere(place: Path) -> Path:
    """Another ten functions, to be measured on alone."""
    folder, pairs = place / "other", published.functions()[36:46]
    (folder / "qrels").mkdir(parents=True)
    rows = [published.HEADER, *(f"q{i}\td{i}\t1" for i in range(10))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n")
    for name, key, text in (("corpus", "d", "document"), ("queries", "q", "query")):
        content = [{"_id": f"{key}{i}", "text": getattr(p, text)} for i, p in enumerate(pairs)]
        (folder / f"{name}.jsonl").write_bytes(published.jsonl(content))
    return folder
