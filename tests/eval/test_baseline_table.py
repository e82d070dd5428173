"""`python -m eval baselines`, end to end: rows that are there, rows that say what they need."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import __main__ as program
from eval import baseline_table, baselines, jina, metrics
from eval.bm25 import BM25
from eval.collections import load
from eval.metrics import evaluate
from eval.provenance import sources
from eval.retrieval import search
from experiments import ON_BASE, PAIR
from model import bases
from model.pseudo import ByPseudoQuery, PseudoQuery
from model.saved import read_config
from model.unimoer import UniMoER
from tests.eval import published, qwen
from tests.train.tiny import tiny_config, write_collection
from train.trial import model_config

QWEN = ("Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Reranker-0.6B")
MARKS = ("<|embed_token|>", "<|rerank_token|>")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real texts, in a folder of that name."""
    return published.of_functions(tmp_path_factory.mktemp("baselines") / "Tiny")


@pytest.fixture(scope="module")
def folders(make_base: Callable[..., Path], data: Path) -> dict[str, Path]:
    """hub id -> a tiny model that plays it; no 4B, no 8B."""
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    fast = qwen.tokenizer([*texts, *["yes", "no"] * 200], (*qwen.CHAT, *MARKS))

    def make(seed: int) -> Path:
        place = make_base(seed, model_type="qwen3", vocab_size=fast.get_vocab_size())
        fast.save(str(place / "tokenizer.json"))
        return place

    found = {name: make(i) for i, name in enumerate((*QWEN, "Alibaba-NLP/E2Rank-0.6B", jina.JINA))}
    tensors = load_file(found[jina.JINA] / "model.safetensors")
    for name, width in (("projector.0.weight", 32), ("projector.2.weight", 512)):
        tensors[name] = torch.randn(512, width, generator=torch.Generator().manual_seed(7))
    save_file(tensors, found[jina.JINA] / "model.safetensors", {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def saved(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One LoRA, and two that are switched by task, with experts that do something."""
    found = []
    for name, arm in (("joint-single", {}), ("task", {**PAIR, "ranks": (2, 2), "router": "task"})):
        model = UniMoER(model_config(tiny_config(tiny_base, data, **arm)))
        with torch.no_grad():
            for key, parameter in model.trained().items():
                if ".lora_B" in key:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        found.append(tmp_path_factory.mktemp("saved") / name / "seed0.model")
        model.save_pretrained(found[-1])
    return found


@pytest.fixture
def run(data: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch, capsys):
    """run(words) -> (exit code, stdout, stderr); the hub has nothing, four models lie here."""
    fast = qwen.Tokenizer.from_file(str(folders[jina.JINA] / "tokenizer.json"))
    document, query = (fast.token_to_id(mark) for mark in MARKS)
    assert document is not None and query is not None
    marks = (document, query)
    monkeypatch.setattr(jina, "load", partial(jina.load, marks=marks))
    monkeypatch.setattr(baselines, "at_hand", lambda name: None)
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path / "cache"))

    def absent(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(bases, "snapshot_download", absent)
    given = [f"{name}={folder}" for name, folder in folders.items()]

    def run(*words: str, local: list[str] = given) -> tuple[int, str, str]:
        line = ["baselines", "--data", str(data), "--out", str(tmp_path / "out"),
                "--device", "cpu", "--depth", "20", "--candidates", "6"]  # fmt: skip
        code = program.main([*line, "--local", *local, *words])
        return code, *capsys.readouterr()

    return run


def result(tmp_path: Path, row: str) -> dict:
    found = json.loads((tmp_path / "out" / "baselines" / row / "tiny-test.json").read_text())
    assert found["sources"] == sources() and "commit" in found["git"]
    return found


def lines(text: str) -> dict[str, list[str]]:
    """The first cell of each line of a table -> the others, without what the row is."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[2:]] for row in rows}


def test_all_rows(run, data: Path, folders, saved: list[Path], tmp_path: Path) -> None:
    code, out, err = run("--models", *map(str, saved), "--pseudo-query")
    assert code == 0, err
    shown = lines(out)
    assert list(shown)[1:] == [
        "---", "bm25", "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-0.6b-lora", "qwen3-4b-lora",
        "qwen3-8b-lora", "e2rank-0.6b", "e2rank-4b", "e2rank-8b", "jina-reranker-v3",
        "joint-single-seed0", "joint-single-seed0-pseudo-query", "task-seed0",
        "task-seed0-pseudo-query", "ceiling",
    ]  # fmt: skip
    assert shown["qwen3-4b"][0] == "needs Qwen/Qwen3-Embedding-4B and Qwen/Qwen3-Reranker-4B"
    assert shown["e2rank-8b"][0] == "needs Alibaba-NLP/E2Rank-8B"
    assert shown["jina-reranker-v3"][0] == shown["ceiling"][0] == "-"
    measured = [name for name in shown if name.startswith(("q", "e2", "jina", "joint", "task"))
                and not shown[name][0].startswith("needs")]  # fmt: skip
    assert len(measured) == 7
    for name in ("bm25", *measured):
        found = result(tmp_path, name)
        for at, task in enumerate(("embedding", "reranking")):
            if task in found["scores"]:
                mean = metrics.mean(found["scores"][task], "ndcg_cut_10")
                assert shown[name][at] == f"{mean:.4f}" and len(found["scores"][task]) == 10
    tables = (tmp_path / "out" / "baselines" / "summary-tiny.md").read_text()
    assert tables.strip() in out and "mean of" not in tables

    # Two models hold twice as much as one.
    def count(name: str) -> int:
        tensors = load_file(folders[name] / "model.safetensors")
        return sum(t.numel() for t in tensors.values())

    sizes = {name: result(tmp_path, name)["parameters"] for name in ("bm25", *measured)}
    assert sizes["bm25"] == 0 and sizes["e2rank-0.6b"] == count("Alibaba-NLP/E2Rank-0.6B")
    assert sizes["qwen3-0.6b"] == sum(map(count, QWEN)) + 32  # yes minus no
    assert sizes["jina-reranker-v3"] == count(jina.JINA)
    # A pseudo-query needs no head: its model is the saved one without that.
    assert sizes["task-seed0"] == sizes["task-seed0-pseudo-query"] + 33
    assert sizes["task-seed0"] == sizes["joint-single-seed0"]


def test_the_untrained_base_of_saved_models(
    run, data: Path, tiny_base: Path, saved: list[Path], tmp_path: Path
) -> None:
    """One row for the models that read in one way, with a bare model's vectors and few numbers."""
    deeper = tmp_path / "deeper" / "seed0.model"
    UniMoER(model_config(tiny_config(tiny_base, data, layers=3))).save_pretrained(deeper)
    folders = [*map(str, saved), str(deeper)]
    code, out, err = run("--rows", "bm25", "--models", *folders, "--untrained")
    assert code == 0, err
    rows = [name for name in lines(out) if name.endswith("-untrained")]
    assert rows == ["joint-single-seed0-untrained", "deeper-seed0-untrained"]
    found = result(tmp_path, rows[0])
    bare = UniMoER(replace(read_config(saved[0])[0], lora=None, router=None))
    collection = load(str(data))
    queries, documents = list(collection.qrels["test"]), list(collection.pools["test"])
    near = search(
        bare.encode_query([collection.queries[q] for q in queries]),
        bare.encode_document([collection.corpus[d] for d in documents]), queries, documents, 20,
    )  # fmt: skip
    assert found["scores"]["embedding"] == evaluate(collection.qrels["test"], near)
    trained = result(tmp_path, "joint-single-seed0")
    assert found["scores"]["reranking"] != trained["scores"]["reranking"]
    tensors = bare.decoder.named_weights().values()
    assert found["parameters"] == sum(t.numel() for t in tensors) < trained["parameters"]


def test_the_scores_are_those_of_the_models(run, data: Path, folders, tmp_path: Path) -> None:
    """Retrieval by the embedder, and the reranking of BM25's candidates by the other model."""
    assert run("--rows", "qwen3-0.6b", "e2rank-0.6b", "jina-reranker-v3")[0] == 0
    collection, found = load(str(data)), result(tmp_path, "qwen3-0.6b")
    qrels, documents = collection.qrels["test"], list(collection.pools["test"])
    queries, texts = list(qrels), [collection.corpus[d] for d in documents]
    asked_for = {q: collection.queries[q] for q in queries}
    candidates = BM25(documents, texts).search(asked_for, 6)

    model = UniMoER(baselines.embedder(str(folders[QWEN[0]])))
    asked = model.encode_query([collection.queries[q] for q in queries])
    near = search(asked, model.encode_document(texts), queries, documents, 20)
    assert found["scores"]["embedding"] == evaluate(qrels, near)

    def reranked(score: Callable[[str, list[str]], torch.Tensor]) -> dict:
        run = {q: dict(zip(row, score(q, list(row)).tolist(), strict=True))
               for q, row in candidates.items() if row}  # fmt: skip
        return evaluate(qrels, run)

    judge = UniMoER(baselines.reranker(str(folders[QWEN[1]])))
    assert found["scores"]["reranking"] == reranked(
        lambda q, row: judge.score_pairs(
            [(collection.queries[q], collection.corpus[d]) for d in row]
        )
    )
    listwise = UniMoER(
        baselines.embedder(str(folders["Alibaba-NLP/E2Rank-0.6B"]), document_tokens=1024)
    )
    asked_as = PseudoQuery(chat=True)
    assert result(tmp_path, "e2rank-0.6b")["scores"]["reranking"] == reranked(
        lambda q, row: ByPseudoQuery(listwise.tokenizer, asked_as).scores(
            listwise.embed_all, [(collection.queries[q], [collection.corpus[d] for d in row])]
        )[0]
    )
    assert "embedding" not in result(tmp_path, "jina-reranker-v3")["scores"]
    assert found["models"][0]["prompts"]["query"].endswith("\nQuery:{query}")
    # Of each model what it read, and nothing else.
    e2rank = ["query", "document", "instruction"]
    for row, read in (("qwen3-0.6b", [["query", "document"], ["pair"]]), ("e2rank-0.6b", [e2rank]),
                      ("jina-reranker-v3", [[]])):  # fmt: skip
        assert [list(m["prompts"]) for m in result(tmp_path, row)["models"]] == read
    assert [m["base"]["fingerprint"] for m in found["models"]] == [
        bases.identity(folders[name])["fingerprint"] for name in QWEN
    ]


@pytest.mark.parametrize(
    ("name", "split", "of"),
    [("msmarco", "dev", "MRR@10"), ("mmarco-es", "dev", "MRR@10"), ("msmarco", "test", "nDCG@10"),
     ("scifact", "test", "nDCG@10")],
)  # fmt: skip
def test_the_metric_is_the_collection_s_own(name: str, split: str, of: str) -> None:
    values = {"recip_rank": 0.25, "ndcg_cut_10": 0.5}
    result: dict = {
        "data": {"name": name}, "split": split, "parameters": 0,
        "ceiling": {"reranking": {"q": values}}, "scores": {"embedding": {"q": values}},
    }  # fmt: skip
    rows, found = [baselines.Row(baselines.BM25, "terms")], {baselines.BM25: result}
    text = baseline_table.table("it", rows, {**found})
    value = "0.2500" if of == "MRR@10" else "0.5000"
    assert text.startswith(f"| it: {of} |") and lines(text)["bm25"][0] == value
    assert lines(text)["ceiling"][1] == value
    other = {**result, "data": {"name": "fiqa"}, "split": "test"}
    text = baseline_table.mean_table(rows, [{**found}, {baselines.BM25: other}])
    both = "nDCG@10" if of == "nDCG@10" else "nDCG@10 or MRR@10"
    assert text.startswith(f"| mean of 2 collections: {both} |")
    assert lines(text)["bm25"][0] == ("0.5000" if of == "nDCG@10" else "0.3750")


def test_nothing_is_measured_twice(run, folders, saved, tmp_path: Path, monkeypatch) -> None:
    words = ("--rows", "e2rank-0.6b", "--models", str(saved[0]))
    code, out, _ = run(*words)
    assert code == 0
    monkeypatch.setattr(baseline_table, "measure", None)
    assert run(*words)[:2] == (0, out)
    # A result counts where its model is gone, which is not fetched again.
    assert run(*words, local=[]) == (0, out, "")
    # Not that of another setting, nor of another model in its place.
    code, _, err = run(*words, "--document-tokens", "8")
    assert (
        code == 2 and "setting or device (asked.models: [" in err and "document_tokens': 8" in err
    )
    other = [f"Alibaba-NLP/E2Rank-0.6B={folders[QWEN[0]]}"]
    code, _, err = run(*words, local=other)
    assert code == 2 and "e2rank-0.6b/tiny-test.json is of other weights" in err


def test_a_row_that_is_asked_for_says_why_it_is_missing(run) -> None:
    code, out, err = run("--rows", "qwen3-8b", local=[])
    assert code == 0 and "no network" in err
    assert lines(out)["qwen3-8b"][0] == "needs Qwen/Qwen3-Embedding-8B and Qwen/Qwen3-Reranker-8B"
    code, out, err = run(local=[])
    assert code == 0 and err == ""  # nothing was fetched that nobody named


def test_half_of_a_pair_is_not_enough(run, folders) -> None:
    code, out, _ = run(local=[f"{QWEN[0]}={folders[QWEN[0]]}"])
    assert code == 0 and lines(out)["qwen3-0.6b"][0] == "needs Qwen/Qwen3-Reranker-0.6B"


def test_several_collections_end_in_their_mean(run, data: Path, tmp_path: Path) -> None:
    second = write_collection(tmp_path / "Other")
    qrels = (second / "qrels" / "test.tsv").read_text().splitlines()
    (second / "qrels" / "test.tsv").write_text("\n".join(qrels[:4]) + "\n")
    code, out, err = run("--data", str(data), str(second), "--rows", "e2rank-0.6b", "qwen3-4b")
    assert code == 0, err
    mean = lines(out.split("mean of 2 collections")[1])
    both = [json.loads((tmp_path / "out" / "baselines" / "e2rank-0.6b" / f"{n}.json").read_text())
            for n in ("tiny-test", "other-test")]  # fmt: skip
    for at, task in enumerate(("embedding", "reranking")):
        values = [metrics.mean(found["scores"][task], "ndcg_cut_10") for found in both]
        assert mean["e2rank-0.6b"][at] == f"{sum(values) / 2:.4f}"
    assert mean["qwen3-4b"][0].startswith("needs Qwen/Qwen3-Embedding-4B and")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "qwen"], "--rows qwen: expected some of bm25, qwen3-0.6b"),
        (["--local", "a"], "--local a: expected ID=FOLDER"),
        (["--local", "a/b=c"], "--local a/b: expected one of Alibaba-NLP/E2Rank-0.6B, "),
        (["--models", "nowhere"], "nowhere/config.json is missing"),
        (["--instruction", "{query}"], "prompt 'query' needs"),
    ],
)
def test_what_cannot_be_asked(words: list[str], message: str, run) -> None:
    code, _, err = run(*words)
    assert code == 2 and message in err


def test_how_a_model_reads_makes_its_rows(run, tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """One that reranks by pseudo-query is one row, asked for it or not; the untrained base of one
    that reads pairs without their end token is another base."""
    folders = {}
    for head in ("linear", "yes_no", "pseudo_query"):
        folders[head] = tmp_path / head / "seed0.model"
        model = UniMoER(model_config(tiny_config(tiny_base, data, rerank_head=head)))
        model.save_pretrained(folders[head])
    asked = ("--rows", "bm25", "--pseudo-query", "--models")
    code, out, err = run(*asked, str(folders["pseudo_query"]))
    assert code == 0, err
    assert [name for name in lines(out) if "seed0" in name] == ["pseudo_query-seed0"]
    both = [folders["yes_no"], folders["linear"]]
    for some in (both, both[::-1]):
        assert [row.name for row in baselines.bare(some)] == [
            f"{folder.parent.name}-seed0-untrained" for folder in some
        ]


def test_a_row_that_is_trained_first(run, tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """It names the base and what trains it, until a model on that base is among --models."""
    code, out, err = run("--rows", "qwen3-0.6b-lora")
    assert code == 0, err
    needs = lines(out)["qwen3-0.6b-lora"][0]
    assert needs.startswith("needs Qwen/Qwen3-Embedding-0.6B and training: `python -m run run ")
    both = {"base-lora": ON_BASE, "task": {**PAIR, "ranks": (2, 2), "router": "task"}}
    folders = {name: tmp_path / name / "seed0.model" for name in both}
    for name, arm in both.items():
        model = UniMoER(model_config(tiny_config(tiny_base, data, **arm)))
        with torch.no_grad():
            for key, parameter in model.trained().items():
                if ".lora_B" in key and name != "base-lora":
                    parameter.normal_(std=0.1)
        model.save_pretrained(folders[name])
    asked = ("--rows", "bm25", "qwen3-0.6b-lora", "--models")
    here = [f"Qwen/Qwen3-Embedding-0.6B={tiny_base}"]
    code, out, err = run(*asked, str(folders["base-lora"]), local=here)
    assert code == 0, err
    assert list(lines(out))[2:] == ["bm25", "base-lora-seed0", "ceiling"]
    assert f"reranking LoRA beside {tiny_base.name}" in out
    # Another model on that base, or such a model on another base, is not it.
    for name, local in (("task", here), ("base-lora", [])):
        code, out, err = run(*asked, str(folders[name]), local=local)
        assert code == 0, err
        assert lines(out)["qwen3-0.6b-lora"][0].startswith("needs ")


def test_two_models_of_one_name(run, saved: list[Path]) -> None:
    code, _, err = run("--models", str(saved[0]), str(saved[0]))
    assert code == 2 and "two are called joint-single-seed0" in err


def test_what_a_saved_model_is_called(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    rows = {}
    for name, arm in (
        ("a", {}), ("b", {**PAIR, "router": "similarity-max"}), ("c", ON_BASE),
        ("d", {**PAIR, "router": "softmax"}),
    ):  # fmt: skip
        folder = tmp_path / name / "seed0.model"
        UniMoER(model_config(tiny_config(tiny_base, data, **arm))).save_pretrained(folder)
        rows[name] = baselines.ours(folder).what
    assert rows == {
        "a": "one LoRA", "b": "LoRAs switched by similarity (RouterRetriever)",
        "c": f"reranking LoRA beside {tiny_base.name}", "d": "LoRAs weighed by softmax",
    }  # fmt: skip
